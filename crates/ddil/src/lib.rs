//! The program `ddil`, which trains, distils, samples, evaluates and compares diffusion models; `ddil --help` lists its
//! verbs.
//!
//! `cargo install ddil` installs the program. This library contains the parts of its verbs, for tests and for
//! programs that read its results; training itself is in [`ddil_trainer`], model folders and sampling in
//! [`ddil_pipelines`].
//!
//! | for | there is |
//! | --- | --- |
//! | ablations: a matrix of settings and seeds | [`compare`] |
//! | generated images against real ones | [`evaluation`] |
//! | `results.json` and tables | [`results`] |
//! | whether a machine is ready | [`doctor`] |
//!
//! # Example
//!
//! ```
//! use ddil::doctor::Doctor;
//!
//! let doctor = Doctor { folders: vec![std::env::temp_dir()], ..Doctor::default() };
//! let report = doctor.examine()?;
//! println!("{report}");
//! assert!(!report.is_broken());
//! # Ok::<(), ddil::Error>(())
//! ```

#![forbid(unsafe_code)]

mod cli;
mod commands;
pub mod compare;
pub mod doctor;
mod error;
pub mod evaluation;
mod exit_code;
mod extractor;
mod presets;
mod program;
pub mod results;
pub mod sample_file;

pub use error::{Error, Result};
pub use program::main;
