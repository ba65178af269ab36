//! The loop of `ddil distill` between two lines of its log, on a small network of pixels and random data.

mod meter;
mod optimization;
mod passes;
mod training_loop;
mod variant;
mod workload;

pub use meter::{Metered, Meters, Role, Tally};
pub use optimization::Optimization;
pub use passes::Passes;
pub use training_loop::{Round, TrainingLoop, Update};
pub use variant::{Method, Sources, Variant};
pub use workload::{Workload, precision};

/// Benchmarks only pass errors on.
pub type Result<T> = std::result::Result<T, ddil_core::Report>;
