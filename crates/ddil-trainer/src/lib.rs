//! Trains and distils diffusion models: the run folder, exact resume, and the program ddil.

mod crc32c;
mod error;
mod files;

pub mod checkpoint;
pub mod dataset;
pub mod doctor;
pub mod ema;
pub mod environment;
pub mod interrupt;
pub mod logging;
pub mod lr_schedule;
pub mod optimizer;
pub mod picture;
pub mod progress;
pub mod record;
pub mod run_folder;
pub mod settings;
pub mod state;
pub mod tensorboard;

pub use error::{Error, Result};
