//! `report.html`: a run or a comparison as a page to look at.
//!
//! The page is one file without any address in it but `data:`: it needs no network. Data are gathered by [`run`] and
//! [`comparison`], charts are drawn in the page by uPlot.

use std::path::{Path, PathBuf};

use ddil_files::with_causes;

use crate::error::{Error, Result};

mod charts;
mod comparison;
mod forest;
pub(crate) mod metrics;
pub(crate) mod page;
mod run;
mod samples;
mod settings;
pub(crate) mod summary;
mod watch;

use comparison::{ComparisonPage, encoded};
use run::RunPage;
use summary::{FILE, STATUS, is_run};

pub(crate) use watch::watch;

/// What a folder is, for its report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Run,
    Comparison,
}

impl Kind {
    fn of(folder: &Path) -> Result<Self> {
        if is_run(folder) {
            return Ok(Self::Run);
        }
        if is_comparison(folder) {
            return Ok(Self::Comparison);
        }
        if !folder.exists() {
            let reason = std::io::Error::new(std::io::ErrorKind::NotFound, "it does not exist");
            return Err(Error::io("read", folder)(reason));
        }
        Err(Error::NothingToReport { path: folder.to_owned(), missing: STATUS })
    }
}

/// Whether a folder is a comparison.
fn is_comparison(folder: &Path) -> bool {
    folder.join("cells").is_dir()
        && ["results.json", "plan.json"].iter().any(|name| folder.join(name).is_file())
}

/// Writes the report of a run or a comparison, by default into its folder, and returns its path.
///
/// # Errors
///
/// [`Error::NothingToReport`] for another folder; [`Error::Report`] if a file is in the way that is not a report; invalid
/// files; errors of the file system.
pub(crate) fn write(folder: &Path, output: Option<&Path>) -> Result<PathBuf> {
    let kind = Kind::of(folder)?;
    let path = output.map_or_else(|| folder.join(FILE), Path::to_owned);
    // Before anything is read.
    page::ensure_replaceable(&path)?;
    let base = if output.is_some() { address_of(folder)? } else { String::new() };
    match kind {
        Kind::Run => page::write(&path, "run.html", &RunPage::read(folder, &base)?),
        Kind::Comparison => {
            write_cells(folder);
            page::write(&path, "comparison.html", &ComparisonPage::read(folder, &base)?)
        }
    }?;
    Ok(path)
}

/// Writes the reports that cells do not have yet: a cell's process writes it at its end, an earlier version did not.
fn write_cells(folder: &Path) {
    let cells = std::fs::read_dir(folder.join("cells")).into_iter().flatten().flatten();
    for cell in cells.map(|entry| entry.path()) {
        if is_run(&cell) && !cell.join(FILE).exists() {
            write_or_warn(&cell);
        }
    }
}

/// As [`write()`], into the folder, at the end of a run or a comparison, whose success does not depend on its report.
pub(crate) fn write_or_warn(folder: &Path) -> Option<PathBuf> {
    write(folder, None)
        .inspect_err(|error| {
            tracing::warn!("no report of {}: {}", folder.display(), with_causes(error));
        })
        .ok()
}

/// The address of a folder from anywhere on this machine, with a `/` at its end.
fn address_of(folder: &Path) -> Result<String> {
    let path = std::fs::canonicalize(folder).map_err(Error::io("find", folder))?;
    let parts: Vec<String> = path.to_string_lossy().split('/').map(encoded).collect();
    Ok(format!("file://{}/", parts.join("/")))
}
