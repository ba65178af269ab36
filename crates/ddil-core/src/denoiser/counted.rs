//! Counts evaluations of a network.

use std::cell::Cell;

use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction};
use tch::Tensor;

use super::Denoiser;
use crate::conditioning::Conditioning;
use crate::error::Result;

/// A denoiser that counts the samples it evaluates.
pub(crate) struct Counted<D> {
    inner: D,
    evaluations: Cell<u64>,
}

impl<D: Denoiser> Counted<D> {
    pub(crate) fn new(inner: D) -> Self {
        Self { inner, evaluations: Cell::new(0) }
    }

    fn count(&self, x_t: &Tensor) {
        let batch = x_t.size().first().map_or(0, |n| *n as u64);
        self.evaluations.set(self.evaluations.get() + batch);
    }

    /// Number of samples so far, over all calls.
    pub(crate) fn evaluations(&self) -> u64 {
        self.evaluations.get()
    }
}

impl<D: Denoiser> Denoiser for Counted<D> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        self.count(x_t);
        self.inner.predict(x_t, timesteps, conditioning)
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        self.count(x_t);
        self.inner.estimate(x_t, level, conditioning)
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}
