//! One step of a sampler.

use ddil_libtorch::ensure_same_shape;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::noise_schedule::NoiseSchedule;
use crate::prediction::Prediction;

/// What a sampler is told for one step.
#[derive(Clone, Copy, Debug)]
pub struct SamplerStep<'a> {
    /// What the network says of the batch, `[batch, ..]`.
    pub prediction: &'a Prediction,
    /// Where the batch is, `[batch]`, `Int64`, in training timesteps.
    pub timesteps: &'a Tensor,
    /// Where it goes, `[batch]`, `Int64`; -1 is clean data.
    pub prev_timesteps: &'a Tensor,
    /// Fresh unit noise of the shape of `x0`, for samplers that need some.
    pub noise: Option<&'a Tensor>,
}

impl<'a> SamplerStep<'a> {
    /// A step without fresh noise.
    pub fn new(
        prediction: &'a Prediction,
        timesteps: &'a Tensor,
        prev_timesteps: &'a Tensor,
    ) -> Self {
        Self { prediction, timesteps, prev_timesteps, noise: None }
    }

    /// The same step with fresh noise.
    #[must_use]
    pub fn with_noise(self, noise: &'a Tensor) -> Self {
        Self { noise: Some(noise), ..self }
    }

    /// Checks shapes, and that there is noise where the sampler needs some.
    pub(crate) fn ensure(&self, op: &'static str, needs_noise: bool) -> Result<()> {
        let Prediction { x0, epsilon } = self.prediction;
        ensure_same_shape(op, ("x0", x0), ("epsilon", epsilon))?;
        match self.noise {
            None if needs_noise => Err(Error::NoiseMissing { op }),
            Some(noise) if needs_noise => Ok(ensure_same_shape(op, ("x0", x0), ("noise", noise))?),
            _ => Ok(()),
        }
    }
}

/// Moves a batch to less noisy timesteps. Draws no noise and calls no network.
pub trait Sampler: std::fmt::Debug + Send + Sync {
    /// The state at `prev_timesteps`, of the shape and kind of `step.prediction.x0`.
    ///
    /// # Errors
    ///
    /// [`ArgumentError::ShapeMismatch`](ddil_libtorch::ArgumentError::ShapeMismatch) if the tensors of the step differ in shape, [`Error::NoiseMissing`] if
    /// [`needs_noise`](Self::needs_noise) and there is none; as [`NoiseSchedule::scales_at`] for the timesteps.
    fn step(&self, step: &SamplerStep<'_>) -> Result<Tensor>;

    /// Whether a step wants fresh noise.
    fn needs_noise(&self) -> bool;

    /// The schedule that the steps follow.
    fn schedule(&self) -> &NoiseSchedule;
}
