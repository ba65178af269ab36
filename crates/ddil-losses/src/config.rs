//! A method by name, with its settings.

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
    /// [`Error::Invalid`](crate::Error::Invalid) that names the first setting that cannot be.
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

    /// The same settings, with what depends on a network's output and was left open set for networks that are trained
    /// to put out `output`: how [`Dmd2`](Self::Dmd2) weighs its critic's error.
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

    /// The timesteps that a student of `steps` steps is trained at.
    ///
    /// Those that it samples at, save for a latent consistency model, which is trained at all timesteps of its solver
    /// whatever `steps` are.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`](crate::Error::Scheduler) if the schedule has no such grid,
    /// [`Error::Invalid`](crate::Error::Invalid) if the method does not allow it: the steps of
    /// [`Dmd2`](Self::Dmd2) have to divide the training timesteps.
    pub fn training_grid(&self, schedule: &NoiseSchedule, steps: u32) -> Result<Timesteps> {
        match self {
            Self::Lcm(config) => config.grid(schedule, config.num_ddim_timesteps),
            Self::Progressive(_) | Self::Dmd2(_) => self.sampling_grid(schedule, steps),
        }
    }

    /// The timesteps that a student samples at in `steps` steps; part of those it is trained at where `steps` are
    /// the student's own.
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

    /// How a student is sampled, in rollouts and in the end.
    ///
    /// [`Dmd2`](Self::Dmd2) is trained without a boundary and sampled with the one that diffusers' `LCMScheduler` always
    /// has: at the timesteps of its grid that is the identity but for rounding.
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
