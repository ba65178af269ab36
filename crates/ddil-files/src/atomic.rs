//! Files that are whole or not there, also after a crash.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use crate::{
    Error, Result,
    fault::{self, Point},
};

/// The beginning of the name of a file or folder while it is being written or deleted.
pub const TEMPORARY: &str = ".tmp-";

/// Replaces a file by new content: a reader, and a crash, see either all of the old content or all of the new.
///
/// The content is written to a file beside it, flushed to disk and renamed.
///
/// # Errors
///
/// [`Error::Io`] with the step that failed; the old file is then still there.
///
/// # Example
///
/// ```
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("status.txt");
/// ddil_files::write_atomic(&path, b"running")?;
/// ddil_files::write_atomic(&path, b"completed")?;
/// assert_eq!(std::fs::read_to_string(&path)?, "completed");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write_atomic(path: &Path, content: &[u8]) -> Result<()> {
    let aside = temporary_sibling(path);
    // Errors name the file that is meant, not the one beside it.
    let written = write_synced(&aside, path, content)
        .and_then(|()| {
            fault::rename(Point::FileRename, &aside, path).map_err(Error::io("replace", path))
        })
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

/// Flushes a folder to disk: names that were created, renamed or removed in it survive a power cut.
///
/// A no-op on Windows.
///
/// # Errors
///
/// [`Error::Io`] if the folder cannot be opened or flushed.
pub fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(windows) {
        return Ok(()); // A folder cannot be opened as a file there, and needs no flush.
    }
    fault::reach(Point::FolderFlush, path)
        .and_then(|()| File::open(path))
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io("flush to disk", path))
}

/// A temporary name beside `path`, different in each process; it begins with [`TEMPORARY`].
pub fn temporary_sibling(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{TEMPORARY}{name}-{}", std::process::id()))
}

/// The folder that contains `path`; `.` for a bare name.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
