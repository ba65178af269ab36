//! Prediction types: conversion of a network's output to clean data and noise.

use ddil_libtorch::{affine, ensure_same_shape};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::noise_schedule::{NoiseSchedule, NoiseScheduleConfig, Scale, Scales};
use crate::thresholding::Thresholding;

/// The quantity that a network was trained to predict; spelt as in published scheduler configs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PredictionType {
    /// The noise.
    #[serde(rename = "epsilon")]
    Epsilon,
    /// The clean data.
    #[serde(rename = "sample")]
    Sample,
    /// `v = alpha epsilon - sigma x0`, on variance-preserving schedules;
    /// [Salimans and Ho 2022](https://arxiv.org/abs/2202.00512).
    #[serde(rename = "v_prediction")]
    VPrediction,
    /// `u = epsilon - x0`, the velocity of flow matching.
    #[serde(rename = "flow_prediction")]
    Flow,
}

/// The predicted clean data and noise of a noisy sample, `x_t = alpha x0 + sigma epsilon`.
///
/// The common form for samplers, rollouts and losses: after [`PredictionType::convert`], nothing depends on the
/// network's prediction type.
#[derive(Debug)]
pub struct Prediction {
    /// Clean data, data scale, `[batch, ..]`.
    pub x0: Tensor,
    /// Noise, ideally unit normal, `[batch, ..]`.
    pub epsilon: Tensor,
}

impl Prediction {
    /// Completes a prediction of the clean data: `epsilon = (x_t - alpha x0) / sigma`.
    ///
    /// # Shapes and units
    ///
    /// - `x0`, `x_t`: `[batch, ..]`; `timesteps`: `[batch]`, `Int64`, not -1, where there is no noise
    ///
    /// # Errors
    ///
    /// [`ArgumentError::ShapeMismatch`](ddil_libtorch::ArgumentError::ShapeMismatch) if `x0` and `x_t` differ; as
    /// [`NoiseSchedule::scales_at`] for `timesteps`.
    pub fn from_x0(
        schedule: &NoiseSchedule,
        x0: Tensor,
        x_t: &Tensor,
        timesteps: &Tensor,
    ) -> Result<Self> {
        ensure_same_shape("Prediction::from_x0", ("x0", &x0), ("x_t", x_t))?;
        let Scales { alpha, sigma } = schedule.scales_at(timesteps, &x0)?;
        let epsilon = (x_t - alpha * &x0) / sigma;
        Ok(Self { x0, epsilon })
    }

    /// Thresholds `x0` to the data's range and recomputes `epsilon` from it.
    ///
    /// The pair then still satisfies `x_t = alpha x0 + sigma epsilon`, so that a step interpolates between the two.
    /// Keeping the raw noise with a clipped `x0`, as diffusers does by default, breaks this.
    ///
    /// # Errors
    ///
    /// As [`Thresholding::apply`] and [`from_x0`](Self::from_x0).
    pub fn thresholded(
        self,
        thresholding: &Thresholding,
        schedule: &NoiseSchedule,
        x_t: &Tensor,
        timesteps: &Tensor,
    ) -> Result<Self> {
        if *thresholding == Thresholding::None {
            return Ok(self);
        }
        Self::from_x0(schedule, thresholding.apply(&self.x0)?, x_t, timesteps)
    }

    /// Thresholds `x0` to the data's range and keeps `epsilon`: the pair is no longer consistent with `x_t`.
    ///
    /// Only to reproduce samples of diffusers with its default `use_clipped_model_output=False`; see
    /// [`Compatibility::Diffusers`](crate::Compatibility::Diffusers).
    ///
    /// # Errors
    ///
    /// As [`Thresholding::apply`].
    pub fn thresholded_keeping_epsilon(self, thresholding: &Thresholding) -> Result<Self> {
        Ok(Self { x0: thresholding.apply(&self.x0)?, ..self })
    }

    /// The same values, detached from the graph.
    #[must_use]
    pub fn detach(&self) -> Self {
        Self { x0: self.x0.detach(), epsilon: self.epsilon.detach() }
    }
}

