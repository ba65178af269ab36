//! DDIM, deterministic or with part of the noise replaced.

use ddil_files::Invalid;

use crate::coefficients::StepCoefficients;
use crate::error::{Error, Result};
use crate::noise_schedule::{NoiseSchedule, Scale};
use crate::sampler::Sampler;

/// The sampler of [Song et al. 2021](https://arxiv.org/abs/2010.02502).
#[derive(Clone, Debug)]
pub struct Ddim {
    schedule: NoiseSchedule,
    eta: f64,
}

impl Ddim {
    /// The deterministic sampler, `eta = 0`.
    pub fn new(schedule: NoiseSchedule) -> Self {
        Self { schedule, eta: 0.0 }
    }

    /// With a fraction `eta` of the noise replaced at each step: 0 is deterministic, 1 is DDPM's ancestral sampler.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `eta` is in 0..=1.
    pub fn with_eta(schedule: NoiseSchedule, eta: f64) -> Result<Self> {
        if (0.0..=1.0).contains(&eta) {
            return Ok(Self { schedule, eta });
        }
        let expected = "in 0..=1".to_owned();
        Err(Error::Invalid(Invalid::new("sampler.eta", eta, expected)))
    }

    /// The fraction of the noise that a step replaces.
    pub fn eta(&self) -> f64 {
        self.eta
    }
}

impl Sampler for Ddim {
    /// `x_prev = alpha_prev x0 + sqrt(sigma_prev² - s²) epsilon + s noise`, equation 12 of the paper, with
    /// `s = eta sigma_prev sqrt(1 - snr / snr_prev)`.
    fn coefficients(&self, now: Scale, prev: Scale) -> StepCoefficients {
        // The square root of the ratio, in a form that stays finite at the clean end.
        let ratio = (now.alpha * prev.sigma) / (now.sigma * prev.alpha);
        let noise = self.eta * prev.sigma * (1.0 - ratio.powi(2)).max(0.0).sqrt();
        let epsilon = (prev.sigma.powi(2) - noise.powi(2)).max(0.0).sqrt();
        StepCoefficients { x0: prev.alpha, epsilon, noise }
    }

    fn needs_noise(&self) -> bool {
        self.eta > 0.0
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

/// The step with `eta = 0`: both parts of the prediction at the noise level `prev`.
pub(crate) fn deterministic(prev: Scale) -> StepCoefficients {
    StepCoefficients { x0: prev.alpha, epsilon: prev.sigma, noise: 0.0 }
}
