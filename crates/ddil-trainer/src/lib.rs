//! Trains and distils diffusion models: the run folder, exact resume, and the program ddil.

mod error;
mod files;

mod crc32c;

pub mod checkpoint;
pub mod interrupt;
pub mod picture;
pub mod record;
pub mod run_folder;
pub mod settings;
pub mod tensorboard;

pub use error::{Error, Result};

/// The libtorch that tch speaks to.
const LIBTORCH_VERSION: &str = "2.13.0";
