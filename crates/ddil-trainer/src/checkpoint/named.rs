//! Checkpoints by the paths that people use.

use std::path::Path;

use super::read::{Checkpoint, newest_intact};
use super::retention::best_of;
use super::{BEST, CHECKPOINTS, LATEST, MANIFEST, folder_of, step_of};
use crate::Result;

/// The checkpoint that a path names, with all bytes verified: its folder; a run's folder `checkpoints`, or the file
/// `latest` in it, for the newest without damage; the file `best` in it for the best. None if the path names no
/// checkpoint.
///
/// # Errors
///
/// [`Error::DamagedCheckpoint`](crate::Error::DamagedCheckpoint) if it differs from what was written, and those of
/// [`newest_intact`].
pub fn find(path: &Path) -> Result<Option<Checkpoint>> {
    if path.join(MANIFEST).is_file() || (step_of(path).is_some() && path.is_dir()) {
        return Checkpoint::open(path).map(Some);
    }
    let ends_with = |path: &Path, name: &str| path.file_name().is_some_and(|own| own == name);
    let folder = path.parent().filter(|folder| ends_with(folder, CHECKPOINTS) && folder.is_dir());
    match folder {
        Some(folder) if ends_with(path, BEST) => {
            best_of(folder).map(|step| Checkpoint::open(&folder_of(folder, step))).transpose()
        }
        Some(folder) if ends_with(path, LATEST) => newest_intact(folder),
        _ if ends_with(path, CHECKPOINTS) => newest_intact(path),
        _ => Ok(None),
    }
}
