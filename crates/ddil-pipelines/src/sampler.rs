//! How students of each method step when they are sampled.

use ddil_losses::ObjectiveConfig;
use ddil_schedulers::{
    ConsistencyBoundary, Ddim, Lcm, NoiseSchedule, Sampler, TimestepSpacing, Timesteps,
};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// How a model steps from one timestep to the next.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SamplerKind {
    /// DDIM.
    Ddim {
        /// Share of the noise that a step renews.
        eta: f64,
    },
    /// To clean data and back with fresh noise, as latent consistency models and DMD2's students are sampled.
    Lcm {
        /// The number of even timesteps among which those of a few steps are chosen.
        original_steps: u32,
        /// The boundary condition around the network.
        boundary: ConsistencyBoundary,
    },
}

impl SamplerKind {
    /// How students of a method step.
    pub fn of(objective: &ObjectiveConfig, schedule: &NoiseSchedule) -> Self {
        match objective {
            ObjectiveConfig::Progressive(_) => Self::Ddim { eta: 0.0 },
            ObjectiveConfig::Lcm(lcm) => {
                Self::Lcm { original_steps: lcm.num_ddim_timesteps, boundary: lcm.boundary() }
            }
            // Trained without a boundary, which at its timesteps is the identity but for rounding; diffusers' scheduler
            // has one always.
            ObjectiveConfig::Dmd2(_) => Self::Lcm {
                original_steps: schedule.num_train_timesteps() as u32,
                boundary: ConsistencyBoundary::default(),
            },
        }
    }

    /// The sampler.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`](crate::Error::Scheduler) for an `eta` outside of 0 to 1.
    pub fn build(&self, schedule: &NoiseSchedule) -> Result<Box<dyn Sampler>> {
        Ok(match self {
            Self::Ddim { eta } => Box::new(Ddim::with_eta(schedule.clone(), *eta)?),
            Self::Lcm { .. } => Box::new(Lcm::new(schedule.clone())),
        })
    }

    /// The timesteps of any number of steps.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`](crate::Error::Scheduler) for more steps than there are timesteps to choose from, and for none.
    pub fn timesteps(&self, num_train_timesteps: u32, steps: u32) -> Result<Timesteps> {
        Ok(match *self {
            Self::Ddim { .. } => {
                Timesteps::spaced(TimestepSpacing::Trailing, num_train_timesteps, steps, 0)?
            }
            Self::Lcm { original_steps, .. } => {
                Timesteps::lcm(num_train_timesteps, original_steps, steps)?
            }
        })
    }
}
