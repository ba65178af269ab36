//! Model folders, sampling and image grids.

mod generation;
mod image;
mod latents;
mod parts;

type TestResult = Result<(), Box<dyn std::error::Error>>;
