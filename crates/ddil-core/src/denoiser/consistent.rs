//! The boundary condition of consistency models.

use ddil_schedulers::{
    ConsistencyBoundary, Estimate, NoiseLevel, NoiseSchedule, Prediction, SamplerConfig,
};
use tch::Tensor;

use super::Denoiser;
use crate::conditioning::Conditioning;
use crate::error::Result;

/// A denoiser that returns its input at timestep 0: `x0` becomes `c_out x0 + c_skip x_t`.
///
/// `epsilon` remains that of the network. Section 4.3 of [Luo et al. 2023](https://arxiv.org/abs/2310.04378).
#[derive(Debug)]
pub struct Consistent<D> {
    inner: D,
    boundary: ConsistencyBoundary,
}

impl<D: Denoiser> Consistent<D> {
    /// `inner`, wrapped in the scalings of `boundary`.
    pub fn new(inner: D, boundary: ConsistencyBoundary) -> Self {
        Self { inner, boundary }
    }
}

/// The denoiser used for sampling: wrapped in the boundary of the sampler, if it has one.
///
/// Wraps guidance and thresholding.
pub fn with_boundary<'a>(
    denoiser: impl Denoiser + 'a,
    sampler: &SamplerConfig,
) -> Box<dyn Denoiser + 'a> {
    match sampler.boundary() {
        Some(boundary) => Box::new(Consistent::new(denoiser, boundary)),
        None => Box::new(denoiser),
    }
}

impl<D: Denoiser> Denoiser for Consistent<D> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        let Prediction { x0, epsilon } = self.inner.predict(x_t, timesteps, conditioning)?;
        Ok(Prediction { x0: self.boundary.apply(&x0, x_t, timesteps)?, epsilon })
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        let inner = self.inner.estimate(x_t, level, conditioning)?;
        Ok(inner.with_boundary(self.boundary, x_t)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}
