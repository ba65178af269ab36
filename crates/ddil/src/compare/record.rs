use std::path::Path;

use ddil_evaluate::Measurement;
use ddil_files::{first_version, read_versioned, write_json};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The only version of the files of a comparison so far.
const FORMAT_VERSION: u32 = 1;

/// How a cell ended, in a file next to its run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CellRecord {
    /// Version of this file.
    pub(crate) format_version: u32,
    /// The cell.
    pub cell: String,
    /// Checksum of its config.
    pub(crate) config_sha256: String,
    /// Checksum of everything else that its measurement depends on.
    pub(crate) measured_as: String,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a cell ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// Trained and measured.
    Done {
        /// One for each number of steps.
        rows: Vec<Row>,
    },
    /// The loss, the gradient or the samples became NaN or infinite.
    Diverged {
        /// The update at which that was detected, counted from 1.
        step: u64,
        /// What was detected.
        message: String,
    },
    /// Another error; the cell will be retried.
    Failed {
        /// The error message.
        message: String,
    },
}

/// A model measured at one number of steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Number of sampling steps.
    pub steps: u32,
    /// Whether the model is made for this number of steps.
    pub(crate) own_steps: bool,
    /// Why it counts as collapsed, if it does.
    pub(crate) collapsed: Option<String>,
    /// The measurement; none if the samples are NaN or infinite.
    pub(crate) measurement: Option<Measurement>,
}

/// Coverage below this is a collapse: nine in ten real images have no sample near them.
pub(super) const MIN_COVERAGE: f64 = 0.1;

impl Row {
    /// The row of a measurement, with the reason where it counts as collapsed.
    pub(super) fn measured(steps: u32, own_steps: bool, measurement: Measurement) -> Self {
        let low = measurement.coverage.filter(|&coverage| coverage < MIN_COVERAGE);
        let collapsed =
            low.map(|coverage| format!("coverage {coverage:.3} is below {MIN_COVERAGE}"));
        Self { steps, own_steps, collapsed, measurement: Some(measurement) }
    }

    /// The row of samples that are NaN or infinite.
    pub(super) fn not_finite(steps: u32, own_steps: bool) -> Self {
        let collapsed = Some("samples are NaN or infinite".to_owned());
        Self { steps, own_steps, collapsed, measurement: None }
    }
}

/// Rows that belong to no cell, with a checksum of what they depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NamedRows {
    #[serde(default = "first_version")]
    format_version: u32,
    pub(super) measured_as: String,
    pub(super) rows: Vec<(String, Row)>,
}

impl CellRecord {
    /// The record of a cell.
    pub fn new(cell: &str, config_sha256: &str, measured_as: &str, outcome: Outcome) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            cell: cell.to_owned(),
            config_sha256: config_sha256.to_owned(),
            measured_as: measured_as.to_owned(),
            outcome,
        }
    }

    /// Reads a record; none if there is no file.
    ///
    /// # Errors
    ///
    /// [`Error::Files`](crate::Error::Files) if the file is not a record, or
    /// if another version wrote it.
    pub fn from_file(path: &Path) -> Result<Option<Self>> {
        Ok(path.exists().then(|| read_versioned(path, FORMAT_VERSION)).transpose()?)
    }

    /// Writes the record; the file is complete or absent.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(write_json(path, self)?)
    }
}

impl NamedRows {
    pub(super) fn new(measured_as: String, rows: Vec<(String, Row)>) -> Self {
        Self { format_version: FORMAT_VERSION, measured_as, rows }
    }

    /// The rows of a file, if they were measured with the given settings.
    pub(super) fn read(path: &Path, measured_as: &str) -> Result<Option<Self>> {
        Ok(Self::read_any(path)?.filter(|rows| rows.measured_as == measured_as))
    }

    /// The rows of a file, however they were measured; none if there is no file.
    pub(super) fn read_any(path: &Path) -> Result<Option<Self>> {
        Ok(path.exists().then(|| read_versioned(path, FORMAT_VERSION)).transpose()?)
    }
}
