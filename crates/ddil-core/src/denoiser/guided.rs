//! Classifier-free guidance.

use ddil_files::Invalid;
use ddil_libtorch::{ensure_dense, ensure_real};
use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction};
use tch::{Kind, Tensor};

use super::Denoiser;
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};

/// A denoiser with classifier-free guidance.
///
/// `uncond + guidance_scale (cond - uncond)`, [Ho and Salimans 2022](https://arxiv.org/abs/2207.12598) in the
/// convention of diffusers: 1 is off, 0 is unconditional. Both outputs come from one call on a batch of twice the size.
/// `x0` and `epsilon` are both affine in the network's output, so guiding the pair is equivalent to guiding the output.
#[derive(Debug)]
pub struct Guided<D> {
    inner: D,
    guidance_scale: f64,
    null: Conditioning,
}

impl<D: Denoiser> Guided<D> {
    /// `null` is the network's input for "no condition": parts of one row each (the null class, the embedding of an
    /// empty prompt), the same parts as the conditions have. If it has no `time_ids`, those of each condition are used
    /// for both outputs.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if `guidance_scale` is not finite or negative; [`Error::Conditioning`] if `null` does not
    /// have one row.
    pub fn new(inner: D, guidance_scale: f64, null: Conditioning) -> Result<Self> {
        if !(guidance_scale.is_finite() && guidance_scale >= 0.0) {
            return Err(Error::Invalid(Invalid::new(
                "guidance_scale",
                guidance_scale,
                "finite and at least 0; 1 is no guidance",
            )));
        }
        null.ensure_batch("Guided::new", 1)?;
        Ok(Self { inner, guidance_scale, null })
    }

