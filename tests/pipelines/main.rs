//! Model folders, sampling and image grids.

mod generation;
mod latents;
mod parts;
mod image;

type TestResult = Result<(), Box<dyn std::error::Error>>;
