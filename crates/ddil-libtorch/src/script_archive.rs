mod pickle;

use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use ddil_files::open_regular_file;
use flate2::read::DeflateDecoder;

use crate::{Error, Result};

/// Limit of the unpacked size of all compressed records of an archive together. Only the program's source and its line
/// numbers are compressed: a few megabytes for the largest networks.
const MAX_UNPACKED_BYTES: u64 = 128 << 20;
/// Limit of the central directory's size: half a million records.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

const END: &[u8; 4] = b"PK\x05\x06";
const END_BYTES: usize = 22;
const END64: &[u8; 4] = b"PK\x06\x06";
const END64_BYTES: usize = 56;
const LOCATOR64: &[u8; 4] = b"PK\x06\x07";
const LOCATOR64_BYTES: usize = 20;
const ENTRY: &[u8; 4] = b"PK\x01\x02";
const ENTRY_BYTES: usize = 46;
const LOCAL: &[u8; 4] = b"PK\x03\x04";
const LOCAL_BYTES: usize = 30;
/// Marks a number beyond 32 bits, which is stored in an extra field.
const IN_EXTRA: u64 = u32::MAX as u64;
const EXTRA64: u16 = 1;

/// Checks that a file is a `TorchScript` archive that declares no more data than it contains, before libtorch reads it.
///
/// libtorch trusts every size in an archive and allocates memory for it before it checks whether the data exist. So
/// this checks first: the records of the zip archive's central directory must lie within the file, must not overlap,
/// and must unpack to no more than 128 MiB together; in the pickles among them, texts must lie within their record
/// and values must be numbered consecutively. The values of tensors are not read.
///
/// A program that passes can still allocate any amount of memory when it runs, and a part of it runs during loading.
/// The layout of zip is that of [APPNOTE 6.3.10](https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT), 4.3.
///
/// # Errors
///
/// [`Error::ScriptArchive`] with the record and the problem, also for a file that is not an archive; [`Error::File`] if
/// it cannot be read or is not a regular file.
///
/// # Example
///
/// ```
/// use ddil_libtorch::ensure_script_archive;
///
/// # let path = std::env::temp_dir().join(format!("ddil-archive-{}", std::process::id()));
/// std::fs::write(&path, "no archive")?;
/// let error = ensure_script_archive(&path).unwrap_err().to_string();
/// assert!(error.contains("not a zip archive"), "{error}");
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn ensure_script_archive(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let file = open_regular_file(path).map_err(Error::file("open", path))?;
    let len = file.metadata().map_err(Error::file("read", path))?.len();
    ensure(file, len).map_err(|problem| match problem {
        Problem::Read(source) => Error::file("read", path)(source),
        Problem::Text(problem) => Error::ScriptArchive { path: path.to_owned(), problem },
    })
}

/// The reason why an archive is rejected.
#[derive(Debug)]
enum Problem {
    /// An error of the system.
    Read(io::Error),
    /// A description of the problem.
    Text(String),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

type Checked<T> = std::result::Result<T, Problem>;

fn refuse<T>(problem: impl Into<String>) -> Checked<T> {
    Err(Problem::Text(problem.into()))
}

fn ensure(mut file: impl Read + Seek, len: u64) -> Checked<()> {
    let records = Directory::find(&mut file, len)?.records(&mut file)?;
    let data: Vec<u64> =
        records.iter().map(|record| record.data(&mut file, len)).collect::<Checked<_>>()?;
    ensure_room(&records, len)?;
    let mut pickles = records.iter().zip(data).filter(|(record, _)| record.is_pickle());
    pickles.try_for_each(|(record, data)| record.ensure_pickle(&mut file, data))
}

/// The position of the central directory.
#[derive(Debug)]
struct Directory {
    start: u64,
    bytes: u64,
    num_records: u64,
}

impl Directory {
    /// The directory that libtorch uses: the one in the last end record of the file.
    fn find(file: &mut (impl Read + Seek), len: u64) -> Checked<Self> {
        // The end record is followed by a comment of at most 65535 bytes.
        let tail_bytes = len.min((END_BYTES + usize::from(u16::MAX)) as u64);
        let tail = read_at(file, len - tail_bytes, tail_bytes as usize)?;
        let Some(at) = tail.windows(END_BYTES).rposition(|end| end.starts_with(END)) else {
            return refuse("it is not a zip archive, or its end is missing");
        };
        let end = &tail[at..];
        let at = len - tail_bytes + at as u64;
        let own = Self {
            start: u32_at(end, 16).into(),
            bytes: u32_at(end, 12).into(),
            num_records: u16_at(end, 10).into(),
        };
        let directory = Self::find64(file, at)?.unwrap_or(own);
        directory.ensure(len)?;
        Ok(directory)
    }

