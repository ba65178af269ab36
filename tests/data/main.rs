//! Data sets from disk and the order of their samples.

mod dataset;
mod pictures;

type TestResult = Result<(), Box<dyn std::error::Error>>;
