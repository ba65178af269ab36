//! Many distillations side by side: the list of cells, their training and measurement, and their common results.
//!
//! ```text
//! runs/<name>/
//!   cells/<cell>.toml         the cell's config, which `ddil distill` reads as well
//!   cells/<cell>/             its run folder
//!   cells/<cell>.log          output of its verbs
//!   cells/<cell>.json         its record: how it ended, and its measurements
//!   cells/<cell>.safetensors  its first samples
//!   cells/<cell>.lock         the process that works on it
//!   teachers/<key>/           samples of the teacher, drawn once, in parts, and its row
//!   real.json                 rows of real images against real images
//!   results.json  table.md  quality.svg  shift.svg  side_by_side.png
//! ```
//!
//! A [`Matrix`] is read from a file and expands to [`Cell`]s; a [`Comparison`] lists the open work as [`WorkItem`]s; a
//! [`Worker`] performs one of them by running verbs of the program, and [`workers::run`] performs many; a
//! [`ComparisonReport`] is built from the files that they write. Every file is complete or absent, so an interrupted
//! comparison continues where it stopped, and several processes can work on one.

pub mod matrix;
pub mod metric;
pub mod plan;
pub mod plot;
pub mod report;
pub mod setting;
pub mod statistics;
pub mod table;
pub mod verbs;
pub mod work;
pub mod workers;

mod folder;
mod item;
mod record;
mod render;

pub use folder::ComparisonFolder;
pub use item::{PlannedCell, PlannedTeacher, WorkItem};
pub use matrix::{Cell, EvaluateConfig, Exception, Extractor, Matrix};
pub use plan::{Comparison, Standing};
pub use record::{CellRecord, Outcome, Row};
pub use report::{ComparisonReport, Entry, EntryKind, EntryState};
pub use verbs::Program;
pub use work::{End, Worker};
