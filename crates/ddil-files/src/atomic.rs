//! Files that are complete or absent, even after a crash.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::{
    Error, Result,
    fault::{self, Point},
};

/// Name prefix of files and folders that are being written or deleted.
pub const TEMPORARY: &str = ".tmp-";

/// Replaces a file atomically: readers see the complete old content or the complete new content, even after a crash.
///
/// The content is written to a temporary file in the same folder, flushed to disk and renamed. A folder, a device, a pipe
/// or a socket is not replaced: as root, the rename would remove `/dev/null` itself.
///
/// # Errors
///
/// [`Error::Io`] with the step that failed; the old file is then unchanged.
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
    ensure_replaceable(path)?;
    let temporary = temporary_sibling(path);
    // Errors name the target, not the temporary file.
    let written = write_synced(&temporary, path, content)
        .and_then(|()| {
            fault::rename(Point::FileRename, &temporary, path).map_err(Error::io("replace", path))
        })
        .and_then(|()| sync_folder(parent(path)));
    if written.is_err() {
        // Only the first error is reported.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Whatever exists there must be a regular file, or a link to one.
fn ensure_replaceable(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            let reason = "it exists and is not a regular file";
            let error = io::Error::new(io::ErrorKind::InvalidInput, reason);
            Err(Error::io("replace", path)(error))
        }
        _ => Ok(()),
    }
}

fn write_synced(temporary: &Path, path: &Path, content: &[u8]) -> Result<()> {
    let created = fault::reach(Point::FileCreate, path).and_then(|()| File::create(temporary));
    let mut file = created.map_err(Error::io("create", path))?;
    fault::write_all(Point::FileWrite, path, &mut file, content)
        .map_err(Error::io("write", path))?;
    fault::reach(Point::FileFlush, path)
        .and_then(|()| file.sync_all())
        .map_err(Error::io("flush", path))
}

/// Flushes a folder to disk, so that created, renamed and removed entries survive a power failure.
///
/// A no-op on Windows.
///
/// # Errors
///
/// [`Error::Io`] if the folder cannot be opened or flushed.
pub fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(windows) {
        return Ok(()); // Windows cannot open a folder as a file, and needs no flush.
    }
    fault::reach(Point::FolderFlush, path)
        .and_then(|()| File::open(path))
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io("flush", path))
}

/// A temporary path in the folder of `path`. The name begins with [`TEMPORARY`] and contains the process id.
pub fn temporary_sibling(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{TEMPORARY}{name}-{}", std::process::id()))
}

/// The folder that contains `path`; `.` for a bare file name.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
