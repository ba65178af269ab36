//! Files and settings: bounded reads, files that are whole or absent, versioned JSON, TOML with helpful errors.
//!
//! This crate needs no libtorch.
//!
//! | for | there is |
//! | --- | --- |
//! | files of any origin | [`open_plain_file`], [`read_bounded`], [`read_text_bounded`] |
//! | files that survive a crash | [`write_atomic`], [`sync_folder`], [`temporary_sibling`] |
//! | JSON with a version | [`write_json`], [`read_versioned`], [`read_json`], [`read_small_json`] |
//! | settings | [`Invalid`]; with the feature `settings`: `settings::Settings`, `settings::differences` |
//! | errors | [`Error`], [`with_causes`] |

#![forbid(unsafe_code)]

mod atomic;
mod bounded;
mod error;
#[doc(hidden)]
pub mod fault;
mod invalid;
mod json;
#[cfg(feature = "settings")]
pub mod settings;

pub use atomic::{TEMPORARY, parent, sync_folder, temporary_sibling, write_atomic};
pub use bounded::{open_plain_file, read_bounded, read_text_bounded};
pub use error::{Error, Result, with_causes};
pub use invalid::Invalid;
pub use json::{
    ensure_version, first_version, read_json, read_small_json, read_versioned, write_json,
};
