//! Checkpoints by the paths that people use.

use std::path::{Path, PathBuf};

use super::read::{Checkpoint, list, newest_intact};
use super::retention::best_of;
use super::{BEST, CHECKPOINTS, LATEST, MANIFEST, folder_of, step_of};
use crate::{Error, Result};

/// The checkpoint that a path names, with all bytes verified: its folder; a run's folder `checkpoints`, or the file
/// `latest` in it, for the newest without damage; the file `best` in it for the best. None if the path names no
/// checkpoint.
///
/// # Errors
///
/// [`Error::DamagedCheckpoint`] if it differs from what was written, [`Error::NoSuchCheckpoint`] if the path is one beside
/// others and does not exist, and those of [`newest_intact`].
pub fn find(path: &Path) -> Result<Option<Checkpoint>> {
    let ends_with = |path: &Path, name: &str| path.file_name().is_some_and(|own| own == name);
    // Elsewhere a folder of that name need not be one: `step_0000500` of images.
    let is_one_by_name = || {
        let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        step_of(path).is_some()
            && path.is_dir()
            && whole.parent().is_some_and(|folder| ends_with(folder, CHECKPOINTS))
    };
    if path.join(MANIFEST).is_file() || is_one_by_name() {
        return Checkpoint::open(path).map(Some);
    }
    let folder = path.parent().filter(|folder| ends_with(folder, CHECKPOINTS) && folder.is_dir());
    match folder {
        Some(folder) if ends_with(path, BEST) && path.is_file() => {
            best_of(folder).map(|step| Checkpoint::open(&folder_of(folder, step))).transpose()
        }
        Some(folder) if ends_with(path, LATEST) => newest_intact(folder),
        Some(folder) if !path.exists() => {
            let name = |path: &PathBuf| Some(path.file_name()?.to_string_lossy().into_owned());
            let known: Vec<String> = list(folder)?.iter().filter_map(name).collect();
            // Another folder of that name, or a run that has none.
            if known.is_empty() {
                return Ok(None);
            }
            Err(Error::NoSuchCheckpoint { path: path.to_owned(), known })
        }
        _ if ends_with(path, CHECKPOINTS) => newest_intact(path),
        _ => Ok(None),
    }
}
