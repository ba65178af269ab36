//! What benchmarks share: training as `ddil distill` does it, and what the system says of a process.

pub mod free;
pub mod process;
pub mod training;
