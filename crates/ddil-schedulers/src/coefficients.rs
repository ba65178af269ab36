//! The coefficients of a sampler's step.

use crate::noise_schedule::Scale;

/// A step as a weighted sum: `x_prev = x0 · x0 + epsilon · epsilon + noise · noise`.
///
/// Each field is the weight of the tensor of the same name; `noise` is fresh unit noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCoefficients {
    /// Weight of the predicted clean data.
    pub x0: f64,
    /// Weight of the predicted noise.
    pub epsilon: f64,
    /// Weight of fresh noise; 0 if the step needs none.
    pub noise: f64,
}

/// The same step with the predicted noise eliminated: `x_prev = x_t · x_t + x0 · x0 + noise · noise`.
///
/// Each field is the weight of the tensor of the same name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StateCoefficients {
    /// Weight of the state before the step.
    pub x_t: f64,
    /// Weight of the predicted clean data.
    pub x0: f64,
    /// Weight of fresh noise; 0 if the step needs none.
    pub noise: f64,
}

impl StepCoefficients {
    /// Replaces `epsilon` by `(x_t - alpha x0) / sigma`, with `alpha` and `sigma` of the step's first timestep.
    ///
    /// This form needs only the clean data. It is the solver's step in progressive and in consistency distillation, and
    /// the step from an `x0` that was thresholded.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_schedulers::{Ddim, NoiseScheduleConfig, Sampler};
    ///
    /// # fn main() -> ddil_schedulers::Result<()> {
    /// let schedule = NoiseScheduleConfig::default().build()?;
    /// let (now, prev) = (schedule.scale_at(749)?, schedule.scale_at(499)?);
    /// let step = Ddim::new(schedule).coefficients(now, prev).without_epsilon(now);
    /// assert_eq!(step.x_t, prev.sigma / now.sigma);
    /// assert_eq!(step.x0, prev.alpha - step.x_t * now.alpha);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn without_epsilon(self, now: Scale) -> StateCoefficients {
        // A sampler that renews all noise must not divide by sigma, which is 0 for clean data.
        let x_t = if self.epsilon == 0.0 { 0.0 } else { self.epsilon / now.sigma };
        StateCoefficients { x_t, x0: self.x0 - x_t * now.alpha, noise: self.noise }
    }
}
