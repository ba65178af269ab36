//! Tests of `ddil-models`, a module for each of its files.

mod common;
mod unet;
