//! Which checkpoints are kept.

use std::{
    fs,
    num::{NonZeroU32, NonZeroU64},
    path::Path,
};

use ddil_files::{
    TEMPORARY,
    fault::{self, Point},
    temporary_sibling,
};
use serde::{Deserialize, Serialize};

use super::{Checkpoint, REPLACED, list, step_of};
use crate::{Error, Result};

/// Which checkpoints are kept: the last few, and every so many steps one for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// How many of the newest are kept; two by default, should the newest be damaged.
    pub keep_last: NonZeroU32,
    /// Those of every so many steps are kept for good; none by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_interval: Option<NonZeroU64>,
}

impl Default for Retention {
    fn default() -> Self {
        Self { keep_last: NonZeroU32::MIN.saturating_add(1), keep_interval: None }
    }
}

impl Retention {
    /// Deletes what need not be kept, now that `newest` is in place; returns the deleted steps.
    ///
    /// `newest` is what [`commit`](super::CheckpointWriter::commit) or
    /// [`find_latest`](super::find_latest) returned, hence sound. It is always kept, and so is
    /// whatever is of a later step.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if a folder cannot be listed or removed.
    pub fn apply(&self, newest: &Checkpoint) -> Result<Vec<u64>> {
        let mut older: Vec<u64> = list(ddil_files::parent(newest.path()))?
            .iter()
            .filter_map(|path| step_of(path))
            .filter(|&step| step < newest.step())
            .collect();
        let keep = self.keep_last.get() as usize - 1;
        older.truncate(older.len().saturating_sub(keep));
        older.retain(|step| self.keep_interval.is_none_or(|interval| *step % interval != 0));
        for &step in &older {
            remove(&newest.path().with_file_name(format!("step_{step:07}")))?;
        }
        Ok(older)
    }
}

/// Deletes the checkpoints of later steps than `step`, damaged or of a future that is given up.
///
/// To be called when a run goes on from an older checkpoint; returns the deleted steps.
///
/// # Errors
///
/// [`Error::Files`] if a folder cannot be listed or removed.
pub fn discard_newer(checkpoints: &Path, step: u64) -> Result<Vec<u64>> {
    let mut discarded = Vec::new();
    for path in list(checkpoints)? {
        if let Some(found) = step_of(&path).filter(|&found| found > step) {
            remove(&path)?;
            discarded.push(found);
        }
    }
    Ok(discarded)
}

/// Clears away what a killed process left: half a checkpoint, or one that was making room for another.
///
/// Only for who holds the run folder's lock: without it, this could take the folder from under a writer.
///
/// # Errors
///
/// [`Error::Files`] if something cannot be renamed or removed.
pub fn tidy(checkpoints: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(checkpoints) else { return Ok(()) };
    for entry in entries {
        let entry = entry.map_err(Error::io("list", checkpoints))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        if let Some(name) = name.strip_prefix(REPLACED) {
            let place = path.with_file_name(name);
            if place.exists() {
                remove(&path)?;
            } else {
                fs::rename(&path, &place).map_err(Error::io("put back", &place))?;
            }
        } else if name.starts_with(TEMPORARY) {
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Takes the name away first: killed half-way, this leaves no folder that looks like a damaged checkpoint.
fn remove(path: &Path) -> Result<()> {
    let aside = temporary_sibling(path);
    fault::rename(Point::RetentionRename, path, &aside).map_err(Error::io("remove", path))?;
    fault::reach(Point::RetentionRemove, path)
        .and_then(|()| fs::remove_dir_all(&aside))
        .map_err(Error::io("remove", &aside))
}
