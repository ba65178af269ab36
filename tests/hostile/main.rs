//! Hostile files, invalid arguments and several threads, across all crates.
//!
//! `DDIL_MESSAGES=FILE` appends every error message to a file, one per line after its origin, so that their wording can
//! be read: `sort -u FILE`.

mod api;
mod formats;
mod inputs;
mod messages;
mod threads;
mod unsafe_code;
