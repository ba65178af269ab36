//! Model folders, sampling and image grids.

mod generation;
mod image;
mod latents;
mod parts;
mod solver;

type TestResult = Result<(), Box<dyn std::error::Error>>;
