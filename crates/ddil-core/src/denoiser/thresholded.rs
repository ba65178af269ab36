//! Clips clean data to a range.

use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction, Thresholding};
use tch::Tensor;

use super::{ClipMeter, Denoiser, repeated_timestep};
use crate::conditioning::Conditioning;
use crate::error::Result;

/// A denoiser whose `x0` is clipped to the range of the data, and whose `epsilon` is recomputed from it.
///
/// Wraps guidance: the guided estimate is the one that leaves the range. Do not use it for the student inside a loss:
/// the gradient is 0 beyond the range, where the correction is needed most.
#[derive(Debug)]
pub struct Thresholded<D> {
    inner: D,
    thresholding: Thresholding,
    meter: Option<ClipMeter>,
}

impl<D: Denoiser> Thresholded<D> {
    /// # Errors
    ///
    /// As [`Thresholding::ensure`] for the settings.
    pub fn new(inner: D, thresholding: Thresholding) -> Result<Self> {
        thresholding.ensure()?;
        Ok(Self { inner, thresholding, meter: None })
    }

    /// The same, with every call measured. Nothing is measured if nothing is thresholded.
    #[must_use]
    pub fn metered(self, meter: ClipMeter) -> Self {
        Self { meter: Some(meter), ..self }
    }
}

impl<D: Denoiser> Denoiser for Thresholded<D> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        let raw = self.inner.predict(x_t, timesteps, conditioning)?;
        if self.thresholding == Thresholding::None {
            return Ok(raw);
        }
        let raw_x0 = self.meter.as_ref().map(|meter| (meter, raw.x0.shallow_clone()));
        let held = raw.thresholded(&self.thresholding, self.schedule(), x_t, timesteps)?;
        if let Some((meter, raw_x0)) = raw_x0 {
            meter.measure(&self.thresholding, &raw_x0, timesteps)?;
        }
        Ok(held)
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        let raw = self.inner.estimate(x_t, level, conditioning)?;
        if self.thresholding == Thresholding::None {
            return Ok(raw);
        }
        if let Some(meter) = &self.meter {
            let timesteps = repeated_timestep(level.nearest_timestep(), x_t)?;
            meter.measure(&self.thresholding, &raw.x0(x_t)?, &timesteps)?;
        }
        Ok(raw.thresholded(&self.thresholding, x_t)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}
