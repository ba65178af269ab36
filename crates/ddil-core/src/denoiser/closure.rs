//! A network given as a function.

use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction, PredictionType};
use tch::Tensor;

use super::{Denoiser, repeated_level};
use crate::conditioning::Conditioning;
use crate::error::Result;

/// A denoiser from a schedule and a function that computes a network's output.
///
/// For your own networks, if a type that implements [`Denoiser`] is not worth it.
///
/// # Example
///
/// ```
/// use ddil_core::{Conditioning, Denoiser, FnDenoiser};
/// use ddil_schedulers::{NoiseScheduleConfig, PredictionType};
/// use tch::nn::{self, Module};
/// use tch::{Device, Tensor, kind};
///
/// let weights = nn::VarStore::new(Device::Cpu);
/// let layer = nn::linear(weights.root(), 3, 2, nn::LinearConfig::default());
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let network = FnDenoiser::new(schedule, PredictionType::Epsilon, |x_t, timesteps, _conditioning| {
///     let time = timesteps.unsqueeze(1).to_kind(tch::Kind::Float) / 1000.0;
///     Ok(layer.forward(&Tensor::cat(&[x_t, &time], 1)))
/// });
///
/// let x_t = Tensor::zeros([4, 2], kind::FLOAT_CPU);
/// let timesteps = Tensor::from_slice(&[999_i64, 749, 499, 249]);
/// let prediction = network.predict(&x_t, &timesteps, &Conditioning::none())?;
/// assert_eq!(prediction.x0.size(), [4, 2]);
/// # Ok::<(), ddil_core::Error>(())
/// ```
#[derive(Clone)]
pub struct FnDenoiser<F> {
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    output: F,
}

impl<F> FnDenoiser<F>
where
    F: Fn(&Tensor, &Tensor, &Conditioning) -> Result<Tensor>,
{
    /// `output` computes the network's output from `x_t`, the timesteps and the conditioning, in the shapes of
    /// [`Denoiser::predict`]; `prediction_type` is the type of that output. A solver may have levels between two training
    /// timesteps: then the timesteps are `Double`.
    ///
    /// Errors of another type are wrapped by [`Error::network`](crate::Error::network).
    pub fn new(schedule: NoiseSchedule, prediction_type: PredictionType, output: F) -> Self {
        Self { schedule, prediction_type, output }
    }
}

impl<F> Denoiser for FnDenoiser<F>
where
    F: Fn(&Tensor, &Tensor, &Conditioning) -> Result<Tensor>,
{
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        let output = (self.output)(x_t, timesteps, conditioning)?;
        Ok(self.prediction_type.convert(&self.schedule, &output, x_t, timesteps)?)
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        let output = (self.output)(x_t, &repeated_level(level, x_t)?, conditioning)?;
        Ok(Estimate::at_level(&self.schedule, self.prediction_type, output, level)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

impl<F> std::fmt::Debug for FnDenoiser<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FnDenoiser")
            .field("schedule", &self.schedule)
            .field("prediction_type", &self.prediction_type)
            .finish_non_exhaustive()
    }
}
