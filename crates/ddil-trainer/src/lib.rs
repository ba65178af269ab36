//! Trains and distils diffusion models: the run folder, exact resume, and the program ddil.

#![forbid(unsafe_code)]

mod crc32c;
mod error;

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod distill;
pub mod ema;
pub mod environment;
pub mod evidence;
mod holder;
pub mod interrupt;
pub mod logging;
pub mod lr_schedule;
pub mod memory;
pub mod optimizer;
pub mod progress;
pub mod record;
mod roster;
pub mod run_folder;
pub mod session;
pub mod state;
pub mod tensorboard;
pub mod train;
mod watch;

use ddil_files as files;
use ddil_files::{fault, settings};
pub use error::{Error, Result};

/// The tch whose tensors this crate takes and returns. It is part of the API: a new tch is a breaking release.
pub use tch;
