//! Steps of a sampler, for a batch with mixed timesteps and for a batch at one timestep.

use ddil_libtorch::{ArgumentError, ensure_same_shape};
use tch::Tensor;

use crate::coefficients::StepCoefficients;
use crate::error::{Error, Result};
use crate::estimate::Estimate;
use crate::noise_schedule::{NoiseSchedule, Scale};
use crate::prediction::Prediction;

/// The arguments of [`Sampler::step`]: a batch whose samples may be at different timesteps.
///
/// Timesteps are host numbers, so that a step on a GPU does not synchronise and a timestep off the grid is rejected
/// before any computation.
#[derive(Clone, Copy, Debug)]
pub struct SamplerStep<'a> {
    /// The prediction for the batch, `[batch, ..]`.
    pub prediction: &'a Prediction,
    /// The training timestep of each sample.
    pub timesteps: &'a [i64],
    /// The timestep to which each sample moves; -1 is clean data.
    pub prev_timesteps: &'a [i64],
    /// Fresh unit noise of the shape of `x0`, for samplers that need it.
    pub noise: Option<&'a Tensor>,
}

impl<'a> SamplerStep<'a> {
    /// A step without fresh noise.
    pub fn new(
        prediction: &'a Prediction,
        timesteps: &'a [i64],
        prev_timesteps: &'a [i64],
    ) -> Self {
        Self { prediction, timesteps, prev_timesteps, noise: None }
    }

    /// The same step with fresh noise.
    #[must_use]
    pub fn with_noise(self, noise: &'a Tensor) -> Self {
        Self { noise: Some(noise), ..self }
    }

    /// Checks shapes and the number of timesteps.
    fn ensure(&self, op: &'static str) -> Result<()> {
        let Prediction { x0, epsilon } = self.prediction;
        ensure_same_shape(op, ("x0", x0), ("epsilon", epsilon))?;
        let batch = x0.size().first().map_or(0, |batch| *batch as usize);
        for (name, timesteps) in
            [("timesteps", self.timesteps), ("prev_timesteps", self.prev_timesteps)]
        {
            if timesteps.len() != batch || x0.dim() == 0 {
                let shape = vec![timesteps.len() as i64];
                let expected = format!("[{batch}], one timestep per sample");
                return Err(ArgumentError::Shape { op, name, shape, expected }.into());
            }
        }
        Ok(())
    }
}

/// Moves a batch to less noisy timesteps. It does not draw noise or call a network.
///
/// A sampler is three numbers per step, its [`coefficients`](Self::coefficients); both kinds of step follow from them.
/// [`step_at`](Self::step_at) is for a batch at one timestep and makes one pass over memory if possible;
/// [`step`](Self::step) is for a batch with mixed timesteps.
///
/// # Example
///
/// A custom sampler that keeps half of the predicted noise power and replaces the rest by fresh noise:
///
/// ```
/// use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Sampler, Scale, StepCoefficients};
///
/// #[derive(Debug)]
/// struct Half(NoiseSchedule);
///
/// impl Sampler for Half {
///     fn coefficients(&self, _: Scale, prev: Scale) -> StepCoefficients {
///         let share = prev.sigma * 0.5_f64.sqrt();
///         StepCoefficients { x0: prev.alpha, epsilon: share, noise: share }
///     }
///
///     fn needs_noise(&self) -> bool {
///         true
///     }
///
///     fn schedule(&self) -> &NoiseSchedule {
///         &self.0
///     }
/// }
///
/// let sampler = Half(NoiseScheduleConfig::default().build()?);
/// let to_clean_data = sampler.coefficients_at(249, -1)?;
/// assert_eq!((to_clean_data.x0, to_clean_data.noise), (1.0, 0.0));
/// # Ok::<(), ddil_schedulers::Error>(())
/// ```
pub trait Sampler: std::fmt::Debug + Send + Sync {
    /// The weights of a step from one noise level to a lower one.
    fn coefficients(&self, now: Scale, prev: Scale) -> StepCoefficients;

