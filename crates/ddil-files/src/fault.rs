//! Named points at which a test has the disk fail or the process die.
//!
//! Everything that a run writes passes one of these points. Debug builds with the feature `fault-points`, which the
//! tests of the program turn on, ask the environment there; in every other build a point is the plain operation, and
//! there is nothing to be asked. So a feature that cargo unifies into a release build changes nothing.
//!
//! `DDIL_FAULT` is a list, separated by commas, of `<point>[@<file>]:<effect>[:<nth>]`: at the nth time, the first by
//! default, that a point is reached, for any file or for the one of that name, in which `#` stands for digits. A disk
//! that is full stays so, and one that can only be read too. `DDIL_FAULT_TRACE` names a file that tells every point
//! that is reached, and for which file, a line each.

#[cfg(all(feature = "fault-points", debug_assertions))]
mod active;
#[cfg(all(feature = "fault-points", debug_assertions))]
pub use active::{POINTS, reach, write_all};

#[cfg(not(all(feature = "fault-points", debug_assertions)))]
pub use inactive::{reach, write_all};

use std::{fs, io, path::Path};

/// Renames a file or folder; the fault point is that of the new name.
pub fn rename(point: Point, from: &Path, to: &Path) -> io::Result<()> {
    reach(point, to)?;
    fs::rename(from, to)
}

/// Where something can go wrong, named by what comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The folders of a new run.
    RunCreate,
    /// The process's number in the lock file.
    LockWrite,
    /// A small file that is replaced whole: status, manifest, settings, pictures.
    FileCreate,
    FileWrite,
    FileFlush,
    FileRename,
    /// Names in a folder.
    FolderFlush,
    /// A checkpoint, aside.
    CheckpointCreate,
    MemberCreate,
    MemberWrite,
    MemberFlush,
    /// A checkpoint of the same step, out of the way of the new one.
    CheckpointMakeRoom,
    CheckpointRename,
    CheckpointClear,
    /// A checkpoint that is no longer kept.
    RetentionRename,
    RetentionRemove,
    /// A file of lines.
    RecordCreate,
    RecordWrite,
    RecordFlush,
    RecordCut,
    /// The averaged model.
    ExportWrite,
    ExportMakeRoom,
    ExportRename,
    ExportClear,
    /// TensorBoard's.
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

    #[expect(clippy::unnecessary_wraps, reason = "as where points are active")]
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "there is nothing in it")]
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
