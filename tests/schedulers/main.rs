//! What `ddil-schedulers` promises, file by file; `diffusers.rs` holds it against recorded numbers.

mod config_file;
mod ddim;
mod diffusers;
mod lcm;
mod noise_schedule;
mod plan;
mod prediction;
mod support;
mod thresholding;
mod timesteps;
