//! Many distillations side by side: which cells there are, how each is trained and measured, and what they say together.
//!
//! ```text
//! runs/<name>/
//!   cells/<cell>.toml         the cell's config, which `ddil distill` reads as well
//!   cells/<cell>/             its run folder
//!   cells/<cell>.log          what was said while it was at work
//!   cells/<cell>.json         how it ended, and what was measured
//!   cells/<cell>.safetensors  its first samples
//!   teachers/<key>/           samples of the teacher, drawn once, in parts, and their row
//!   real.json                 rows of real images against real images
//!   results.json  table.md  quality.svg  shift.svg  side_by_side.png
//! ```
//!
//! A [`Matrix`] is read from a file and gives [`Cell`]s; a [`Plan`] says what of them is left to do, as [`Job`]s;
//! [`workers::run`] does these in processes of their own; a [`Report`] is made of what they left on disk. Everything
//! that a job leaves is whole or not there, so a comparison that was stopped goes on where it stopped.

pub mod job;
pub mod matrix;
pub mod metric;
pub mod plan;
pub mod plot;
pub mod report;
pub mod setting;
pub mod statistics;
pub mod table;
pub mod workers;

mod folder;
mod measure;
mod record;
mod render;
mod training;

pub use folder::ComparisonFolder;
pub use job::Job;
pub use matrix::{Cell, EvaluateConfig, Exception, Extractor, Matrix};
pub use plan::{Plan, Standing};
pub use record::{CellRecord, Outcome, Row};
pub use report::{Entry, EntryKind, EntryState, Report};
pub use training::distil;
