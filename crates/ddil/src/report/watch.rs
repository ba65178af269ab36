//! Renews a report while its run or comparison goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use super::summary::{RunState, is_run};
use crate::error::Result;

/// The time between two looks at the folder.
const INTERVAL: Duration = Duration::from_secs(1);

/// Calls `renew` whenever a file has changed that the report of `folder` shows, until `should_stop` or the run has ended.
/// True if it has ended.
///
/// # Errors
///
/// Those of `renew`.
pub(crate) fn watch(
    folder: &Path,
    should_stop: &dyn Fn() -> bool,
    renew: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    let mut shown = None;
    loop {
        // The end first, then the files: what changes while the page is written is shown by the next one. A killed
        // process changes no file.
        let (ended, now) = (has_ended(folder)?, seen(folder));
        if ended || shown.as_ref() != Some(&now) {
            renew()?;
            shown = Some(now);
        }
        if ended {
            return Ok(true);
        }
        let mut left = INTERVAL;
        while !left.is_zero() {
            if should_stop() {
                return Ok(false);
            }
            let part = left.min(Duration::from_millis(100));
            sleep(part);
            left -= part;
        }
    }
}

/// Whether nothing works on it any more. A comparison between two of its cells has not ended, so only its files tell.
fn has_ended(folder: &Path) -> Result<bool> {
    Ok(is_run(folder) && RunState::of(folder)?.0 != RunState::Running)
}

/// Paths, lengths and times of the files that a report shows.
fn seen(folder: &Path) -> Vec<(PathBuf, u64, SystemTime)> {
    const SHOWN: [&str; 7] = [
        "status.json",
        "metrics.jsonl",
        "run.log",
        "results.json",
        "plan.json",
        "environment.json",
        "real.json",
    ];
    let mut paths: Vec<PathBuf> = SHOWN.iter().map(|name| folder.join(name)).collect();
    for below in ["samples", "checkpoints", "cells"] {
        let entries = fs::read_dir(folder.join(below)).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            // Of a cell: its record, and how far its run is.
            paths.extend([path.join("status.json"), path]);
        }
    }
    paths.sort();
    let found = |path: PathBuf| {
        let found = fs::metadata(&path).ok()?;
        Some((path, found.len(), found.modified().ok()?))
    };
    paths.into_iter().filter_map(found).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let before = seen(folder.path());
        fs::create_dir(folder.path().join("samples")).expect("it is new");
        fs::write(folder.path().join("samples/step_1.png"), "x").expect("it is writable");
        let after = seen(folder.path());
        assert_ne!(before, after);
        assert_eq!(after, seen(folder.path()));
    }
}