    /// The directory of a zip64 archive, whose locator is just before the end record at `end`.
    fn find64(file: &mut (impl Read + Seek), end: u64) -> Checked<Option<Self>> {
        let Some(at) = end.checked_sub(LOCATOR64_BYTES as u64) else { return Ok(None) };
        let locator = read_at(file, at, LOCATOR64_BYTES)?;
        if !locator.starts_with(LOCATOR64) {
            return Ok(None);
        }
        let start = u64_at(&locator, 8);
        let fits = start.checked_add(END64_BYTES as u64).is_some_and(|end| end <= at);
        let record = if fits { read_at(file, start, END64_BYTES)? } else { Vec::new() };
        if !record.starts_with(END64) {
            return refuse(format!(
                "its zip64 end record is not at byte {start}, where the archive says"
            ));
        }
        Ok(Some(Self {
            start: u64_at(&record, 48),
            bytes: u64_at(&record, 40),
            num_records: u64_at(&record, 32),
        }))
    }

    fn ensure(&self, len: u64) -> Checked<()> {
        let Self { start, bytes, num_records } = *self;
        if start.checked_add(bytes).is_none_or(|end| end > len) {
            return refuse(format!(
                "its directory is recorded as bytes {start}..{start}+{bytes}, but the file has {len} bytes"
            ));
        }
        if bytes > MAX_DIRECTORY_BYTES {
            return refuse(format!(
                "its directory has {bytes} bytes; the limit is {MAX_DIRECTORY_BYTES}"
            ));
        }
        if num_records == 0 || num_records > bytes / ENTRY_BYTES as u64 {
            return refuse(format!(
                "its directory of {bytes} bytes is recorded to have {num_records} entries"
            ));
        }
        Ok(())
    }

    fn records(&self, file: &mut (impl Read + Seek)) -> Checked<Vec<Record>> {
        let list = read_at(file, self.start, self.bytes as usize)?;
        let mut rest = &list[..];
        let mut records = Vec::with_capacity(self.num_records as usize);
        for number in 0..self.num_records {
            let Some((record, behind)) = Record::split(rest)? else {
                return refuse(format!("entry {number} of its directory is truncated or invalid"));
            };
            records.push(record);
            rest = behind;
        }
        Ok(records)
    }
}

/// A record's entry in the central directory.
#[derive(Debug)]
struct Record {
    name: String,
    is_packed: bool,
    /// Size in the file.
    bytes: u64,
    unpacked_bytes: u64,
    /// Offset of its local header.
    header: u64,
}

impl Record {
    /// The first entry of a directory, and the rest of it.
    fn split(list: &[u8]) -> Checked<Option<(Self, &[u8])>> {
        let Some((entry, behind)) = list.split_at_checked(ENTRY_BYTES) else { return Ok(None) };
        let [name, extra, comment] = [28, 30, 32].map(|at| usize::from(u16_at(entry, at)));
        if !entry.starts_with(ENTRY) || behind.len() < name + extra + comment {
            return Ok(None);
        }
        let name_text = String::from_utf8_lossy(&behind[..name]).into_owned();
        let is_packed = match u16_at(entry, 10) {
            0 => false,
            8 => true,
            method => {
                return refuse(format!(
                    "record {name_text:?} has the unknown compression method {method}"
                ));
            }
        };
        let [unpacked_bytes, bytes, header] = sizes(entry, &behind[name..name + extra])
            .ok_or_else(|| {
                Problem::Text(format!("record {name_text:?} has a damaged extra field"))
            })?;
        let record = Self { name: name_text, is_packed, bytes, unpacked_bytes, header };
        Ok(Some((record, &behind[name + extra + comment..])))
    }

