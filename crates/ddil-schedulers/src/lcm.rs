//! The multistep sampler of latent consistency models.

use crate::coefficients::StepCoefficients;
use crate::noise_schedule::{NoiseSchedule, Scale};
use crate::sampler::Sampler;

/// Predicts clean data and adds fresh noise for the next timestep.
///
/// The last step, to timestep -1, returns the clean data unchanged, independent of the schedule's final
/// `alpha_cumprod`. Algorithm 3 of [Luo et al. 2023](https://arxiv.org/abs/2310.04378); also the stochastic sampler of
/// DMD2.
#[derive(Clone, Debug)]
pub struct Lcm {
    schedule: NoiseSchedule,
}

impl Lcm {
    /// The sampler on `schedule`.
    pub fn new(schedule: NoiseSchedule) -> Self {
        Self { schedule }
    }
}

impl Sampler for Lcm {
    /// `x_prev = alpha_prev x0 + sigma_prev noise`.
    fn coefficients(&self, _: Scale, prev: Scale) -> StepCoefficients {
        StepCoefficients { x0: prev.alpha, epsilon: 0.0, noise: prev.sigma }
    }

    fn needs_noise(&self) -> bool {
        true
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }

    /// Clean data, independent of the schedule's final `alpha_cumprod`.
    fn end(&self) -> Scale {
        Scale::CLEAN
    }
}
