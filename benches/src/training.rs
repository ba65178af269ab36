//! The loop of `ddil distill` between two lines of its log, on a small network of pixels and random data.

mod arm;
mod meter;
mod optimization;
mod passes;
mod way;
mod workload;

pub use arm::{Arm, Round, Update};
pub use meter::{Metered, Meters, Role, Tally};
pub use optimization::Optimization;
pub use passes::Passes;
pub use way::{Method, Sources, Way};
pub use workload::{Workload, precision};

/// Benchmarks only pass errors on.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
