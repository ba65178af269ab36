//! Fault points that are controlled by environment variables.

use std::{
    env,
    fs::OpenOptions,
    io::{self, Write},
    path::{Path, PathBuf},
    process,
    sync::{
        LazyLock,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
};

use signal_hook::{
    consts::{SIGKILL, SIGTERM},
    low_level::raise,
};

use super::Point;

/// The name of every point.
const POINT_NAMES: [(Point, &str); 26] = [
    (Point::RunCreate, "run.create"),
    (Point::LockWrite, "lock.write"),
    (Point::FileCreate, "file.create"),
    (Point::FileWrite, "file.write"),
    (Point::FileFlush, "file.flush"),
    (Point::FileRename, "file.rename"),
    (Point::FolderFlush, "folder.flush"),
    (Point::CheckpointCreate, "checkpoint.create"),
    (Point::MemberCreate, "member.create"),
    (Point::MemberWrite, "member.write"),
    (Point::MemberFlush, "member.flush"),
    (Point::CheckpointMakeRoom, "checkpoint.make_room"),
    (Point::CheckpointRename, "checkpoint.rename"),
    (Point::CheckpointClear, "checkpoint.clear"),
    (Point::RetentionRename, "retention.rename"),
    (Point::RetentionRemove, "retention.remove"),
    (Point::RecordCreate, "record.create"),
    (Point::RecordWrite, "record.write"),
    (Point::RecordFlush, "record.flush"),
    (Point::RecordCut, "record.cut"),
    (Point::ExportWrite, "export.write"),
    (Point::ExportMakeRoom, "export.make_room"),
    (Point::ExportRename, "export.rename"),
    (Point::ExportClear, "export.clear"),
    (Point::EventsCreate, "events.create"),
    (Point::EventsWrite, "events.write"),
];

/// The names of all points, for tests that cover every one.
pub const POINTS: [&str; POINT_NAMES.len()] = {
    let mut names = [""; POINT_NAMES.len()];
    let mut i = 0;
    while i < POINT_NAMES.len() {
        names[i] = POINT_NAMES[i].1;
        i += 1;
    }
    names
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Kills the process.
    Kill,
    /// Writes half of the data, then kills the process.
    Torn,
    /// Sends SIGTERM to the process, then continues.
    Term,
    /// One I/O error.
    Io,
    /// Writes half of the data, then one error of a full disk.
    Short,
    /// The disk is full from now on.
    Full,
    /// The disk is read-only from now on.
    ReadOnly,
}

const EFFECTS: [(Effect, &str); 7] = [
    (Effect::Kill, "kill"),
    (Effect::Torn, "torn"),
    (Effect::Term, "term"),
    (Effect::Io, "io"),
    (Effect::Short, "short"),
    (Effect::Full, "full"),
    (Effect::ReadOnly, "read_only"),
];

struct Fault {
    point: Point,
    file: Option<String>,
    effect: Effect,
    nth: u32,
    reached: AtomicU32,
}

static FAULTS: LazyLock<Vec<Fault>> = LazyLock::new(|| {
    let text = env::var("DDIL_FAULT").unwrap_or_default();
    text.split(',').filter(|part| !part.is_empty()).map(Fault::parse).collect()
});

/// The current entry of [`DISK_FAULTS`], counted from 1; 0 for a disk that works.
static DISK_FAULT: AtomicU8 = AtomicU8::new(0);

/// The persistent faults of the disk with their error codes.
const DISK_FAULTS: [(Effect, i32); 2] = [(Effect::Full, ENOSPC), (Effect::ReadOnly, EROFS)];
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;

impl Fault {
    fn parse(text: &str) -> Self {
        Self::try_parse(text).unwrap_or_else(|| {
            eprintln!("DDIL_FAULT: {text}: expected <point>[@<file>]:<effect>[:<nth>]");
            process::exit(64)
        })
    }

    fn try_parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (place, effect) = (parts.next()?, parts.next()?);
        let nth = parts.next().map_or(Ok(1), str::parse).ok()?;
        let (name, file) = match place.split_once('@') {
            Some((name, file)) => (name, Some(file.to_owned())),
            None => (place, None),
        };
        let point = POINT_NAMES.iter().find(|(_, known)| *known == name)?.0;
        let effect = EFFECTS.iter().find(|(_, known)| *known == effect)?.0;
        Some(Self { point, file, effect, nth, reached: AtomicU32::new(0) })
    }

    /// Counts the point if it matches; true for the nth match.
    fn is_due(&self, point: Point, file: &str) -> bool {
        self.point == point
            && self.file.as_deref().is_none_or(|own| own == file)
            && self.reached.fetch_add(1, Ordering::Relaxed) + 1 == self.nth
    }
}

