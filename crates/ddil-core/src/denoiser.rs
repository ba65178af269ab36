//! The interface of networks.

mod clip_meter;
mod closure;
mod consistent;
mod counted;
mod guided;
mod mixture;
mod thresholded;

pub use clip_meter::{ClipMeter, ClippedFraction};
pub use closure::FnDenoiser;
pub use consistent::{Consistent, with_boundary};
pub(crate) use counted::Counted;
pub use guided::{Guided, GuidedByWeight};
pub use mixture::{GaussianMixture, MixtureDenoiser};
pub use thresholded::Thresholded;

use ddil_libtorch::ensure_real;
use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction};
use tch::{Kind, Tensor};

use crate::conditioning::Conditioning;
use crate::error::Result;

/// Predicts the clean data and the noise in a noisy batch: a teacher, a student, a closed form.
///
/// Guidance, the consistency boundary and thresholding are denoisers that wrap another ([`Guided`], [`Consistent`],
/// [`Thresholded`]), so that rollout and loss always use the same ones.
pub trait Denoiser {
    /// The clean data and the noise in `x_t`.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, ..]`, any rank from 2, data scale times `alpha` plus noise
    /// - `timesteps`: `[batch]`, `Int64`, in training timesteps
    /// - `conditioning`: parts of `batch` rows each
    /// - returns: two tensors of the shape of `x_t`, with a graph behind them if gradients are on and the network
    ///   is trainable
    ///
    /// # Errors
    ///
    /// [`Error::Network`](crate::Error::Network) or [`Error::ConditioningMissing`](crate::Error::ConditioningMissing)
    /// if the network fails.
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction>;

    /// The same for a batch at one noise level, computed as far as a sampler's step needs it; called by rollouts.
    ///
    /// By default, [`predict`](Self::predict) with the timestep repeated, for levels of the training grid. A denoiser
    /// over a network returns the network's raw output instead ([`Estimate::at_level`]), at any level, and a wrapper
    /// passes it on, so that output, guidance, thresholding and step take one pass over memory.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`, `conditioning`: as for [`predict`](Self::predict)
    /// - `level`: of the training grid ([`NoiseSchedule::level_at`]), or one that a solver has between two timesteps
    ///
    /// # Errors
    ///
    /// As [`predict`](Self::predict); [`Error::Scheduler`](crate::Error::Scheduler) for a level that the denoiser is not
    /// defined at.
    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        let timestep = self.schedule().timestep_of(level)?;
        let prediction = self.predict(x_t, &repeated_timestep(timestep, x_t)?, conditioning)?;
        Ok(Estimate::of_prediction(self.schedule(), prediction, timestep)?)
    }

    /// The schedule that the network was trained on.
    fn schedule(&self) -> &NoiseSchedule;
}

/// One timestep repeated for each sample of a batch, `[batch]`, `Int64`, on the device of `x_t`.
///
/// # Errors
///
/// [`Error::Argument`](crate::Error::Argument) for an undefined or sparse `x_t`, or one without real numbers.
pub fn repeated_timestep(timestep: i64, x_t: &Tensor) -> Result<Tensor> {
    ensure_real("Denoiser::estimate", "x_t", x_t)?;
    let batch = x_t.size().first().copied().unwrap_or(0);
    Ok(Tensor::full([batch], timestep, (Kind::Int64, x_t.device())))
}

/// The timestep of a level repeated for each sample of a batch: as [`repeated_timestep`], or `[batch]`, `Double`, for a
/// level between two timesteps.
///
/// # Errors
///
/// As [`repeated_timestep`].
pub fn repeated_level(level: NoiseLevel, x_t: &Tensor) -> Result<Tensor> {
    let nearest = repeated_timestep(level.nearest_timestep(), x_t)?;
    Ok(match level.whole_timestep() {
        Some(_) => nearest,
        None => nearest.to_kind(Kind::Double).fill_(level.timestep),
    })
}

impl<D: Denoiser + ?Sized> Denoiser for &D {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        (**self).predict(x_t, timesteps, conditioning)
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        (**self).estimate(x_t, level, conditioning)
    }

    fn schedule(&self) -> &NoiseSchedule {
        (**self).schedule()
    }
}

impl<D: Denoiser + ?Sized> Denoiser for Box<D> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        (**self).predict(x_t, timesteps, conditioning)
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> Result<Estimate> {
        (**self).estimate(x_t, level, conditioning)
    }

    fn schedule(&self) -> &NoiseSchedule {
        (**self).schedule()
    }
}

/// Distinguishes noised samples of a student from noised data.
///
/// [Yin et al. 2024](https://arxiv.org/abs/2405.14867), section 4.3: a head on features of the network that models the
/// student's distribution, evaluated at every noise level.
pub trait Discriminator {
    /// A logit per sample: how much more likely it is real than generated.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, ..]`, data scale times `alpha` plus noise
    /// - `timesteps`: `[batch]`, `Int64`, in training timesteps
    /// - `conditioning`: parts of `batch` rows each
    /// - returns: `[batch]`, positive for real, with a graph behind it if gradients are on
    ///
    /// # Errors
    ///
    /// As [`Denoiser::predict`].
    fn logits(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Tensor>;
}
