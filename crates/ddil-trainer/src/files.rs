//! Files that are whole or not there, also after a crash.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    Error, Result,
    fault::{self, Point},
};

/// What a name starts with while its file or folder is being written, or deleted.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// Replaces a file by new content: a reader, and a crash, see either all of the old or all of the new.
pub(crate) fn write_atomic(path: &Path, content: &[u8]) -> Result<()> {
    let aside = temporary_sibling(path);
    // Errors name the file that is meant, not the one beside it.
    let written = write_synced(&aside, path, content)
        .and_then(|()| rename(Point::FileRename, &aside, path).map_err(Error::io("replace", path)))
        .and_then(|()| sync_folder(parent(path)));
    if written.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&aside);
    }
    written
}

fn write_synced(aside: &Path, path: &Path, content: &[u8]) -> Result<()> {
    let created = fault::reach(Point::FileCreate, path).and_then(|()| File::create(aside));
    let mut file = created.map_err(Error::io("create", path))?;
    fault::write_all(Point::FileWrite, path, &mut file, content)
        .map_err(Error::io("write", path))?;
    fault::reach(Point::FileFlush, path)
        .and_then(|()| file.sync_all())
        .map_err(Error::io("flush to disk", path))
}

/// Renames a file or folder; the fault point is that of the name it gets.
pub(crate) fn rename(point: Point, from: &Path, to: &Path) -> io::Result<()> {
    fault::reach(point, to)?;
    fs::rename(from, to)
}

/// Makes names that were created, renamed or removed in a folder survive a power cut.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(windows) {
        return Ok(()); // A folder cannot be opened as a file there, and needs no flush.
    }
    fault::reach(Point::FolderFlush, path)
        .and_then(|()| File::open(path))
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io("flush to disk", path))
}

/// A name beside `path`, this process's own, that start-up cleaning knows as left over.
pub(crate) fn temporary_sibling(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{TEMPORARY}{name}-{}", std::process::id()))
}

pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|source| Error::Json {
        action: "write",
        path: path.to_owned(),
        source,
    })?;
    text.push(b'\n');
    write_atomic(path, &text)
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|source| Error::Json {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

/// The largest JSON file that is small by nature: an index, a card, a manifest, a status.
const MAX_SMALL_BYTES: u64 = 16 << 20;

/// As [`read_json`], of a plain file of at most 16 MiB.
pub(crate) fn read_small_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = ddil_files::read_bounded(path, MAX_SMALL_BYTES).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|source| Error::Json {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

/// The first version of every format; files of that version need not say so.
pub(crate) fn first_version() -> u32 {
    1
}

/// What a file says of itself, whatever else stands there.
#[derive(Deserialize)]
struct Versioned {
    #[serde(default = "first_version")]
    format_version: u32,
}

/// As [`read_small_json`], of a file of the version that this program knows: of any other it says so, and not what is
/// unknown in it.
pub(crate) fn read_versioned<T: DeserializeOwned>(path: &Path, known: u32) -> Result<T> {
    let Versioned { format_version: found } = read_small_json(path)?;
    ensure_version(path, found, known)?;
    read_small_json(path)
}

/// Refuses a version that this program does not know.
pub(crate) fn ensure_version(path: &Path, found: u32, known: u32) -> Result<()> {
    if found == known {
        return Ok(());
    }
    Err(Error::FormatVersion { path: path.to_owned(), found, known })
}
