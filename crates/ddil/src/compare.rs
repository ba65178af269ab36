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
//!   plan.json                 the names of axes and cells
//!   results.json  table.md  report.html  quality.svg  shift.svg  side_by_side.png
//! ```
//!
//! A [`Matrix`] is read from a file and expands to [`Cell`]s. `ddil compare` performs the open work by running verbs of
//! the program, and builds a [`ComparisonReport`] from the files that they write. Every file is complete or absent, so an interrupted
//! comparison continues where it stopped, and several processes can work on one.

pub mod matrix;
pub mod metric;
pub mod plot;
pub mod statistics;
pub mod table;

pub(crate) mod folder;
mod item;
mod plan;
mod plan_file;
mod record;
mod render;
mod report;
pub(crate) mod setting;
mod verbs;
mod work;
pub(crate) mod workers;

pub(crate) use item::{PlannedCell, WorkItem};
pub use matrix::{Cell, Matrix};
pub(crate) use plan::{CellProgress, Comparison};
pub(crate) use plan_file::PlanFile;
pub use record::{CellRecord, Outcome};
pub use report::{ArmAt, ComparisonReport, Entry, EntryKind, EntryState};
pub(crate) use report::{Difference, Shift, timesteps};
pub(crate) use verbs::Program;
pub(crate) use work::{End, Worker};
