//! The tests of `ddil-schedulers`, file by file; `diffusers.rs` compares with recorded numbers.

mod config_file;
mod ddim;
mod diffusers;
mod estimate;
mod lcm;
mod noise_schedule;
mod prediction;
mod solver;
mod solver_golden;
mod support;
mod thresholding;
mod timesteps;
