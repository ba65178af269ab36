//! A network that costs nothing, so that only the sampler is timed.

use ddil_core::{Conditioning, Denoiser};
use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction, PredictionType};
use tch::{Device, Kind, Tensor};

/// A denoiser over a network that returns the same noise, whatever its input.
#[derive(Debug)]
pub struct Free {
    schedule: NoiseSchedule,
    output: Tensor,
}

impl Free {
    /// A network for batches of the given shape, with random output.
    pub fn new(schedule: NoiseSchedule, shape: [i64; 4], device: Device) -> Self {
        Self { schedule, output: Tensor::randn(shape, (Kind::Float, device)) }
    }

    /// The output of every call.
    pub fn output(&self) -> &Tensor {
        &self.output
    }
}

impl Denoiser for Free {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        _: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        Ok(PredictionType::Epsilon.convert(&self.schedule, &self.output, x_t, timesteps)?)
    }

    fn estimate(
        &self,
        _: &Tensor,
        level: NoiseLevel,
        _: &Conditioning,
    ) -> ddil_core::Result<Estimate> {
        let output = self.output.shallow_clone();
        Ok(Estimate::at_level(&self.schedule, PredictionType::Epsilon, output, level)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}