/// Reaches a point; an error if a fault is injected.
pub fn reach(point: Point, path: &Path) -> io::Result<()> {
    write_all(point, path, &mut io::sink(), &[])
}

/// Writes all bytes, unless a fault is injected.
pub fn write_all(point: Point, path: &Path, file: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let name = stable_name(path);
    trace(point, &name);
    for fault in FAULTS.iter().filter(|fault| fault.is_due(point, &name)) {
        if matches!(fault.effect, Effect::Torn | Effect::Short) {
            file.write_all(&bytes[..bytes.len() / 2])?;
            file.flush()?;
        }
        apply(fault.effect)?;
    }
    ensure_disk_works(point)?;
    file.write_all(bytes)
}

fn apply(effect: Effect) -> io::Result<()> {
    match effect {
        Effect::Kill | Effect::Torn => raise(SIGKILL),
        Effect::Term => raise(SIGTERM),
        Effect::Io => Err(io::Error::from_raw_os_error(EIO)),
        Effect::Short => Err(io::Error::from_raw_os_error(ENOSPC)),
        Effect::Full | Effect::ReadOnly => {
            let number =
                DISK_FAULTS.iter().position(|(fault, _)| *fault == effect).unwrap_or(0) + 1;
            DISK_FAULT.store(number as u8, Ordering::Relaxed);
            Ok(())
        }
    }
}

/// The error of the current disk fault: a full disk refuses writes, a read-only disk refuses all changes.
fn ensure_disk_works(point: Point) -> io::Result<()> {
    let number = usize::from(DISK_FAULT.load(Ordering::Relaxed));
    let Some((effect, code)) = number.checked_sub(1).and_then(|at| DISK_FAULTS.get(at)) else {
        return Ok(());
    };
    if *effect == Effect::Full && !writes_data(point) {
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(*code))
}

fn name_of(point: Point) -> &'static str {
    POINT_NAMES.iter().find(|(known, _)| *known == point).map_or("", |(_, name)| name)
}

fn writes_data(point: Point) -> bool {
    let name = name_of(point);
    [".create", ".write", ".flush"].iter().any(|end| name.ends_with(end))
}

/// The name of a file with each run of digits replaced by `#`, so that it is equal in every run.
fn stable_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut stable = String::with_capacity(name.len());
    for letter in name.chars() {
        match letter {
            '0'..='9' if stable.ends_with('#') => {}
            '0'..='9' => stable.push('#'),
            _ => stable.push(letter),
        }
    }
    stable
}

fn trace(point: Point, name: &str) {
    static TRACE: LazyLock<Option<PathBuf>> =
        LazyLock::new(|| env::var_os("DDIL_FAULT_TRACE").map(PathBuf::from));
    let Some(path) = TRACE.as_ref() else { return };
    let file = OpenOptions::new().append(true).create(true).open(path);
    // Errors are ignored: an incomplete trace fails the test that reads it.
    let _ =
        file.and_then(|mut file| file.write_all(format!("{} {name}\n", name_of(point)).as_bytes()));
}
