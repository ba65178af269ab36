//! Embeddings of the timestep, the class and the guidance weight.

use std::f64::consts::PI;

use tch::{Kind, TchError, Tensor};

use crate::error::Result;
use crate::layers::{Activation, Linear, Output};
use crate::parameters::{Init, Joined, Scope, Share};

/// Standard deviation of the random frequencies of [`FourierProjection`].
const FOURIER_SCALE: f64 = 16.0;
/// Ratio of the longest to the shortest period of [`SinusoidalProjection`], over 2 pi.
const MAX_PERIOD: f64 = 10_000.0;
/// Factor of a guidance weight before its sines and cosines.
pub(crate) const GUIDANCE_SCALE: f64 = 1000.0;
/// The minimum width at which the frequencies of [`GuidanceProjection`] have a spacing.
pub(crate) const MIN_GUIDANCE_WIDTH: u32 = 4;

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
    /// `[batch]` to `[batch, width]`, always `Float`: half precision cannot distinguish neighbouring timesteps.
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

/// Sines and cosines of a guidance weight, no parameters.
///
/// With half = width / 2: `angle_j = 1000 w exp(-ln(10000) j / (half - 1))` for j in 0..half, sines first, as in the
/// networks of [Luo et al. 2023](https://arxiv.org/abs/2310.04378). The factor scales weights of order one to the
/// magnitude of timesteps, for which the frequencies were designed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuidanceProjection {
    /// At least [`MIN_GUIDANCE_WIDTH`].
    pub(crate) width: i64,
}

impl GuidanceProjection {
    /// `[batch]` to `[batch, width]`, always `Float`, with the same rounding as in diffusers: the sine of an angle in
    /// the thousands has only three correct digits, and a student trained on these values must receive the same ones in
    /// other programs.
    pub(crate) fn forward(self, weight: &Tensor) -> Output {
        let half = self.width / 2;
        let step = MAX_PERIOD.ln() as f32 / (half - 1) as f32;
        let frequencies = Tensor::f_arange(half, (Kind::Float, weight.device()))?
            .f_mul_scalar(-f64::from(step))?
            .f_exp()?;
        let angles = weight
            .f_to_kind(Kind::Float)?
            .f_mul_scalar(GUIDANCE_SCALE)?
            .f_unsqueeze(1)?
            .f_mul(&frequencies.f_unsqueeze(0)?)?;
        let features = Tensor::f_cat(&[angles.f_sin()?, angles.f_cos()?], 1)?;
        if self.width % 2 == 1 { features.f_constant_pad_nd([0, 1]) } else { Ok(features) }
    }
}

/// Sines and cosines, and a zero if the width is odd.
fn sinusoids(width: i64, axis: usize) -> Joined {
    Joined { axis, parts: vec![width / 2, width / 2, width % 2], share: Share::Spaced }
}

/// How the timestep becomes features.
#[derive(Debug)]
pub(crate) enum TimeProjection {
    Positional(SinusoidalProjection),
    Fourier(FourierProjection),
}

impl TimeProjection {
    /// The number of features.
    pub(crate) fn width(&self) -> i64 {
        match self {
            Self::Positional(projection) => projection.width,
            Self::Fourier(projection) => 2 * projection.weight.numel() as i64,
        }
    }

    /// The kinds of features along the axis of the parameter that takes them.
    fn joined(&self, axis: usize) -> Joined {
        match self {
            Self::Positional(projection) => sinusoids(projection.width, axis),
            // Random frequencies are saved, and a narrower network takes the first ones.
            Self::Fourier(_) => {
                Joined { axis, parts: vec![self.width() / 2; 2], share: Share::First }
            }
        }
    }

    pub(crate) fn forward(&self, timesteps: &Tensor) -> Output {
        match self {
            Self::Positional(projection) => projection.forward(timesteps),
            Self::Fourier(projection) => projection.forward(timesteps),
        }
    }
}

/// Two linear layers with an activation between them, `silu` by default.
#[derive(Debug)]
pub(crate) struct TimestepEmbedding {
    linear_1: Linear,
    activation: Activation,
    linear_2: Linear,
    last_activation: Option<Activation>,
}

impl TimestepEmbedding {
    pub(crate) fn new(mut scope: Scope<'_>, inputs: &TimeProjection, width: i64) -> Result<Self> {
        let embedding = Self::of_features(scope.reborrow(), inputs.width(), width)?;
        scope.mark("linear_1.weight", inputs.joined(1));
        Ok(embedding)
    }

