//! Noise schedules, timestep grids and few-step samplers for diffusion models.
//!
//! This crate is the *step*: it knows how noise is added and removed and never calls a network. Whoever wants
//! DDIM alone needs nothing else of the workspace.
//!
//! One tongue is spoken throughout. What a network was trained to output ([`PredictionType`]) is read once and
//! becomes a [`Prediction`] `{ x0, epsilon }`; every [`Sampler`] goes on from there, for VP, flow matching and
//! EDM schedules alike, because all of them are `x_t = alpha_t x0 + sigma_t epsilon`.
//!
//! Names follow diffusers; numbers are checked against it, and its `scheduler_config.json` is read and written
//! ([`SchedulerConfig`]). Where it steps by a fixed stride that is not on its own grid, or keeps the noise estimate
//! beside a clipped `x0`, this crate does not; [`Compatibility::Diffusers`] reproduces both.
//!
//! A whole batch at one timestep is stepped fastest by a [`Plan`], which [`Ddim::plan`] and [`Lcm::plan`] make.
//!
//! # Example
//!
//! Four DDIM steps of Stable Diffusion 1.5's schedule, with a network that always answers "no noise":
//!
//! ```
//! use ddil_schedulers::{Ddim, NoiseScheduleConfig, PredictionType, Sampler, SamplerStep, Timesteps, TimestepSpacing};
//! use tch::{Kind, Tensor, kind};
//!
//! # fn main() -> ddil_schedulers::Result<()> {
//! let schedule = NoiseScheduleConfig::default().build()?;
//! let sampler = Ddim::new(schedule.clone());
//! let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
//! assert_eq!(timesteps.as_slice(), [999, 749, 499, 249]);
//!
//! let mut x = Tensor::randn([2, 4, 8, 8], kind::FLOAT_CPU);
//! for (t, prev) in timesteps.pairs() {
//!     let t = Tensor::full([2], t, (Kind::Int64, x.device()));
//!     let prev = Tensor::full([2], prev, (Kind::Int64, x.device()));
//!     let model_output = x.zeros_like();
//!     let prediction = PredictionType::Epsilon.convert(&schedule, &model_output, &x, &t)?;
//!     x = sampler.step(&SamplerStep::new(&prediction, &t, &prev))?;
//! }
//! assert_eq!(x.size(), [2, 4, 8, 8]);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod config_file;
mod ddim;
mod error;
mod lcm;
mod noise_schedule;
mod plan;
mod prediction;
mod sampler;
mod thresholding;
mod timesteps;

pub use config_file::{CommonConfig, Compatibility, LcmConfig, SchedulerConfig};
pub use ddim::Ddim;
pub use error::{Error, Result};
pub use lcm::{ConsistencyBoundary, Lcm};
pub use noise_schedule::{
    BetaSchedule, EdmConfig, FinalAlphaCumprod, FlowConfig, MAX_TRAIN_TIMESTEPS, NoiseSchedule,
    NoiseScheduleConfig, Scale, Scales, VpConfig,
};
pub use plan::Plan;
pub use prediction::{Prediction, PredictionType};
pub use sampler::{Sampler, SamplerStep};
pub use thresholding::{Bound, DataRange, Thresholding};
pub use timesteps::{PreviousTimestep, TimestepSpacing, Timesteps};

/// The tch whose tensors this crate takes and returns. It is part of the API: a new tch is a breaking release.
pub use tch;
