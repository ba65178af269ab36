//! The names of a comparison's axes and cells, in its folder: with them the folder explains itself without its matrix.

use serde::{Deserialize, Serialize};

use ddil_files::{read_versioned, write_json};

use super::folder::ComparisonFolder;
use super::item::PlannedCell;
use super::matrix::{Axis, AxisValue};
use super::plan::Comparison;
use crate::error::Result;

/// The only version of the file so far.
const FORMAT_VERSION: u32 = 1;
const FILE: &str = "plan.json";

/// `plan.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PlanFile {
    format_version: u32,
    /// The comparison's name.
    pub(crate) name: String,
    axes: Vec<AxisNames>,
    /// The cells, in the order of the matrix.
    pub(crate) cells: Vec<CellName>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AxisNames {
    name: String,
    baseline: Option<String>,
    values: Vec<String>,
}

/// A cell, without its config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CellName {
    /// Its name.
    pub(crate) name: String,
    /// Its value on each axis.
    pub(crate) values: Vec<String>,
    /// Its seed.
    pub(crate) seed: u64,
    /// The number of steps that its student is made for.
    pub(crate) own_steps: u32,
    /// Checksum of its config.
    pub(crate) config_sha256: String,
}

impl CellName {
    /// The names of a planned cell.
    pub(super) fn of(planned: &PlannedCell) -> Self {
        let PlannedCell { cell, config_sha256, .. } = planned;
        Self {
            name: cell.name.clone(),
            values: cell.values.clone(),
            seed: cell.seed,
            own_steps: cell.own_steps(),
            config_sha256: config_sha256.clone(),
        }
    }
}

impl PlanFile {
    fn of(plan: &Comparison) -> Self {
        let names = |axis: &Axis| AxisNames {
            name: axis.name.clone(),
            baseline: axis.baseline.clone(),
            values: axis.values.iter().map(|value| value.name.clone()).collect(),
        };
        Self {
            format_version: FORMAT_VERSION,
            name: plan.matrix.name.clone(),
            axes: plan.matrix.axes.iter().map(names).collect(),
            cells: plan.cells.iter().map(CellName::of).collect(),
        }
    }

    /// The axes, without the settings that their values change.
    pub(crate) fn axes(&self) -> Vec<Axis> {
        let value = |name: &String| AxisValue { name: name.clone(), ..AxisValue::default() };
        let axis = |axis: &AxisNames| Axis {
            name: axis.name.clone(),
            baseline: axis.baseline.clone(),
            values: axis.values.iter().map(value).collect(),
        };
        self.axes.iter().map(axis).collect()
    }

    /// Reads the plan of a comparison; none in a folder that an earlier version wrote.
    ///
    /// # Errors
    ///
    /// An invalid file.
    pub(crate) fn read(folder: &ComparisonFolder) -> Result<Option<Self>> {
        let path = folder.file(FILE);
        Ok(path.is_file().then(|| read_versioned(&path, FORMAT_VERSION)).transpose()?)
    }

    /// Writes the plan of a comparison, unless its folder has the same.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(crate) fn write(plan: &Comparison) -> Result<()> {
        let (own, folder) = (Self::of(plan), plan.folder());
        if Self::read(folder).ok().flatten().as_ref() == Some(&own) {
            return Ok(());
        }
        Ok(write_json(&folder.file(FILE), &own)?)
    }
}
