//! DDIM, deterministic or with part of the noise renewed.

use ddil_files::Invalid;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::noise_schedule::{NoiseSchedule, Scale, Scales};
use crate::sampler::{Sampler, SamplerStep};

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

    /// With a share `eta` of the noise renewed at each step: 0 is deterministic, 1 is DDPM's ancestral sampler.
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

    /// The parts of a step from `now` to `prev` that go to the noise estimate and to fresh noise.
    pub(crate) fn noise_shares(&self, now: Scale, prev: Scale) -> (f64, f64) {
        let ratio = (now.alpha * prev.sigma) / (now.sigma * prev.alpha);
        let fresh = self.eta * prev.sigma * (1.0 - ratio.powi(2)).max(0.0).sqrt();
        ((prev.sigma.powi(2) - fresh.powi(2)).max(0.0).sqrt(), fresh)
    }

    /// The share of the noise that a step renews.
    pub fn eta(&self) -> f64 {
        self.eta
    }
}

impl Sampler for Ddim {
    /// `x_prev = alpha_prev x0 + sqrt(sigma_prev² - s²) epsilon + s noise`, equation 12 of the paper, with
    /// `s = eta sigma_prev sqrt(1 - snr / snr_prev)`.
    fn step(&self, step: &SamplerStep<'_>) -> Result<Tensor> {
        step.ensure("Ddim::step", self.needs_noise())?;
        let x0 = &step.prediction.x0;
        let prev = self.schedule.scales_at(step.prev_timesteps, x0)?;
        let Some(noise) = step.noise.filter(|_| self.needs_noise()) else {
            return Ok(prev.alpha * x0 + prev.sigma * &step.prediction.epsilon);
        };
        let now = self.schedule.scales_at(step.timesteps, x0)?;
        let fresh = renewed_sigma(self.eta, &now, &prev);
        let kept = (prev.sigma.square() - fresh.square()).clamp_min(0.0).sqrt();
        Ok(prev.alpha * x0 + kept * &step.prediction.epsilon + fresh * noise)
    }

    fn needs_noise(&self) -> bool {
        self.eta > 0.0
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

/// `eta sigma_prev sqrt(1 - snr / snr_prev)`, written without a ratio that is infinite at the clean end.
fn renewed_sigma(eta: f64, now: &Scales, prev: &Scales) -> Tensor {
    let ratio = (&now.alpha * &prev.sigma) / (&now.sigma * &prev.alpha);
    let lost: Tensor = 1.0 - ratio.square();
    eta * &prev.sigma * lost.clamp_min(0.0).sqrt()
}
