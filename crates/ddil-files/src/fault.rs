//! Fault injection: named points at which tests make the disk fail or kill the process.
//!
//! Every write of a run passes one of these points. They are active in debug builds with the feature `fault-points`,
//! which the program's tests enable; there they are controlled by environment variables. In all other builds a point is
//! the plain operation, so the feature has no effect if cargo unifies it into a release build.
//!
//! `DDIL_FAULT` is a comma-separated list of `<point>[@<file>]:<effect>[:<nth>]`. The effect occurs when the point is
//! reached for the nth time (default: the first), for any file or only for `file`, where `#` stands for digits. The
//! effects `full` and `read_only` persist. `DDIL_FAULT_TRACE` names a file to which every point reached is appended,
//! with its file, one per line.

#[cfg(all(feature = "fault-points", debug_assertions))]
mod active;
#[cfg(all(feature = "fault-points", debug_assertions))]
pub use active::{POINTS, reach, write_all};

#[cfg(not(all(feature = "fault-points", debug_assertions)))]
pub use inactive::{reach, write_all};

use std::{fs, io, path::Path};

/// Renames a file or folder; `point` is reached for the new name.
pub fn rename(point: Point, from: &Path, to: &Path) -> io::Result<()> {
    reach(point, to)?;
    fs::rename(from, to)
}

/// A point of fault injection, named after the operation that follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Creates the folders of a new run.
    RunCreate,
    /// Writes the process id to the lock file.
    LockWrite,
    /// Replaces a small file: status, manifest, settings, images.
    FileCreate,
    FileWrite,
    FileFlush,
    FileRename,
    /// Flushes the entries of a folder.
    FolderFlush,
    /// Writes a checkpoint under a temporary name.
    CheckpointCreate,
    MemberCreate,
    MemberWrite,
    MemberFlush,
    /// Moves an existing checkpoint of the same step out of the way.
    CheckpointMakeRoom,
    CheckpointRename,
    CheckpointClear,
    /// Deletes a checkpoint that is no longer retained.
    RetentionRename,
    RetentionRemove,
    /// Appends to a log of lines.
    RecordCreate,
    RecordWrite,
    RecordFlush,
    RecordCut,
    /// Writes the exported model.
    ExportWrite,
    ExportMakeRoom,
    ExportRename,
    ExportClear,
    /// Writes TensorBoard events.
    EventsCreate,
    EventsWrite,
}

#[cfg(not(all(feature = "fault-points", debug_assertions)))]
mod inactive {
    use std::{
        io::{Result, Write},
        path::Path,
    };

    use super::Point;

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "it is empty")]
    pub fn reach(_point: Point, _path: &Path) -> Result<()> {
        Ok(())
    }

    #[inline]
    pub fn write_all(
        _point: Point,
        _path: &Path,
        file: &mut impl Write,
        bytes: &[u8],
    ) -> Result<()> {
        file.write_all(bytes)
    }
}