    /// For features other than those of a timestep.
    pub(crate) fn of_features(mut scope: Scope<'_>, inputs: i64, width: i64) -> Result<Self> {
        let linear_1 = Linear::new(scope.at("linear_1"), inputs, width)?;
        let linear_2 = Linear::new(scope.at("linear_2"), width, width)?;
        Ok(Self { linear_1, activation: Activation::Silu, linear_2, last_activation: None })
    }

    /// The same with another activation between the layers, and one after them.
    pub(crate) fn with_activations(self, activation: Activation, last: Option<Activation>) -> Self {
        Self { activation, last_activation: last, ..self }
    }

    pub(crate) fn forward(&self, features: &Tensor) -> Output {
        let hidden = self.activation.forward(&self.linear_1.forward(features)?)?;
        let embedding = self.linear_2.forward(&hidden)?;
        self.last_activation.map_or(Ok(embedding.shallow_clone()), |last| last.forward(&embedding))
    }
}

/// A guidance weight added to the features of the timestep: `features + P embedding(w)`, without a bias.
///
/// Initialised to zero, so that a network with a new guidance input starts with the outputs of its original.
#[derive(Debug)]
pub(crate) struct GuidanceEmbedding {
    projection: GuidanceProjection,
    weight: Tensor,
}

impl GuidanceEmbedding {
    pub(crate) fn new(mut scope: Scope<'_>, width: i64, features: &TimeProjection) -> Result<Self> {
        let init = Init::Constant(0.0);
        let weight = scope.parameter("weight", &[features.width(), width], init)?;
        scope.mark("weight", features.joined(0));
        scope.mark("weight", sinusoids(width, 1));
        Ok(Self { projection: GuidanceProjection { width }, weight })
    }

    /// Adds the features of the weights, `[batch]`, to `[batch, features]`.
    pub(crate) fn forward(&self, features: &Tensor, guidance_weight: &Tensor) -> Output {
        let embedding = self.projection.forward(guidance_weight)?.f_to_kind(features.kind())?;
        features.f_add(&embedding.f_linear(&self.weight, None::<&Tensor>)?)
    }
}

/// One timestep per sample: `[batch]` from `[batch]`, `[1]` or `[]`.
pub(crate) fn one_per_sample(
    timesteps: &Tensor,
    batch: i64,
) -> std::result::Result<Tensor, TchError> {
    timesteps.f_reshape([-1])?.f_expand([batch], false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn embed(weight: f32, width: i64) -> Vec<f64> {
        let features = GuidanceProjection { width }.forward(&Tensor::from_slice(&[weight]));
        Vec::try_from(features.expect("a small tensor").view([-1]).to_kind(Kind::Double))
            .expect("a vector")
    }

    /// Recorded with diffusers 0.42.1: `get_guidance_scale_embedding(torch.tensor([7.5]), 256)`.
    #[test]
    fn a_guidance_weight_is_embedded_as_in_diffusers() {
        let found = embed(7.5, 256);
        let expected = [
            (0, -0.851_235_9),
            (1, 0.842_131_2),
            (2, 0.011_876_3),
            (126, 0.721_808_9),
            (127, 0.681_638_7),
            (128, -0.524_783_3),
            (129, 0.539_272_7),
            (130, -0.999_929_5),
            (254, 0.692_092_4),
            (255, 0.731_688_9),
        ];
        assert_eq!(found.len(), 256);
        for (i, value) in expected {
            assert!((found[i] - value).abs() < 2e-7, "{i}: {} and {value}", found[i]);
        }
    }

    /// Likewise, for `[1.0]` and width 5; and in closed form.
    #[test]
    fn odd_widths_end_in_zero() {
        let expected = [0.826_879_6, 0.099_833_4, 0.562_379_1, 0.995_004_2, 0.0];
        let closed_form = [1000_f64.sin(), 0.1_f64.sin(), 1000_f64.cos(), 0.1_f64.cos(), 0.0];
        for ((found, recorded), closed) in embed(1.0, 5).iter().zip(expected).zip(closed_form) {
            assert!((found - recorded).abs() < 1e-7);
            assert!((found - closed).abs() < 1e-4);
        }
    }
}
