//! Which checkpoints are kept.

use std::{
    fs,
    num::{NonZeroU32, NonZeroU64},
    path::Path,
};

use ddil_evaluate::Metric;
use ddil_files::{
    TEMPORARY,
    fault::{self, Point},
    temporary_sibling, write_atomic,
};
use serde::{Deserialize, Serialize};

use super::{BEST, Checkpoint, REPLACED, folder_of, list, step_of};
use crate::{Error, Result};

/// Which checkpoints are kept: the newest few, and permanently those of every n-th step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Number of newest checkpoints that are kept; two by default, in case the newest is damaged.
    pub keep_last: NonZeroU32,
    /// Checkpoints at multiples of this step are kept permanently; none by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_interval: Option<NonZeroU64>,
    /// The metric of `[evaluate]` by which the best checkpoint is kept, beside the newest: `frechet`, `kid`, `precision`,
    /// `recall`, `density` or `coverage`; none by default. Its model is in the run's folder `best`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<Metric>,
}

impl Default for Retention {
    fn default() -> Self {
        Self { keep_last: NonZeroU32::MIN.saturating_add(1), keep_interval: None, keep_best: None }
    }
}

impl Retention {
    /// Deletes the checkpoints that need not be kept once `newest` is in place; returns the deleted steps.
    ///
    /// `newest` was returned by [`commit`](super::CheckpointWriter::commit) or [`find_latest`](super::find_latest) and
    /// is therefore sound. It is always kept, as are all checkpoints of later steps.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if a folder cannot be listed or removed.
    pub fn apply(&self, newest: &Checkpoint) -> Result<Vec<u64>> {
        self.apply_except(newest, None)
    }

    /// The same, except that the checkpoint of step `best` is kept.
    ///
    /// # Errors
    ///
    /// As [`apply`](Self::apply).
    pub fn apply_except(&self, newest: &Checkpoint, best: Option<u64>) -> Result<Vec<u64>> {
        let mut older: Vec<u64> = list(ddil_files::parent(newest.path()))?
            .iter()
            .filter_map(|path| step_of(path))
            .filter(|&step| step < newest.step())
            .collect();
        let keep = self.keep_last.get() as usize - 1;
        older.truncate(older.len().saturating_sub(keep));
        older.retain(|step| best != Some(*step));
        older.retain(|step| self.keep_interval.is_none_or(|interval| *step % interval != 0));
        for &step in &older {
            remove(&newest.path().with_file_name(format!("step_{step:07}")))?;
        }
        Ok(older)
    }
}

/// Deletes the checkpoints of steps after `step`, which are damaged or no longer part of the run.
///
/// Called when a run resumes from an older checkpoint; returns the deleted steps.
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

/// Writes the name of the best checkpoint to the file `best`, beside `latest`.
pub(crate) fn note_best(checkpoints: &Path, step: u64) -> Result<()> {
    let folder = folder_of(checkpoints, step);
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    Ok(write_atomic(&checkpoints.join(BEST), format!("{name}\n").as_bytes())?)
}

/// The step of the best checkpoint, from that file; none if there is no such file.
pub fn best_of(checkpoints: &Path) -> Option<u64> {
    let name = fs::read_to_string(checkpoints.join(BEST)).ok()?;
    step_of(Path::new(name.trim_end()))
}

/// Removes what a killed process left: an incomplete checkpoint, or one that was being replaced.
///
/// Requires the run folder's lock; without it, this could delete a folder that another process is writing.
///
/// # Errors
///
/// [`Error::Files`] if something cannot be renamed or removed.
pub fn remove_leftovers(checkpoints: &Path) -> Result<()> {
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
                fs::rename(&path, &place).map_err(Error::io("restore", &place))?;
            }
        } else if name.starts_with(TEMPORARY) {
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Renames the folder first, so that an interrupted removal leaves no folder that looks like a damaged checkpoint.
fn remove(path: &Path) -> Result<()> {
    let aside = temporary_sibling(path);
    fault::rename(Point::RetentionRename, path, &aside).map_err(Error::io("remove", path))?;
    fault::reach(Point::RetentionRemove, path)
        .and_then(|()| fs::remove_dir_all(&aside))
        .map_err(Error::io("remove", &aside))
}
