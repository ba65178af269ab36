//! What a network can be asked.

mod clip_meter;
mod closure;
mod consistent;
mod counted;
mod guided;
mod thresholded;

pub use clip_meter::{ClipMeter, ClippedFraction};
pub use closure::FnDenoiser;
pub use consistent::Consistent;
pub(crate) use counted::Counted;
pub use guided::{Guided, GuidedByWeight};
pub use thresholded::Thresholded;

use ddil_schedulers::{NoiseSchedule, Prediction};
use tch::Tensor;

use crate::conditioning::Conditioning;
use crate::error::Result;

/// Tells clean data and noise of a noisy batch apart: a teacher, a student, a closed form.
///
/// Guidance, the consistency boundary and thresholding are denoisers around a denoiser ([`Guided`], [`Consistent`],
/// [`Thresholded`]), so that rollout and loss cannot disagree about them.
pub trait Denoiser {
    /// What makes up `x_t`.
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
    /// [`Error::Network`](crate::Error::Network) or
    /// [`Error::ConditioningMissing`](crate::Error::ConditioningMissing) if the network cannot answer.
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction>;

    /// The schedule that the network was trained on.
    fn schedule(&self) -> &NoiseSchedule;
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

    fn schedule(&self) -> &NoiseSchedule {
        (**self).schedule()
    }
}

/// Tells noised samples of a student from noised data.
///
/// [Yin et al. 2024](https://arxiv.org/abs/2405.14867), section 4.3: a head on features of the network that follows
/// the student's law, asked at every noise level.
pub trait Discriminator {
    /// How much more likely each sample is real than made, as a logit.
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