    /// Whether any step needs fresh noise.
    fn needs_noise(&self) -> bool;

    /// The schedule of the steps.
    fn schedule(&self) -> &NoiseSchedule;

    /// The noise level at the end of a step to timestep -1; by default that of the schedule.
    fn end(&self) -> Scale {
        self.schedule().end()
    }

    /// The weights of a step between two timesteps; -1 is clean data.
    ///
    /// # Errors
    ///
    /// [`Error::TimestepOutOfRange`] if one is off the training grid.
    fn coefficients_at(&self, timestep: i64, prev_timestep: i64) -> Result<StepCoefficients> {
        let now = self.schedule().scale_at(timestep)?;
        let prev = if prev_timestep == -1 {
            self.end()
        } else {
            self.schedule().scale_at(prev_timestep)?
        };
        Ok(self.coefficients(now, prev))
    }

    /// The state of each sample at its previous timestep, in the shape and kind of `step.prediction.x0`.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if the tensors of the step differ in shape or there is not one timestep per sample,
    /// [`Error::NoiseMissing`] if the step needs noise and has none, [`Error::TimestepOutOfRange`].
    fn step(&self, step: &SamplerStep<'_>) -> Result<Tensor> {
        const OP: &str = "Sampler::step";
        step.ensure(OP)?;
        let pairs = step.timesteps.iter().zip(step.prev_timesteps);
        let coefficients = pairs
            .map(|(&timestep, &prev)| self.coefficients_at(timestep, prev))
            .collect::<Result<Vec<_>>>()?;
        let Prediction { x0, epsilon } = step.prediction;
        let terms: [(Option<&Tensor>, Weight); 3] =
            [(Some(x0), |c| c.x0), (Some(epsilon), |c| c.epsilon), (step.noise, |c| c.noise)];
        let mut sum: Option<Tensor> = None;
        for (tensor, weight) in terms {
            let weights: Vec<f64> = coefficients.iter().map(weight).collect();
            if weights.iter().all(|weight| *weight == 0.0) {
                continue;
            }
            let tensor = tensor.ok_or(Error::NoiseMissing { op: OP, argument: "noise" })?;
            ensure_same_shape(OP, ("x0", x0), ("noise", tensor))?;
            let term = per_sample(&weights, x0) * tensor;
            sum = Some(match sum {
                Some(sum) => sum + term,
                None => term,
            });
        }
        Ok(sum.unwrap_or_else(|| x0.zeros_like()))
    }

    /// The state of a batch at one timestep after a step to `prev_timestep`.
    ///
    /// One pass over memory, with weights computed in `f64`. If the estimate is thresholded by channel, by quantile or
    /// by reflection, `x0` is computed separately. The memory of `x_t` is reused if it is not shared and no gradients
    /// are recorded; pass `x_t.shallow_clone()` to keep the state.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, ..]`, the state of the estimate
    /// - `noise`: the same shape, unit normal; read only if the step's [`coefficients`](Self::coefficients_at) need it
    /// - returns: the same shape, `Float` or `Double`
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if the tensors differ in shape, [`Error::NoiseMissing`], [`Error::TimestepOutOfRange`]; as
    /// [`Thresholding::apply`](crate::Thresholding::apply).
    fn step_at(
        &self,
        x_t: Tensor,
        estimate: &Estimate,
        prev_timestep: i64,
        noise: Option<&Tensor>,
    ) -> Result<Tensor> {
        estimate.step(x_t, self.coefficients_at(estimate.timestep(), prev_timestep)?, noise)
    }
}

/// Selects one of the coefficients.
type Weight = fn(&StepCoefficients) -> f64;

/// One number per sample, reshaped and cast to broadcast against `like`.
fn per_sample(values: &[f64], like: &Tensor) -> Tensor {
    let mut shape = vec![1; like.dim()];
    shape[0] = -1;
    // Cast on the host; the copy is asynchronous.
    let values = Tensor::from_slice(values).to_kind(like.kind());
    values.to_device_(like.device(), like.kind(), true, false).view(shape.as_slice())
}