    fn is_off(&self) -> bool {
        (self.guidance_scale - 1.0).abs() < f64::EPSILON
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
        if self.is_off() {
            return self.inner.predict(x_t, timesteps, conditioning);
        }
        let both = Both::new(OP, x_t, conditioning, &self.null)?;
        both.predict(OP, &self.inner, timesteps, |cond, uncond| {
            uncond.lerp(cond, self.guidance_scale)
        })
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        if self.is_off() {
            return self.inner.estimate(x_t, level, conditioning);
        }
        let both = Both::new("Guided::estimate", x_t, conditioning, &self.null)?;
        both.estimate(&self.inner, level, |cond, uncond| uncond.lerp(cond, self.guidance_scale))
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}

/// A denoiser with a guidance weight per sample: `cond + w (cond - uncond)`.
///
/// `w` is `guidance_weight` of the conditioning, `w = guidance_scale - 1`: 0 is off, -1 is unconditional. This is the
/// guidance of a latent consistency model's teacher, equation 13 of [Luo et al.
/// 2023](https://arxiv.org/abs/2310.04378): each trajectory has a random weight, which is also an input of the student.
/// The wrapped network does not receive it, as it was not trained with one. Each call evaluates a batch of twice the
/// size, whatever the weights are: reading them would wait for the device.
///
/// # Shapes and units
///
/// - `conditioning.guidance_weight`: `[batch]`
///
/// # Errors
///
/// [`Error::ConditioningMissing`] if there is no weight.
#[derive(Debug)]
pub struct GuidedByWeight<D> {
    inner: D,
    null: Conditioning,
}

impl<D: Denoiser> GuidedByWeight<D> {
    /// `null` is the network's input for "no condition", as in [`Guided::new`]: one row, without a weight.
    ///
    /// # Errors
    ///
    /// [`Error::Conditioning`] if `null` does not have one row, or has a weight.
    pub fn new(inner: D, null: Conditioning) -> Result<Self> {
        const OP: &str = "GuidedByWeight::new";
        null.ensure_batch(OP, 1)?;
        if null.get(Conditioning::GUIDANCE_WEIGHT).is_some() {
            let problem = "is part of the null conditioning; expected it only in the conditioning of each call".to_owned();
            return Err(Error::Conditioning {
                op: OP,
                field: Conditioning::GUIDANCE_WEIGHT.to_owned(),
                problem,
            });
        }
        Ok(Self { inner, null })
    }
}

impl<D> GuidedByWeight<D> {
    /// The input of the wrapped network, and the guidance scale of each sample.
    fn inputs(
        &self,
        op: &'static str,
        x_t: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<(Both, Tensor)> {
        let Some(weight) = conditioning.get(Conditioning::GUIDANCE_WEIGHT) else {
            return Err(Error::ConditioningMissing {
                network: "a denoiser guided by the weight of each sample".to_owned(),
                field: Conditioning::GUIDANCE_WEIGHT,
            });
        };
        ensure_real(op, "x_t", x_t)?;
        ensure_real(op, "guidance_weight", weight)?;
        let batch = x_t.size().first().copied().unwrap_or(0);
        if weight.size() != [batch] {
            let problem = format!("has shape {:?}; expected [{batch}]", weight.size());
            let field = Conditioning::GUIDANCE_WEIGHT.to_owned();
            return Err(Error::Conditioning { op, field, problem });
        }
        let condition = conditioning.shallow_clone().without(Conditioning::GUIDANCE_WEIGHT);
        let mut shape = vec![1; x_t.dim()];
        shape[0] = -1;
        let scale: Tensor = weight.to_device(x_t.device()).to_kind(Kind::Float) + 1.0;
        Ok((Both::new(op, x_t, &condition, &self.null)?, scale.view(shape.as_slice())))
    }
}

impl<D: Denoiser> Denoiser for GuidedByWeight<D> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        const OP: &str = "GuidedByWeight::predict";
        let (both, scale) = self.inputs(OP, x_t, conditioning)?;
        both.predict(OP, &self.inner, timesteps, |cond, uncond| {
            uncond.lerp_tensor(cond, &scale.to_kind(cond.kind()))
        })
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        let (both, scale) = self.inputs("GuidedByWeight::estimate", x_t, conditioning)?;
        both.estimate(&self.inner, level, |cond, uncond| {
            uncond.lerp_tensor(cond, &scale.to_kind(cond.kind()))
        })
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}

/// A batch twice, once with its conditions and once without: the input of one call for both outputs.
struct Both {
    x_t: Tensor,
    conditioning: Conditioning,
    batch: i64,
}

impl Both {
    fn new(
        op: &'static str,
        x_t: &Tensor,
        conditioning: &Conditioning,
        null: &Conditioning,
    ) -> Result<Self> {
        ensure_real(op, "x_t", x_t)?;
        let batch = x_t.size().first().copied().unwrap_or(0);
        conditioning.ensure_batch(op, batch)?;
        let rows = Tensor::zeros([batch], (Kind::Int64, x_t.device()));
        let mut null = null.index_select(&rows)?.to_device(x_t.device())?;
        if null.get(Conditioning::TIME_IDS).is_none() {
            // The size of an image is not a condition to guide away from: both outputs have the same size.
            let sizes = conditioning.get(Conditioning::TIME_IDS).map(Tensor::shallow_clone);
            null = null.with_some(Conditioning::TIME_IDS, sizes);
        }
        let conditioning = Conditioning::cat(&[conditioning, &null])?;
        Ok(Self { x_t: twice(op, x_t)?, conditioning, batch })
    }

    /// Combines the predictions with and without conditions.
    fn predict(
        &self,
        op: &'static str,
        inner: &dyn Denoiser,
        timesteps: &Tensor,
        combine: impl Fn(&Tensor, &Tensor) -> Tensor,
    ) -> Result<Prediction> {
        ensure_dense(op, "timesteps", timesteps)?;
        let output = inner.predict(&self.x_t, &twice(op, timesteps)?, &self.conditioning)?;
        let combine = self.of_halves(combine);
        Ok(Prediction { x0: combine(&output.x0), epsilon: combine(&output.epsilon) })
    }

    /// The same for a batch at one noise level.
    fn estimate(
        &self,
        inner: &dyn Denoiser,
        level: NoiseLevel,
        combine: impl Fn(&Tensor, &Tensor) -> Tensor,
    ) -> Result<Estimate> {
        let output = inner.estimate(&self.x_t, level, &self.conditioning)?;
        Ok(output.combined(&self.x_t, self.of_halves(combine))?)
    }

    fn of_halves(
        &self,
        combine: impl Fn(&Tensor, &Tensor) -> Tensor,
    ) -> impl Fn(&Tensor) -> Tensor {
        let batch = self.batch;
        move |both| combine(&both.narrow(0, 0, batch), &both.narrow(0, batch, batch))
    }
}

fn twice(op: &'static str, tensor: &Tensor) -> Result<Tensor> {
    Tensor::f_cat(&[tensor, tensor], 0).map_err(Error::torch(op))
}
