//! Distillation objectives (progressive, latent consistency, distribution matching) and their formulas.
//!
//! Given a batch of states, an objective evaluates teacher and student and returns their distance, one value per
//! sample. It computes losses with their graph and never steps an optimizer.
//!
//! A *formula* is a pure function of tensors or numbers, without networks, random numbers or settings
//! ([`squared_error`], [`pseudo_huber`], [`convex_weights`], [`progressive_target`],
//! [`distribution_matching_gradient`], [`generator_loss`], [`discriminator_loss`]). A *method* is an [`Objective`]:
//! it defines which networks are evaluated and in what order. [`ObjectiveConfig`] builds one from a config file; your
//! own method implements the trait.
//!
//! | method | training timesteps | sampler | target of a state | further networks |
//! |---|---|---|---|---|
//! | [`Progressive`] | those of sampling | DDIM | the end of several teacher steps | none |
//! | [`LatentConsistency`] | all timesteps of a solver | adds fresh noise | prediction of the moving average one step later | the moving average |
//! | [`Dmd2`] | those of sampling | adds fresh noise | none: the distributions of samples are compared | a critic, and a discriminator with dataset samples |
//!
//! An objective does not depend on the kind of conditioning or the mixture of sources: a batch of
//! [`States`](ddil_core::States) contains both. [`TeacherGuidance`] is the source of a teacher's guidance.
//!
//! # Example
//!
//! One loss of progressive distillation, with the same closed-form network as student and as teacher:
//!
//! ```
//! use ddil_core::{Conditioning, Denoiser, RandomStreams, Source, States};
//! use ddil_losses::{LossRequest, Networks, ObjectiveConfig, Phase};
//! use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Prediction, TimestepSpacing, Timesteps};
//! use tch::{Kind, Tensor, kind};
//!
//! /// The exact denoiser for data of mean 0 and standard deviation 1: `x0` is `alpha x_t`.
//! struct UnitGaussian(NoiseSchedule);
//!
//! impl Denoiser for UnitGaussian {
//!     fn predict(&self, x_t: &Tensor, t: &Tensor, _: &Conditioning) -> ddil_core::Result<Prediction> {
//!         let x0 = self.0.scales_at(t, x_t)?.alpha * x_t;
//!         Ok(Prediction::from_x0(&self.0, x0, x_t, t)?)
//!     }
//!
//!     fn schedule(&self) -> &NoiseSchedule {
//!         &self.0
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let schedule = NoiseScheduleConfig::default().build()?;
//! let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
//! let objective = ObjectiveConfig::default().build(&schedule, &grid)?;
//!
//! // Two states, at the first and the last timestep of the grid.
//! let x_t = Tensor::randn([2, 3], kind::FLOAT_CPU);
//! let states = States::new(x_t, &grid, vec![0, 3], Source::Forward)?;
//! let network = UnitGaussian(schedule);
//! let (networks, streams) = (Networks::new(&network, &network), RandomStreams::new(0, 0));
//! let terms = objective.loss(&LossRequest::new(0, Phase::Student, &states, networks, &streams))?;
//! assert_eq!(terms.per_sample.size(), [2]);
//! assert!(terms.per_sample.mean(Kind::Float).double_value(&[]) > 0.0);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod config;
mod device_table;
mod distance;
mod dmd2;
mod error;
mod grid_rows;
mod guidance;
mod lcm;
mod objective;
mod phase;
mod progressive;
mod weighting;

pub use config::ObjectiveConfig;
pub use ddil_files::Report;
pub use distance::{pseudo_huber, squared_error};
pub use dmd2::{
    Dmd2, Dmd2Config, MatchingTimesteps, discriminator_loss, distribution_matching_gradient,
    generator_loss,
};
pub use error::{Error, Result};
pub use guidance::TeacherGuidance;
pub use lcm::{ConsistencyDistance, LatentConsistency, LatentConsistencyConfig, Solver};
pub use objective::{Critic, LossRequest, LossTerms, Networks, Objective, Requirements};
pub use phase::Phase;
pub use progressive::{
    Progressive, ProgressiveConfig, convex_weights, halving_stages, progressive_target,
};
pub use weighting::{TimestepWeights, Weighting};

/// The version of tch whose tensors are part of this crate's API: an upgrade of tch is a breaking release.
pub use tch;
