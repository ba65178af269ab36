//! The program `ddil`, which trains, distils, samples, evaluates and compares diffusion models; `ddil --help` lists its
//! verbs.
//!
//! `cargo install ddil` installs the program. This library contains the parts of its verbs, for tests and for
//! programs that read its results; training itself is in [`ddil_trainer`], model folders and sampling in
//! [`ddil_pipelines`], measuring in [`ddil_evaluate`].
//!
//! | for | there is |
//! | --- | --- |
//! | ablations: a matrix of settings and seeds | [`compare`] |
//! | tables of measurements | [`results`] |
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
mod exit_code;
mod presets;
mod program;
mod report;
pub mod results;
pub mod sample_file;
mod shell;

pub use error::{Error, Result};
pub use program::main;
