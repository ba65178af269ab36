//! Every reader of the project against corrupted files.
//!
//! `DDIL_FUZZ_SECONDS` is the minimum time per target (0 by default: 60 inputs), `DDIL_FUZZ_SEED` the seed of the
//! inputs (0 by default), `DDIL_FUZZ_FROM` the first input, to repeat one. Inputs that once failed are kept in
//! `corpus/`.

mod configs;
mod data;
mod harness;
mod limits;
mod models;
mod mutate;
mod runs;
mod tree;

pub(crate) use data::image_bytes;
pub(crate) use harness::message_of;
pub(crate) use runs::golden_formats;
pub(crate) use tree::{Tree, repository};
