//! Checkpoints: folders that are written under a temporary name, flushed, checked and renamed into place.
//!
//! ```text
//! checkpoints/
//!   latest                  the name of the newest checkpoint
//!   best                    the name of the best, if `output.checkpoints.keep_best` is set
//!   step_0001000/
//!     manifest.json         format, step, kind, and the size and SHA-256 of every member
//!     student.safetensors   members: any safetensors and JSON files
//!     state.json
//! ```
//!
//! Rows that a buffer has spilled are not copied: `student.ring_01_000000.rows` and the like are hard links to files
//! that the run continues to write. The run only appends after the bytes that a checkpoint refers to, and a file is
//! kept as long as one of its names exists. A checkpoint therefore uses as much disk space as the buffer has dropped
//! since it was written.
//!
//! A folder under a final name was complete when it got that name. If the disk damages it later, [`find_latest`] skips
//! it, reports it and returns the newest sound one. Only safetensors and JSON files are read.
//!
//! There is one writer at a time, the holder of the run folder's lock ([`RunFolder`](crate::run_folder::RunFolder)).

mod damage;
mod manifest;
mod named;
mod read;
mod retention;
mod tensors;
mod write;

pub use damage::Damage;
pub use manifest::{Linked, Manifest, Member};
pub use named::find;
pub use read::{Checkpoint, Damaged, Found, find_latest, list, newest_intact};
pub(crate) use retention::note_best;
pub use retention::{Retention, best_of, discard_newer, remove_leftovers};
pub use write::CheckpointWriter;

use std::path::{Path, PathBuf};

/// The folder of a run's checkpoints.
pub(crate) const CHECKPOINTS: &str = "checkpoints";
/// File with the name of the newest checkpoint, for people and other programs.
const LATEST: &str = "latest";
/// File with the name of the best checkpoint, if the config keeps one.
const BEST: &str = "best";
const MANIFEST: &str = "manifest.json";
/// Temporary name of a checkpoint that is being replaced by one of the same step.
const REPLACED: &str = ".old-";

/// Folder name of a step's checkpoint: `step_0001000`.
pub fn folder_of(checkpoints: &Path, step: u64) -> PathBuf {
    checkpoints.join(format!("step_{step:07}"))
}

fn step_of(folder: &Path) -> Option<u64> {
    let step = folder.file_name()?.to_str()?.strip_prefix("step_")?.parse().ok()?;
    // `step_7` and `step_+0000007` are not names that this crate writes.
    (folder_of(Path::new(""), step).file_name() == folder.file_name()).then_some(step)
}