impl PredictionType {
    /// The name in published scheduler configs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::Sample => "sample",
            Self::VPrediction => "v_prediction",
            Self::Flow => "flow_prediction",
        }
    }

    /// Checks that this output is defined on `schedule`. Call it once, before any step.
    ///
    /// # Errors
    ///
    /// [`Error::PredictionType`] for `epsilon` if the last timestep contains no signal (it does not determine `x0`),
    /// and for `v_prediction` on a schedule that is not variance preserving.
    pub fn ensure_defined_on(self, schedule: &NoiseSchedule) -> Result<()> {
        self.ensure_defined_at(schedule, schedule.scale_at(schedule.last_timestep())?)
    }

    /// The same at one noise level.
    pub(crate) fn ensure_defined_at(self, schedule: &NoiseSchedule, scale: Scale) -> Result<()> {
        let refuse = |reason: &str| {
            let reason = reason.to_owned();
            Err(Error::PredictionType { prediction_type: self.as_str(), reason })
        };
        match self {
            Self::Epsilon if scale.alpha == 0.0 => refuse(
                "the last timestep has no signal (alpha is 0); use `v_prediction` or `sample`",
            ),
            Self::VPrediction if !matches!(schedule.config(), NoiseScheduleConfig::Vp(_)) => {
                refuse("it requires alpha² + sigma² = 1; use `flow_prediction` or `sample`")
            }
            _ => Ok(()),
        }
    }

    /// Converts a network's output at `x_t` to clean data and noise.
    ///
    /// Computed in `Float` or wider: at high noise an error in `epsilon` is multiplied by `sigma / alpha`, 14.6 at the
    /// last timestep of Stable Diffusion's schedule, which is too much for half precision.
    ///
    /// # Shapes and units
    ///
    /// - `model_output`, `x_t`: `[batch, ..]`, the same shape
    /// - `timesteps`: `[batch]`, `Int64`, in training timesteps
    /// - returns: the shape of `x_t`, `Float` or `Double`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::ShapeMismatch`](ddil_libtorch::ArgumentError::ShapeMismatch) if the two differ; as
    /// [`NoiseSchedule::scales_at`] for `timesteps`.
    pub fn convert(
        self,
        schedule: &NoiseSchedule,
        model_output: &Tensor,
        x_t: &Tensor,
        timesteps: &Tensor,
    ) -> Result<Prediction> {
        ensure_same_shape("PredictionType::convert", ("model_output", model_output), ("x_t", x_t))?;
        let (output, x_t) = (at_least_float(model_output), at_least_float(x_t));
        let scales = schedule.scales_at(timesteps, &x_t)?;
        let [x0, epsilon] = self.quotients().map(|quotient| quotient.of(&scales, &x_t, &output));
        Ok(Prediction { x0, epsilon })
    }

    /// `x0` and `epsilon` in terms of `x_t` and the network's output: `x_t = alpha x0 + sigma epsilon`, solved together
    /// with the definition of the output.
    fn quotients(self) -> [Quotient; 2] {
        use Weight::{Alpha, MinusAlpha, MinusSigma, One, Sigma, Total, Zero};
        let quotient = |x_t, output, divisor| Quotient { x_t, output, divisor };
        match self {
            Self::Epsilon => [quotient(One, MinusSigma, Alpha), quotient(Zero, One, One)],
            Self::Sample => [quotient(Zero, One, One), quotient(One, MinusAlpha, Sigma)],
            Self::VPrediction => [quotient(Alpha, MinusSigma, One), quotient(Sigma, Alpha, One)],
            Self::Flow => [quotient(One, MinusSigma, Total), quotient(One, Alpha, Total)],
        }
    }

    /// The same at one noise level, in numbers.
    pub(crate) fn linear(self, schedule: &NoiseSchedule, scale: Scale) -> Result<[Linear; 2]> {
        self.ensure_defined_at(schedule, scale)?;
        Ok(self.quotients().map(|Quotient { x_t, output, divisor }| Linear {
            x_t: x_t.at(scale) / divisor.at(scale),
            given: output.at(scale) / divisor.at(scale),
        }))
    }

    /// The training target of the network for this clean data and noise.
    ///
    /// # Shapes and units
    ///
    /// - `x0`, `noise`: `[batch, ..]`; `timesteps`: `[batch]`, `Int64`; returns the shape of `x0`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::ShapeMismatch`](ddil_libtorch::ArgumentError::ShapeMismatch) if `x0` and `noise` differ; as
    /// [`NoiseSchedule::scales_at`] for `timesteps`.
    pub fn target(
        self,
        schedule: &NoiseSchedule,
        x0: &Tensor,
        noise: &Tensor,
        timesteps: &Tensor,
    ) -> Result<Tensor> {
        ensure_same_shape("PredictionType::target", ("x0", x0), ("noise", noise))?;
        Ok(match self {
            Self::Epsilon => noise.shallow_clone(),
            Self::Sample => x0.shallow_clone(),
            Self::VPrediction => {
                let Scales { alpha, sigma } = schedule.scales_at(timesteps, x0)?;
                alpha * noise - sigma * x0
            }
            Self::Flow => noise - x0,
        })
    }
}

