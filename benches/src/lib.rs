//! Shared parts of the benchmarks: the training loop of `ddil distill`, and process statistics.

pub mod free;
pub mod process;
pub mod training;