    /// First byte of its data, after checking that it lies in the file.
    fn data(&self, file: &mut (impl Read + Seek), len: u64) -> Checked<u64> {
        let Self { name, bytes, header, .. } = self;
        let beyond = || {
            refuse(format!(
                "record {name:?} is listed with {bytes} bytes from byte {header}, but the file ends at {len}"
            ))
        };
        let Some(behind) = header.checked_add(LOCAL_BYTES as u64).filter(|&end| end <= len) else {
            return beyond();
        };
        let local = read_at(file, *header, LOCAL_BYTES)?;
        if !local.starts_with(LOCAL) {
            return refuse(format!(
                "record {name:?} is not at byte {header}, where its directory entry says"
            ));
        }
        let data = behind + u64::from(u16_at(&local, 26)) + u64::from(u16_at(&local, 28));
        match data.checked_add(*bytes) {
            Some(end) if end <= len => Ok(data),
            _ => beyond(),
        }
    }

    /// libtorch looks up record names case-insensitively.
    fn is_pickle(&self) -> bool {
        self.name.to_ascii_lowercase().ends_with("pkl")
    }

    fn ensure_pickle(&self, file: &mut (impl Read + Seek), data: u64) -> Checked<()> {
        file.seek(SeekFrom::Start(data))?;
        let packed = BufReader::new(file.take(self.bytes));
        let checked = if self.is_packed {
            let unpacked = DeflateDecoder::new(packed).take(self.unpacked_bytes);
            pickle::ensure(BufReader::new(unpacked))
        } else {
            pickle::ensure(packed)
        };
        checked.or_else(|problem| refuse(format!("record {:?}: {problem}", self.name)))
    }
}

/// Unpacked size, size in the file and offset, each of which may be stored in the first zip64 extra field instead.
fn sizes(entry: &[u8], mut extra: &[u8]) -> Option<[u64; 3]> {
    let mut found = [24, 20, 42].map(|at| u64::from(u32_at(entry, at)));
    if !found.contains(&IN_EXTRA) {
        return Some(found);
    }
    while !extra.is_empty() {
        let (head, behind) = extra.split_at_checked(4)?;
        let (mut field, rest) = behind.split_at_checked(u16_at(head, 2).into())?;
        extra = rest;
        if u16_at(head, 0) == EXTRA64 {
            for number in found.iter_mut().filter(|number| **number == IN_EXTRA) {
                let (first, rest) = field.split_at_checked(8)?;
                (*number, field) = (u64_at(first, 0), rest);
            }
            break;
        }
    }
    Some(found)
}

/// Each record is read into memory whole, so all of them together must not exceed the size of the file.
fn ensure_room(records: &[Record], len: u64) -> Checked<()> {
    let (mut bytes, mut unpacked_bytes) = (0_u64, 0_u64);
    for record in records {
        if !record.is_packed && record.bytes != record.unpacked_bytes {
            return refuse(format!(
                "record {:?} is listed with {} bytes unpacked and {} packed, but it is not compressed",
                record.name, record.unpacked_bytes, record.bytes
            ));
        }
        bytes = bytes.saturating_add(record.bytes);
        if bytes > len {
            return refuse(format!(
                "its records up to {:?} are listed with {bytes} bytes, but the file has {len}",
                record.name
            ));
        }
        if record.is_packed {
            unpacked_bytes = unpacked_bytes.saturating_add(record.unpacked_bytes);
        }
        if unpacked_bytes > MAX_UNPACKED_BYTES {
            return refuse(format!(
                "its compressed records up to {:?} are listed with {unpacked_bytes} bytes unpacked; the limit is \
                 {MAX_UNPACKED_BYTES}",
                record.name
            ));
        }
    }
    Ok(())
}

fn read_at(file: &mut (impl Read + Seek), start: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A number of a header whose length has been checked.
fn number<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| header[at + i])
}

fn u16_at(header: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(number(header, at))
}

fn u32_at(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(number(header, at))
}

fn u64_at(header: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(number(header, at))
}
