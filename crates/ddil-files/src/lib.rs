//! Files and settings: bounded reads, atomic writes, versioned JSON, TOML settings with errors that name the line.
//!
//! This crate does not require libtorch.
//!
//! | task | items |
//! | --- | --- |
//! | read untrusted files | [`open_regular_file`], [`read_bounded`], [`read_text_bounded`]; [`mistaken_content`] names what was found instead |
//! | write files that survive a crash | [`write_atomic`], [`replaceable`], [`sync_folder`], [`temporary_sibling`] |
//! | read and write JSON with a version | [`write_json`], [`read_versioned`], [`read_json`], [`read_small_json`]; [`parse_json`], [`in_json_terms`] |
//! | read and write settings of diffusers | [`JsonSettings`] |
//! | read settings | [`Invalid`]; with the feature `settings`: `settings::Settings`, `settings::differences` |
//! | errors with their causes; names in a message | [`Error`], [`Report`], [`with_causes`], [`causes`]; [`listed`] |
//!
//! # Example
//!
//! ```
//! use ddil_files::{read_bounded, read_versioned, write_json};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Debug, PartialEq, Serialize, Deserialize)]
//! struct Status {
//!     format_version: u32,
//!     step: u64,
//! }
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("status.json");
//!
//! // Replaces the file in one step: a crash leaves the old content or the new.
//! write_json(&path, &Status { format_version: 1, step: 300 })?;
//! assert_eq!(read_versioned::<Status>(&path, 1)?.step, 300);
//!
//! // Refused before any memory is allocated.
//! assert!(read_bounded(&path, 8).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod atomic;
mod bounded;
mod content;
mod error;
#[doc(hidden)]
pub mod fault;
mod file_terms;
mod hex;
mod invalid;
mod json;
mod json_settings;
mod python_json;
mod report;
#[cfg(feature = "settings")]
pub mod settings;
#[cfg(feature = "settings")]
mod strict_value;

pub use atomic::{TEMPORARY, parent, replaceable, sync_folder, temporary_sibling, write_atomic};
pub use bounded::{open_regular_file, read_bounded, read_text_bounded};
pub use content::mistaken_content;
pub use error::{Error, Result};
pub use file_terms::{in_json_terms, parse_json};
pub use hex::hex;
pub use invalid::{Invalid, listed};
pub use json::{
    ensure_version, first_version, read_json, read_small_json, read_versioned, write_json,
};
pub use json_settings::JsonSettings;
pub use report::{Report, causes, with_causes};
