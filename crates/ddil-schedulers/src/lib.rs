//! Noise schedules, timestep grids and few-step samplers for diffusion models.
//!
//! This crate computes *steps*: it adds and removes noise and never calls a network. To use DDIM in your own program,
//! you need no other crate of the workspace.
//!
//! | part | types |
//! |---|---|
//! | noise level of each timestep | [`NoiseSchedule`], from a [`NoiseScheduleConfig`]: VP, flow matching, EDM |
//! | timesteps of a run | [`Timesteps`] |
//! | output type of a network | [`PredictionType`], which converts it to an [`Estimate`] or a [`Prediction`] |
//! | clean data beyond the data's range | [`Thresholding`] |
//! | a step | [`Sampler`]: [`Ddim`], [`Lcm`], or your own; [`SamplerConfig`] builds one from settings |
//! | a run of a multistep solver, for teachers | [`Solver`]: [`DpmSolver`], [`UniPc`], [`Euler`]; [`SolverConfig`], [`SolverRun`] |
//! | diffusers' `scheduler_config.json` | [`SchedulerConfig`]; [`SchedulerFile`], as lenient as diffusers |
//!
//! All schedules are `x_t = alpha_t x0 + sigma_t epsilon`, so only [`PredictionType`] depends on the family and on the
//! output of the network. A [`Sampler`] is three numbers per step, its [`StepCoefficients`].
//!
//! Names follow diffusers, and numbers are checked against it. Two rules of diffusers are faults that this crate
//! avoids: a fixed stride that leaves the grid, and a noise estimate that is not recomputed for a clipped `x0`.
//! [`Compatibility::Diffusers`] reproduces both.
//!
//! # Example
//!
//! Four DDIM steps of Stable Diffusion 1.5's schedule, with a network that always returns "no noise":
//!
//! ```
//! use ddil_schedulers::{Ddim, Estimate, NoiseScheduleConfig, PredictionType, Sampler, Timesteps, TimestepSpacing};
//! use tch::{Tensor, kind};
//!
//! # fn main() -> ddil_schedulers::Result<()> {
//! let schedule = NoiseScheduleConfig::default().build()?;
//! let sampler = Ddim::new(schedule.clone());
//! let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
//! assert_eq!(timesteps.as_slice(), [999, 749, 499, 249]);
//!
//! let mut x = Tensor::randn([2, 4, 8, 8], kind::FLOAT_CPU);
//! for (t, prev) in timesteps.pairs() {
//!     let model_output = x.zeros_like();
//!     let estimate = Estimate::of_output(&schedule, PredictionType::Epsilon, model_output, t)?;
//!     x = sampler.step_at(x, &estimate, prev, None)?;
//! }
//! assert_eq!(x.size(), [2, 4, 8, 8]);
//! # Ok(())
//! # }
//! ```
//!
//! For a batch with different timesteps, use [`Sampler::step`]. For DPM-Solver++ and UniPC, see [`SolverRun`].

#![forbid(unsafe_code)]

mod boundary;
mod coefficients;
mod config_file;
mod ddim;
mod dpm_solver;
mod error;
mod estimate;
mod lcm;
mod noise_level;
mod noise_schedule;
mod prediction;
mod sampler;
mod sampler_config;
mod scheduler_file;
mod solver;
mod solver_config;
mod solver_file;
mod thresholding;
mod timesteps;
mod uni_pc;

pub use boundary::ConsistencyBoundary;
pub use coefficients::{StateCoefficients, StepCoefficients};
pub use config_file::{CommonConfig, Compatibility, LcmConfig, SchedulerConfig};
pub use ddil_files::Report;
pub use ddim::Ddim;
pub use dpm_solver::{DpmSolver, DpmSolverConfig, DpmSolverType};
pub use error::{Error, Result};
pub use estimate::Estimate;
pub use lcm::Lcm;
pub use noise_level::{NoiseLevel, NoiseLevels};
pub use noise_schedule::{
    BetaSchedule, EdmConfig, FinalAlphaCumprod, FlowConfig, MAX_TRAIN_TIMESTEPS, NoiseSchedule,
    NoiseScheduleConfig, Scale, Scales, VpConfig,
};
pub use prediction::{Prediction, PredictionType};
pub use sampler::{Sampler, SamplerStep};
pub use sampler_config::SamplerConfig;
pub use scheduler_file::SchedulerFile;
pub use solver::{Euler, Solver, SolverCoefficients, SolverRun};
pub use solver_config::{FinalSigma, LevelsConfig, SolverConfig, SolverMethod};
pub use thresholding::{Bound, DataRange, Thresholding};
pub use timesteps::{PreviousTimestep, TimestepSpacing, Timesteps};
pub use uni_pc::{UniPc, UniPcConfig, UniPcType};

/// The version of tch whose tensors are part of this crate's API: an upgrade of tch is a breaking release.
pub use tch;
