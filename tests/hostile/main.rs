//! What hostile files, careless callers and several threads may bring, across all crates.

mod api;
mod formats;
mod inputs;
mod threads;
mod unsafe_code;
