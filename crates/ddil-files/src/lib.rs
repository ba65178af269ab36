//! Files and settings: bounded reads, and the error of a setting that is out of range.
//!
//! This crate needs no libtorch.
//!
//! | for | there is |
//! | --- | --- |
//! | files of any origin | [`open_plain_file`], [`read_bounded`], [`read_text_bounded`] |
//! | settings | [`Invalid`] |

#![forbid(unsafe_code)]

mod bounded;
mod invalid;

pub use bounded::{open_plain_file, read_bounded, read_text_bounded};
pub use invalid::Invalid;
