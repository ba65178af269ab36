//! A distillation method by name, with its settings.

use ddil_schedulers::{
    ConsistencyBoundary, NoiseSchedule, PredictionType, SamplerConfig, TimestepSpacing, Timesteps,
};
use serde::{Deserialize, Serialize};

use crate::dmd2::{Dmd2, Dmd2Config};
use crate::error::Result;
use crate::lcm::{LatentConsistency, LatentConsistencyConfig};
use crate::objective::Objective;
use crate::progressive::{Progressive, ProgressiveConfig};
use crate::weighting::Weighting;

/// The `objective` part of a config file: a method by name, with its settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum ObjectiveConfig {
    /// Progressive distillation.
    Progressive(ProgressiveConfig),
    /// Latent consistency distillation.
    Lcm(LatentConsistencyConfig),
    /// Improved distribution matching distillation.
    Dmd2(Dmd2Config),
}

impl Default for ObjectiveConfig {
    fn default() -> Self {
        Self::Progressive(ProgressiveConfig::default())
    }
}

impl ObjectiveConfig {
    /// Checks the settings and builds the method for a student that visits `grid`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) with the name of the first invalid setting.
    pub fn build(&self, schedule: &NoiseSchedule, grid: &Timesteps) -> Result<Box<dyn Objective>> {
        let (schedule, grid) = (schedule.clone(), grid.clone());
        Ok(match self {
            Self::Progressive(config) => {
                Box::new(Progressive::new(config.clone(), schedule, grid)?)
            }
            Self::Lcm(config) => Box::new(LatentConsistency::new(config.clone(), schedule, grid)?),
            Self::Dmd2(config) => Box::new(Dmd2::new(config.clone(), schedule, grid)?),
        })
    }

    /// The name of the method, as in config files and logs.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Progressive(_) => "progressive",
            Self::Lcm(_) => "lcm",
            Self::Dmd2(_) => "dmd2",
        }
    }

    /// The same settings, with unset values that depend on the network's output filled in for networks trained to
    /// predict `output`: the weighting of the critic's error in [`Dmd2`](Self::Dmd2).
    #[must_use]
    pub fn trained_to_predict(self, output: PredictionType) -> Self {
        match self {
            Self::Dmd2(config) => {
                let weighting = config.critic_weighting.unwrap_or(Weighting::of(output));
                Self::Dmd2(Dmd2Config { critic_weighting: Some(weighting), ..config })
            }
            Self::Progressive(_) | Self::Lcm(_) => self,
        }
    }

    /// The timesteps at which a student of `steps` steps is trained.
    ///
    /// These are the timesteps at which it samples, except for a latent consistency model, which is trained at all
    /// timesteps of its solver for any number of `steps`.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`](crate::Error::Scheduler) if the schedule has no such grid,
    /// [`Error::Invalid`](crate::Error::Invalid) if the method does not support it: the number of steps of
    /// [`Dmd2`](Self::Dmd2) must divide the number of training timesteps.
    pub fn training_grid(&self, schedule: &NoiseSchedule, steps: u32) -> Result<Timesteps> {
        match self {
            Self::Lcm(config) => config.grid(schedule, config.num_ddim_timesteps),
            Self::Progressive(_) | Self::Dmd2(_) => self.sampling_grid(schedule, steps),
        }
    }

    /// The timesteps at which a student samples in `steps` steps. They are a subset of the training timesteps if
    /// `steps` is the number the student was trained for.
    ///
    /// # Errors
    ///
    /// As [`training_grid`](Self::training_grid).
    pub fn sampling_grid(&self, schedule: &NoiseSchedule, steps: u32) -> Result<Timesteps> {
        let total = schedule.num_train_timesteps() as u32;
        match self {
            Self::Progressive(_) => {
                Ok(Timesteps::spaced(TimestepSpacing::Trailing, total, steps, 0)?)
            }
            Self::Lcm(config) => config.grid(schedule, steps),
            Self::Dmd2(_) => Dmd2Config::grid(schedule, steps),
        }
    }

    /// The sampler of the student, in rollouts and for final samples.
    ///
    /// [`Dmd2`](Self::Dmd2) is trained without a consistency boundary and sampled with the one that diffusers'
    /// `LCMScheduler` always applies. At the timesteps of its grid this is the identity up to rounding.
    pub fn sampler_config(&self, schedule: &NoiseSchedule) -> SamplerConfig {
        match self {
            Self::Progressive(_) => SamplerConfig::Ddim { eta: 0.0 },
            Self::Lcm(config) => SamplerConfig::Lcm {
                original_steps: config.num_ddim_timesteps,
                boundary: config.boundary(),
            },
            Self::Dmd2(_) => SamplerConfig::Lcm {
                original_steps: schedule.num_train_timesteps() as u32,
                boundary: ConsistencyBoundary::default(),
            },
        }
    }
}
