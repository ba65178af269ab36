//! The state of a run, from its folder.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ddil_trainer::run_folder::{State, Status, is_in_use};

use super::metrics::Metrics;
use super::settings::RunConfig;
use crate::error::Result;

/// The file that makes a folder a run.
pub(crate) const STATUS: &str = "status.json";
/// The report's name in its folder.
pub(crate) const FILE: &str = "report.html";
/// The figures of a run, and their times.
pub(crate) const METRICS: &str = "metrics.jsonl";
pub(super) const TIMINGS: &str = "timings.jsonl";

/// The state of a run, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunState {
    /// A process is working on it.
    Running,
    /// Its process ended without recording a reason.
    Killed,
    /// Stopped on request and saved.
    Interrupted,
    /// Done.
    Completed,
    /// Stopped by an error.
    Failed,
}

/// The state of a run and its figures.
#[derive(Debug)]
pub(crate) struct Summary {
    /// The folder.
    pub(crate) path: PathBuf,
    /// Its state.
    pub(crate) state: RunState,
    /// The last update that is recorded.
    pub(crate) step: u64,
    /// Number of updates in all; none if the config cannot be read.
    pub(crate) total: Option<u64>,
    /// The error that stopped it.
    pub(crate) error: Option<String>,
    /// The config, or why it cannot be read.
    pub(crate) config: std::result::Result<RunConfig, String>,
    /// The figures.
    pub(crate) metrics: Metrics,
    /// Seconds spent, by step.
    pub(crate) timings: Metrics,
    /// When the run last wrote a figure or its status.
    pub(crate) modified: Option<SystemTime>,
}

impl RunState {
    /// As a word.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Killed => "killed",
            Self::Interrupted => "interrupted",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }

    /// The state of the run in a folder, and its status.
    ///
    /// # Errors
    ///
    /// No readable status; a lock that cannot be queried.
    pub(crate) fn of(folder: &Path) -> Result<(Self, Status)> {
        let status = Status::from_folder(folder)?;
        let state = match status.state {
            State::Running if is_in_use(folder)? => Self::Running,
            State::Running => Self::Killed,
            State::Interrupted => Self::Interrupted,
            State::Completed => Self::Completed,
            State::Failed => Self::Failed,
        };
        Ok((state, status))
    }
}

impl Summary {
    /// Reads the run in a folder.
    ///
    /// # Errors
    ///
    /// No readable status; errors of the file system.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let (state, status) = RunState::of(folder)?;
        let config = RunConfig::read(&folder.join("config.toml"))
            .map_err(|error| ddil_files::with_causes(&error));
        let metrics = Metrics::read(&folder.join(METRICS))?;
        let timings = Metrics::read(&folder.join(TIMINGS))?;
        // The status has the step of the last checkpoint.
        let step = status.step.max(metrics.steps.last().copied().unwrap_or(0));
        let times = [STATUS, METRICS].map(|name| fs::metadata(folder.join(name))?.modified());
        Ok(Self {
            path: folder.to_owned(),
            state,
            step,
            total: config.as_ref().ok().map(RunConfig::total_updates),
            error: status.error,
            config,
            metrics,
            timings,
            modified: times.into_iter().filter_map(std::io::Result::ok).max(),
        })
    }

    /// The name: that of the folder.
    pub(crate) fn name(&self) -> String {
        name_of(&self.path)
    }

    /// Seconds of training so far.
    pub(crate) fn seconds(&self) -> Option<f64> {
        self.timings.columns.get("seconds")?.last().copied().flatten()
    }
}

/// Whether a folder is a run.
pub(crate) fn is_run(folder: &Path) -> bool {
    folder.join(STATUS).is_file()
}

/// The name of a folder, also of `.` and of a path that ends with `..`.
pub(crate) fn name_of(folder: &Path) -> String {
    let named = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    named(folder)
        .or_else(|| fs::canonicalize(folder).ok().and_then(|path| named(&path)))
        .unwrap_or_else(|| folder.display().to_string())
}

/// The size of all files below a folder, in bytes; what cannot be read counts as nothing. A file with several names counts
/// once: checkpoints share the files of a buffer.
pub(crate) fn size_on_disk(folder: &Path) -> u64 {
    fn add(folder: &Path, seen: &mut BTreeSet<(u64, u64)>) -> u64 {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let size = |entry: fs::DirEntry| match entry.metadata() {
            Ok(found) if found.is_dir() => add(&entry.path(), seen),
            Ok(found) if is_new(&found, seen) => found.len(),
            _ => 0,
        };
        entries.map(size).sum()
    }
    add(folder, &mut BTreeSet::new())
}

#[cfg(unix)]
fn is_new(found: &fs::Metadata, seen: &mut BTreeSet<(u64, u64)>) -> bool {
    use std::os::unix::fs::MetadataExt;
    found.nlink() < 2 || seen.insert((found.dev(), found.ino()))
}

#[cfg(not(unix))]
fn is_new(_: &fs::Metadata, _: &mut BTreeSet<(u64, u64)>) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_two_names_counts_once() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (first, below) = (folder.path().join("first"), folder.path().join("below"));
        fs::create_dir(&below).expect("it is new");
        fs::write(&first, [0; 1000]).expect("it is writable");
        fs::hard_link(&first, below.join("second")).expect("both are on one disk");
        fs::write(below.join("third"), [0; 10]).expect("it is writable");
        assert_eq!(size_on_disk(folder.path()), 1010);
        assert_eq!(size_on_disk(Path::new("/nonexistent")), 0);
    }

    #[test]
    fn every_folder_has_a_name() {
        assert_eq!(name_of(Path::new("runs/first/")), "first");
        assert!(!name_of(Path::new(".")).contains('.'));
    }
}