/// `Float` for the half kinds, the tensor's own kind otherwise.
pub(crate) fn at_least_float(tensor: &Tensor) -> Tensor {
    match tensor.kind() {
        Kind::Half | Kind::BFloat16 => tensor.to_kind(Kind::Float),
        _ => tensor.shallow_clone(),
    }
}

/// A coefficient in the formulas of prediction types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weight {
    Zero,
    One,
    Alpha,
    MinusAlpha,
    Sigma,
    MinusSigma,
    /// `alpha + sigma`.
    Total,
}

/// `(x_t · x_t + output · output) / divisor`.
#[derive(Clone, Copy, Debug)]
struct Quotient {
    x_t: Weight,
    output: Weight,
    divisor: Weight,
}

impl Weight {
    /// The coefficient at one noise level.
    fn at(self, Scale { alpha, sigma }: Scale) -> f64 {
        match self {
            Self::Zero => 0.0,
            Self::One => 1.0,
            Self::Alpha => alpha,
            Self::MinusAlpha => -alpha,
            Self::Sigma => sigma,
            Self::MinusSigma => -sigma,
            Self::Total => alpha + sigma,
        }
    }

    /// The coefficient of each sample; `None` for 0 and 1, which need no multiplication.
    fn of_batch(self, Scales { alpha, sigma }: &Scales) -> Option<Tensor> {
        match self {
            Self::Zero | Self::One => None,
            Self::Alpha => Some(alpha.shallow_clone()),
            Self::MinusAlpha => Some(-alpha),
            Self::Sigma => Some(sigma.shallow_clone()),
            Self::MinusSigma => Some(-sigma),
            Self::Total => Some(alpha + sigma),
        }
    }
}

impl Quotient {
    fn of(self, scales: &Scales, x_t: &Tensor, output: &Tensor) -> Tensor {
        let term = |weight: Weight, tensor: &Tensor| match weight.of_batch(scales) {
            Some(weight) => weight * tensor,
            None => tensor.shallow_clone(),
        };
        let sum = match self.x_t {
            Weight::Zero => term(self.output, output),
            weight => term(weight, x_t) + term(self.output, output),
        };
        match self.divisor.of_batch(scales) {
            Some(divisor) => sum / divisor,
            None => sum,
        }
    }
}

/// `x_t · x_t + given · given`, coefficients of a state and one other tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Linear {
    pub(crate) x_t: f64,
    pub(crate) given: f64,
}

impl Linear {
    /// The other tensor.
    pub(crate) const GIVEN: Self = Self { x_t: 0.0, given: 1.0 };

    pub(crate) fn of(self, x_t: &Tensor, given: &Tensor) -> Result<Tensor> {
        if self == Self::GIVEN {
            return Ok(given.shallow_clone());
        }
        Ok(affine(x_t, given, self.x_t, self.given)?)
    }
}
