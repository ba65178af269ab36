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
/// The content is written to a temporary file in the same folder, flushed to disk and renamed. Where `path` is a link,
/// the file that it leads to is replaced. A folder, a device, a pipe or a socket is not replaced: as root, the rename
/// would remove `/dev/null` itself.
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
    let target = &replaceable(path)?;
    let temporary = temporary_sibling(target);
    // Errors name the target, not the temporary file.
    let written = write_synced(&temporary, path, content)
        .and_then(|()| {
            fault::rename(Point::FileRename, &temporary, target).map_err(Error::io("replace", path))
        })
        .and_then(|()| sync_folder(parent(target)));
    if written.is_err() {
        // Only the first error is reported.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// The file that a write to `path` replaces: `path` itself, or where a link leads, so that links stay links.
///
/// # Errors
///
/// [`Error::Io`] for a folder, a device, a pipe or a socket, for a circle of links, and for a file that cannot be
/// examined.
///
/// # Example
///
/// ```
/// let folder = tempfile::tempdir()?;
/// let link = folder.path().join("latest.txt");
/// std::os::unix::fs::symlink("first.txt", &link)?;
/// assert_eq!(ddil_files::replaceable(&link)?, folder.path().join("first.txt"));
/// assert!(ddil_files::replaceable(std::path::Path::new("/dev/null")).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn replaceable(path: &Path) -> Result<PathBuf> {
    /// As many as Linux follows.
    const MAX_LINKS: usize = 40;
    let refused = |reason: String| {
        Error::io("replace", path)(io::Error::new(io::ErrorKind::InvalidInput, reason))
    };
    let mut target = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::symlink_metadata(&target) {
            Ok(found) if found.is_symlink() => {
                let next = fs::read_link(&target).map_err(Error::io("read the link", path))?;
                target = parent(&target).join(next);
            }
            Ok(found) if !found.is_file() => {
                return Err(refused("it exists and is not a regular file".to_owned()));
            }
            Ok(_) => return Ok(target),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(target),
            Err(error) => return Err(Error::io("examine", path)(error)),
        }
    }
    Err(refused(format!("more than {MAX_LINKS} links lead from it")))
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
