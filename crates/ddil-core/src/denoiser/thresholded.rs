//! Clean data held inside their range.

use ddil_schedulers::{NoiseSchedule, Prediction, Thresholding};
use tch::Tensor;

use super::Denoiser;
use crate::conditioning::Conditioning;
use crate::error::Result;

/// A denoiser whose `x0` is held inside the data's range, and whose `epsilon` is recomputed from it.
///
/// Goes outside of guidance: it is the guided estimate that leaves the range. Not for the student inside a loss:
/// there is no gradient beyond the range, where the correction is wanted most.
#[derive(Debug)]
pub struct Thresholded<D> {
    inner: D,
    thresholding: Thresholding,
}

impl<D: Denoiser> Thresholded<D> {
    /// # Errors
    ///
    /// As [`Thresholding::ensure`] for the settings.
    pub fn new(inner: D, thresholding: Thresholding) -> Result<Self> {
        thresholding.ensure()?;
        Ok(Self { inner, thresholding })
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
        Ok(raw.thresholded(&self.thresholding, self.schedule(), x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}
