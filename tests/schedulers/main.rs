//! What `ddil-schedulers` promises, file by file; `diffusers.rs` holds it against recorded numbers.

mod config_file;
mod ddim;
mod diffusers;
mod estimate;
mod lcm;
mod noise_schedule;
mod prediction;
mod support;
mod thresholding;
mod timesteps;
