//! The units of work of a comparison.

use std::path::PathBuf;

use super::folder::ComparisonFolder;
use super::matrix::Cell;
use super::setting::TeacherSamples;

/// A cell and the teacher samples that it is trained to match.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PlannedCell {
    /// The cell.
    pub(crate) cell: Cell,
    /// Checksum of its config.
    pub(crate) config_sha256: String,
    /// The samples of its teacher.
    pub(crate) target: TeacherSamples,
}

/// A row of a teacher.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PlannedTeacher {
    /// Its samples.
    pub(crate) samples: TeacherSamples,
    /// The samples that students are trained to match, with which it is compared.
    pub(crate) target: TeacherSamples,
    /// Whether a student is made for this number of steps.
    pub(crate) own_steps: bool,
}

/// One unit of work.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum WorkItem {
    /// Compare real images with real images.
    RealImages,
    /// Draw a part of a teacher's samples.
    TeacherSamples {
        /// The samples of which it is a part.
        teacher: TeacherSamples,
        /// Index of the first sample.
        start: u32,
    },
    /// Measure the samples of a teacher.
    TeacherRow(PlannedTeacher),
    /// Train a student and measure it.
    Cell(Box<PlannedCell>),
}

impl WorkItem {
    /// Whether it is a cell; a cell's failure does not affect the others.
    pub(crate) fn is_cell(&self) -> bool {
        matches!(self, Self::Cell(_))
    }

    /// A description for messages.
    pub(crate) fn about(&self) -> String {
        match self {
            Self::RealImages => "real images".to_owned(),
            Self::TeacherSamples { teacher, start } => {
                let TeacherSamples { steps, guidance_scale, samples, .. } = teacher;
                let end = teacher.end_of(*start);
                format!(
                    "teacher, guidance {guidance_scale}, {steps} steps: samples {start} to {end} of {samples}"
                )
            }
            Self::TeacherRow(planned) => {
                let TeacherSamples { steps, guidance_scale, .. } = planned.samples;
                format!("teacher, guidance {guidance_scale}, {steps} steps: measurement")
            }
            Self::Cell(planned) => planned.cell.name.clone(),
        }
    }

    /// The file that receives the output of its verbs.
    pub(crate) fn log(&self, folder: &ComparisonFolder) -> PathBuf {
        match self {
            Self::Cell(planned) => folder.log_of(&planned.cell.name),
            _ => folder.log(),
        }
    }

    /// The lock file of the process that works on it.
    pub(super) fn lock(&self, folder: &ComparisonFolder) -> PathBuf {
        match self {
            Self::RealImages => folder.real().with_extension("lock"),
            Self::TeacherSamples { teacher, start } => {
                teacher.part(folder, *start).with_extension("lock")
            }
            Self::TeacherRow(planned) => {
                planned.samples.row(folder, &planned.target).with_extension("lock")
            }
            Self::Cell(planned) => folder.lock_of(&planned.cell.name),
        }
    }
}
