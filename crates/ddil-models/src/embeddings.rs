//! What a network is told beside the sample: the timestep and the class.

use std::f64::consts::PI;

use tch::{Kind, TchError, Tensor};

use crate::error::Result;
use crate::layers::{Linear, Output};
use crate::parameters::{Init, Scope};

/// Standard deviation of the random frequencies of [`FourierProjection`].
const FOURIER_SCALE: f64 = 16.0;
/// Ratio of the longest to the shortest period of [`SinusoidalProjection`], over 2 pi.
const MAX_PERIOD: f64 = 10_000.0;

/// Sines and cosines of the timestep at fixed frequencies, no parameters.
///
/// With half = width / 2: `angle_j = t * exp(-ln(10000) * j / (half - freq_shift))` for j in 0..half, section 3.5 of
/// [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762).
#[derive(Clone, Copy, Debug)]
pub(crate) struct SinusoidalProjection {
    pub(crate) width: i64,
    pub(crate) cosines_first: bool,
    pub(crate) freq_shift: f64,
}

impl SinusoidalProjection {
    /// `[batch]` to `[batch, width]`, always `Float`: half precision cannot tell neighbouring timesteps apart.
    pub(crate) fn forward(&self, timesteps: &Tensor) -> Output {
        let half = self.width / 2;
        let exponent = Tensor::f_arange(half, (Kind::Float, timesteps.device()))?
            .f_mul_scalar(-MAX_PERIOD.ln())?
            .f_div_scalar(half as f64 - self.freq_shift)?;
        let frequencies = exponent.f_exp()?;
        let angles = timesteps
            .f_to_kind(Kind::Float)?
            .f_unsqueeze(1)?
            .f_mul(&frequencies.f_unsqueeze(0)?)?;
        let (sines, cosines) = (angles.f_sin()?, angles.f_cos()?);
        let features = if self.cosines_first {
            Tensor::f_cat(&[cosines, sines], 1)?
        } else {
            Tensor::f_cat(&[sines, cosines], 1)?
        };
        if self.width % 2 == 1 { features.f_constant_pad_nd([0, 1]) } else { Ok(features) }
    }
}

/// Sines and cosines of `2 pi w ln t` at random frequencies `w` that are drawn once and saved, for networks whose
/// timestep is a noise level; appendix C of [Song et al. 2020](https://arxiv.org/abs/2011.13456).
#[derive(Debug)]
pub(crate) struct FourierProjection {
    weight: Tensor,
}

impl FourierProjection {
    pub(crate) fn new(mut scope: Scope<'_>, frequencies: i64) -> Result<Self> {
        let init = Init::Normal { std: FOURIER_SCALE };
        Ok(Self { weight: scope.constant("weight", &[frequencies], init)? })
    }

    pub(crate) fn forward(&self, timesteps: &Tensor) -> Output {
        let angles = timesteps
            .f_log()?
            .f_unsqueeze(1)?
            .f_mul(&self.weight.f_unsqueeze(0)?)?
            .f_mul_scalar(2.0)?
            .f_mul_scalar(PI)?;
        Tensor::f_cat(&[angles.f_sin()?, angles.f_cos()?], 1)
    }
}

/// How the timestep becomes features.
#[derive(Debug)]
pub(crate) enum TimeProjection {
    Positional(SinusoidalProjection),
    Fourier(FourierProjection),
}

impl TimeProjection {
    pub(crate) fn forward(&self, timesteps: &Tensor) -> Output {
        match self {
            Self::Positional(projection) => projection.forward(timesteps),
            Self::Fourier(projection) => projection.forward(timesteps),
        }
    }
}

/// Two linear layers with a `silu` between them.
#[derive(Debug)]
pub(crate) struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimestepEmbedding {
    pub(crate) fn new(mut scope: Scope<'_>, inputs: i64, width: i64) -> Result<Self> {
        let linear_1 = Linear::new(scope.at("linear_1"), inputs, width)?;
        let linear_2 = Linear::new(scope.at("linear_2"), width, width)?;
        Ok(Self { linear_1, linear_2 })
    }

    pub(crate) fn forward(&self, features: &Tensor) -> Output {
        self.linear_2.forward(&self.linear_1.forward(features)?.f_silu()?)
    }
}

/// One timestep per sample: `[batch]` from `[batch]`, `[1]` or `[]`.
pub(crate) fn one_per_sample(
    timesteps: &Tensor,
    batch: i64,
) -> std::result::Result<Tensor, TchError> {
    timesteps.f_reshape([-1])?.f_expand([batch], false)
}
