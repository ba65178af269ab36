//! Data sets from disk and the order of their samples.

mod dataset;
mod image_files;
mod pictures;
mod prompts;

type TestResult = Result<(), Box<dyn std::error::Error>>;
