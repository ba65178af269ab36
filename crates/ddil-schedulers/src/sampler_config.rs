//! Sampling settings: sampler, consistency boundary and timesteps.

use serde::{Deserialize, Serialize};

use crate::boundary::ConsistencyBoundary;
use crate::config_file::{CommonConfig, LcmConfig, SchedulerConfig};
use crate::ddim::Ddim;
use crate::error::Result;
use crate::lcm::Lcm;
use crate::noise_schedule::NoiseSchedule;
use crate::sampler::Sampler;
use crate::timesteps::{TimestepSpacing, Timesteps};

/// The sampling settings of a model: its sampler, the consistency boundary of the network, and the timesteps.
///
/// A distillation method returns it for its students; rollouts, samples and the exported `scheduler_config.json` all
/// use it.
///
/// # Example
///
/// ```
/// use ddil_schedulers::{CommonConfig, SamplerConfig};
///
/// # fn main() -> ddil_schedulers::Result<()> {
/// let ddim = SamplerConfig::Ddim { eta: 0.0 };
/// assert_eq!(ddim.timesteps(1000, 4)?.as_slice(), [999, 749, 499, 249]);
/// assert_eq!(ddim.scheduler_config(CommonConfig::default()).sampler_config(), ddim);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SamplerConfig {
    /// [`Ddim`] on trailing timesteps.
    Ddim {
        /// Fraction of the noise that a step replaces.
        eta: f64,
    },
    /// [`Lcm`], for latent consistency models and students of DMD2.
    Lcm {
        /// The number of evenly spaced timesteps from which those of a run are chosen.
        original_steps: u32,
        /// The boundary condition of the network.
        boundary: ConsistencyBoundary,
    },
}

impl SamplerConfig {
    /// Builds the sampler.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for an `eta` outside of 0..=1.
    pub fn build(&self, schedule: &NoiseSchedule) -> Result<Box<dyn Sampler>> {
        Ok(match self {
            Self::Ddim { eta } => Box::new(Ddim::with_eta(schedule.clone(), *eta)?),
            Self::Lcm { .. } => Box::new(Lcm::new(schedule.clone())),
        })
    }

    /// The boundary condition of the network, if the sampler has one.
    pub fn boundary(&self) -> Option<ConsistencyBoundary> {
        match self {
            Self::Ddim { .. } => None,
            Self::Lcm { boundary, .. } => Some(*boundary),
        }
    }

    /// The timesteps of a run of `steps` steps.
    ///
    /// # Errors
    ///
    /// As [`Timesteps::spaced`] and [`Timesteps::lcm`].
    pub fn timesteps(&self, num_train_timesteps: u32, steps: u32) -> Result<Timesteps> {
        match *self {
            Self::Ddim { .. } => {
                Timesteps::spaced(TimestepSpacing::Trailing, num_train_timesteps, steps, 0)
            }
            Self::Lcm { original_steps, .. } => {
                Timesteps::lcm(num_train_timesteps, original_steps, steps)
            }
        }
    }

    /// The `scheduler_config.json` of diffusers' class for this sampler, with these common keys.
    ///
    /// The file does not contain `eta`, which is an argument of diffusers' pipelines, nor `sigma_data`, which is always
    /// 0.5 there.
    pub fn scheduler_config(&self, common: CommonConfig) -> SchedulerConfig {
        match *self {
            Self::Ddim { .. } => SchedulerConfig::Ddim(common),
            Self::Lcm { original_steps, boundary } => SchedulerConfig::Lcm(LcmConfig {
                common,
                original_inference_steps: original_steps,
                timestep_scaling: boundary.timestep_scaling,
            }),
        }
    }
}

impl SchedulerConfig {
    /// The sampling settings of this file; DDIM is deterministic.
    pub fn sampler_config(&self) -> SamplerConfig {
        match self {
            Self::Ddim(_) => SamplerConfig::Ddim { eta: 0.0 },
            Self::Lcm(LcmConfig { original_inference_steps, timestep_scaling, .. }) => {
                SamplerConfig::Lcm {
                    original_steps: *original_inference_steps,
                    boundary: ConsistencyBoundary {
                        timestep_scaling: *timestep_scaling,
                        ..ConsistencyBoundary::default()
                    },
                }
            }
        }
    }
}
