//! Checkpoints: whole folders, written aside, flushed, checked and renamed into place.
//!
//! ```text
//! checkpoints/
//!   latest                  the name of the newest checkpoint
//!   step_0001000/
//!     manifest.json         format, step, kind, and of every member its size and SHA-256
//!     student.safetensors   members: any safetensors and JSON files
//!     state.json
//! ```
//!
//! What a buffer has spilled is not copied: `student.ring_01_000000.rows` and its like are second names (hard links) of
//! files that the run goes on with. It only ever writes behind what a checkpoint refers to, and the system keeps a file
//! as long as one of its names, so that a checkpoint costs as much of the disk as the buffer has let go since.
//!
//! A folder with a final name was whole when it got that name. Should the disk damage it later,
//! [`find_latest`] passes it over for the newest one that is sound and says so. Nothing but safetensors
//! and JSON is ever read.
//!
//! One writer at a time: whoever writes holds the run folder's lock
//! ([`RunFolder`](crate::run_folder::RunFolder)).

mod damage;
mod manifest;
mod read;
mod retention;
mod tensors;
mod write;

pub use damage::Damage;
pub use manifest::{Linked, Manifest, Member};
pub use read::{Checkpoint, Damaged, Found, find_latest, list};
pub use retention::{Retention, discard_newer, tidy};
pub use write::CheckpointWriter;

use std::path::{Path, PathBuf};

/// Where the newest checkpoint's name is written down, for people and other programs.
const LATEST: &str = "latest";
const MANIFEST: &str = "manifest.json";
/// A checkpoint that makes room for one of the same step is called this for a moment.
const REPLACED: &str = ".old-";

/// The folder of a step's checkpoint: `step_0001000`.
pub fn folder_of(checkpoints: &Path, step: u64) -> PathBuf {
    checkpoints.join(format!("step_{step:07}"))
}

fn step_of(folder: &Path) -> Option<u64> {
    let step = folder.file_name()?.to_str()?.strip_prefix("step_")?.parse().ok()?;
    // `step_7` or `step_+0000007` are not names that we gave.
    (folder_of(Path::new(""), step).file_name() == folder.file_name()).then_some(step)
}
