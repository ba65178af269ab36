//! Classifier-free guidance.

use ddil_schedulers::{NoiseSchedule, Prediction};
use tch::Tensor;

use super::Denoiser;
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};

/// A denoiser pushed away from what it would say without the condition.
///
/// `uncond + guidance_scale (cond - uncond)`, [Ho and Salimans 2022](https://arxiv.org/abs/2207.12598) in the
/// convention of diffusers: 1 is off, 0 is unconditional. Both answers come from one call on a batch of twice the
/// size. `x0` and `epsilon` are both affine in the network's output, so guiding the pair is guiding the output.
#[derive(Debug)]
pub struct Guided<D> {
    inner: D,
    guidance_scale: f64,
    null: Conditioning,
}

impl<D: Denoiser> Guided<D> {
    /// `null` is what the network is told for "no condition": parts of one row each (the null class, the
    /// embedding of an empty prompt), the same parts as the conditions themselves.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] if `guidance_scale` is not finite or negative; [`Error::Conditioning`] if `null`
    /// does not have one row.
    pub fn new(inner: D, guidance_scale: f64, null: Conditioning) -> Result<Self> {
        if !(guidance_scale.is_finite() && guidance_scale >= 0.0) {
            return Err(Error::InvalidConfig {
                field: "guidance_scale",
                value: guidance_scale.to_string(),
                expected: "finite and at least 0; 1 is no guidance".to_owned(),
            });
        }
        null.ensure_batch("Guided::new", 1)?;
        Ok(Self { inner, guidance_scale, null })
    }

    /// The guidance scale; 1 is off.
    pub fn guidance_scale(&self) -> f64 {
        self.guidance_scale
    }
}

impl<D: Denoiser> Denoiser for Guided<D> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        const OP: &str = "Guided::predict";
        if (self.guidance_scale - 1.0).abs() < f64::EPSILON {
            return self.inner.predict(x_t, timesteps, conditioning);
        }
        let batch = x_t.size().first().copied().unwrap_or(0);
        conditioning.ensure_batch(OP, batch)?;
        let rows = Tensor::zeros([batch], (tch::Kind::Int64, x_t.device()));
        let null = self.null.index_select(&rows)?.to_device(x_t.device())?;
        let both = Conditioning::cat(&[conditioning, &null])?;
        let twice = |t: &Tensor| Tensor::f_cat(&[t, t], 0).map_err(Error::torch(OP));
        let answer = self.inner.predict(&twice(x_t)?, &twice(timesteps)?, &both)?;
        let guide = |both: &Tensor| {
            let (cond, uncond) = (both.narrow(0, 0, batch), both.narrow(0, batch, batch));
            uncond.lerp(&cond, self.guidance_scale)
        };
        Ok(Prediction { x0: guide(&answer.x0), epsilon: guide(&answer.epsilon) })
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}
