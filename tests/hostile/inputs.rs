//! Every reader of the project against files that somebody spoilt.
//!
//! `DDIL_FUZZ_SECONDS` is how long each target goes on at least (0 by default: 60 inputs), `DDIL_FUZZ_SEED` what its inputs follow from (0 by
//! default), `DDIL_FUZZ_FROM` the first input, to see one again. Inputs that once did harm are kept in `corpus/`.

mod configs;
mod data;
mod harness;
mod limits;
mod models;
mod mutate;
mod runs;
mod tree;

pub(crate) use data::picture;
pub(crate) use harness::told;
pub(crate) use runs::golden_formats;
pub(crate) use tree::{Tree, repository};
