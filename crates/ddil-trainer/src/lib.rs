//! Trains and distils diffusion models: the run folder, exact resume, and the program ddil
pub mod dataset;
