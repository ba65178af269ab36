//! Treatment of predicted clean data beyond the data's range ("reflected" diffusion).

use ddil_files::Invalid;
use ddil_libtorch::{ArgumentError, ensure_real};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// The range of clean data: one interval, or one per channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRange {
    /// The lowest value; one, or one per channel.
    pub low: Bound,
    /// The highest value; one, or one per channel.
    pub high: Bound,
}

/// One end of a [`DataRange`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number, or a list with one per channel")]
pub enum Bound {
    /// The same for every value.
    Scalar(f64),
    /// One per channel, dimension 1 of the data.
    PerChannel(Vec<f64>),
}

impl Default for DataRange {
    /// `[-1, 1]`, the range of pixels.
    fn default() -> Self {
        Self { low: Bound::Scalar(-1.0), high: Bound::Scalar(1.0) }
    }
}

/// How to treat predicted clean data beyond the data's range.
///
/// The same in samplers, rollouts, teachers and targets. DDIL's "reflected diffusion" is [`Clamp`](Self::Clamp) on
/// `x0`; [`Reflect`](Self::Reflect) folds instead, for comparison.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Thresholding {
    /// Keep the values.
    #[default]
    None,
    /// Clip the values to the range.
    Clamp(DataRange),
    /// Clip each sample at a quantile of its absolute values and divide by it.
    ///
    /// Section 2.3 of [Saharia et al. 2022](https://arxiv.org/abs/2205.11487). For pixels; a latent would be
    /// rescaled.
    Dynamic {
        /// The quantile of `|x0|`, in (0, 1]; published default 0.995.
        ratio: f64,
        /// The largest divisor; published default 1, which makes this a plain clip at 1.
        max_value: f64,
    },
    /// Reflect the values at the bounds, repeatedly if needed.
    ///
    /// The operator of [Lou and Ermon 2023](https://arxiv.org/abs/2304.04740), which applies it to the state.
    Reflect(DataRange),
}

impl DataRange {
    /// The same interval for every channel.
    pub fn scalar(low: f64, high: f64) -> Self {
        Self { low: Bound::Scalar(low), high: Bound::Scalar(high) }
    }

    /// One interval per channel.
    pub fn per_channel(low: Vec<f64>, high: Vec<f64>) -> Self {
        Self { low: Bound::PerChannel(low), high: Bound::PerChannel(high) }
    }

    /// The range of samples per channel: from their `quantile` to their `1 - quantile`, widened at both ends by
    /// `margin` times its width.
    ///
    /// For latents, which have no natural bounds. Too narrow a range reduces contrast. A range that contains the data
    /// does not change predictions that are means of data, only values that guidance moves out of the range.
    ///
    /// # Shapes and units
    ///
    /// - `x0`: `[samples, channels, ..]`, data scale (latents already multiplied by their scaling factor)
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) for fewer than two dimensions or no samples;
    /// [`Error::Invalid`] unless `quantile` is in [0, 0.5) and `margin` is not negative, and for a channel with a
    /// single distinct value or a value that is NaN or infinite.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_schedulers::{Bound, DataRange};
    /// use tch::{Kind, Tensor};
    ///
    /// let x0 = Tensor::linspace(-2.0, 4.0, 601, (Kind::Float, tch::Device::Cpu)).view([601, 1]);
    /// let DataRange { low, high } = DataRange::of_samples(&x0, 0.0, 0.5)?;
    /// assert_eq!((low, high), (Bound::PerChannel(vec![-5.0]), Bound::PerChannel(vec![7.0])));
    /// # Ok::<(), ddil_schedulers::Error>(())
    /// ```
    pub fn of_samples(x0: &Tensor, quantile: f64, margin: f64) -> Result<Self> {
        const OP: &str = "DataRange::of_samples";
        ensure_real(OP, "x0", x0)?;
        if x0.dim() < 2 || x0.numel() == 0 {
            let expected = "[samples, channels, ..] with at least one value".to_owned();
            return Err(Error::Argument(ArgumentError::Shape {
                op: OP,
                name: "x0",
                shape: x0.size(),
                expected,
            }));
        }
        if !((0.0..0.5).contains(&quantile) && margin >= 0.0 && margin.is_finite()) {
            return Err(Error::Invalid(Invalid::new(
                "quantile, margin",
                format!("{quantile}, {margin}"),
                "a quantile from 0 to below 0.5 and a margin of at least 0",
            )));
        }
        let kind = if x0.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let channels = x0.unsqueeze(-1).flatten(2, -1).transpose(0, 1).to_kind(kind).flatten(1, -1);
        let ends = |ratio| -> Result<Vec<f64>> {
            let found = per_sample_quantile(&channels, ratio).map_err(Error::torch(OP))?;
            Vec::try_from(found.to_kind(Kind::Double)).map_err(Error::torch(OP))
        };
        let (low, high) = (ends(quantile)?, ends(1.0 - quantile)?);
        let widened = |ends: (&f64, &f64)| {
            let room = margin * (ends.1 - ends.0);
            (ends.0 - room, ends.1 + room)
        };
        let (low, high) = low.iter().zip(&high).map(widened).unzip();
        let range = Self::per_channel(low, high);
        range.ensure()?;
        Ok(range)
    }

    fn ensure(&self) -> Result<()> {
        let (low, high) = (self.low.values(), self.high.values());
        let comparable = low.len() == high.len() || low.len() == 1 || high.len() == 1;
        let n = low.len().max(high.len());
        let ordered = |i: usize| {
            let (low, high) = (low[i.min(low.len() - 1)], high[i.min(high.len() - 1)]);
            // Also in single precision, the kind of most data.
            (low as f32).is_finite() && (high as f32).is_finite() && low < high
        };
        if comparable && !low.is_empty() && !high.is_empty() && (0..n).all(ordered) {
            return Ok(());
        }
        Err(Error::Invalid(Invalid::new(
            "thresholding.low, thresholding.high",
            format!("{low:?}, {high:?}"),
            "finite and in order, each one value or one per channel",
        )))
    }
}

impl Bound {
    fn values(&self) -> &[f64] {
        match self {
            Self::Scalar(value) => std::slice::from_ref(value),
            Self::PerChannel(values) => values,
        }
    }

    /// `[1, channels, 1, ..]` to broadcast over `x0`, or a scalar.
    fn tensor(&self, x0: &Tensor) -> Result<Tensor> {
        let values = self.values();
        if values.len() > 1 && x0.size().get(1) != Some(&(values.len() as i64)) {
            return Err(Error::Argument(ArgumentError::Shape {
                op: "Thresholding::apply",
                name: "x0",
                shape: x0.size(),
                expected: format!("{} channels in dimension 1, one per bound", values.len()),
            }));
        }
        let mut shape = vec![1; x0.dim()];
        if values.len() > 1 {
            shape[1] = values.len() as i64;
        }
        // Filled on the device: a copy from the host would synchronise. In `Double`, because the half kinds cannot
        // represent all bounds.
        let bounds: Vec<Tensor> =
            values.iter().map(|v| Tensor::full([1], *v, (Kind::Double, x0.device()))).collect();
        Ok(Tensor::cat(&bounds, 0).to_kind(x0.kind()).view(shape.as_slice()))
    }
}

impl Thresholding {
    /// Clamp to `[-1, 1]`, for pixels.
    pub fn clamp_pixels() -> Self {
        Self::Clamp(DataRange::default())
    }

    /// Checks the settings. Call it once, before any step.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless bounds are in order and finite in single precision, `ratio` is in (0, 1], and
    /// `max_value` is finite and at least 1.
    pub fn ensure(&self) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Clamp(range) | Self::Reflect(range) => range.ensure(),
            Self::Dynamic { ratio, max_value } => {
                let is_largest = *max_value >= 1.0 && (*max_value as f32).is_finite();
                if 0.0 < *ratio && *ratio <= 1.0 && is_largest {
                    return Ok(());
                }
                Err(Error::Invalid(Invalid::new(
                    "thresholding.ratio, thresholding.max_value",
                    format!("{ratio}, {max_value}"),
                    "a ratio in (0, 1] and a finite value of at least 1",
                )))
            }
        }
    }

    /// Applies the thresholding to `x0`.
    ///
    /// # Shapes and units
    ///
    /// - `x0`: `[batch, ..]`, or `[batch, channels, ..]` for a range per channel; returns the same shape and kind
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if a range per channel does not match the channels
    /// of `x0`, [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind) or
    /// [`ArgumentError::NotDense`](ddil_libtorch::ArgumentError::NotDense) if it is not a dense tensor of real numbers;
    /// as [`ensure`](Self::ensure) for the settings.
    pub fn apply(&self, x0: &Tensor) -> Result<Tensor> {
        let op = "Thresholding::apply";
        self.ensure()?;
        ensure_real(op, "x0", x0)?;
        if x0.dim() == 0 {
            let expected = "[batch, ..]".to_owned();
            return Err(Error::Argument(ArgumentError::Shape {
                op,
                name: "x0",
                shape: x0.size(),
                expected,
            }));
        }
        match self {
            _ if x0.numel() == 0 => Ok(x0.shallow_clone()),
            Self::None => Ok(x0.shallow_clone()),
            Self::Clamp(DataRange { low: Bound::Scalar(low), high: Bound::Scalar(high) }) => {
                let most = largest_of(x0.kind());
                Ok(x0.clamp(low.clamp(-most, most), high.clamp(-most, most)))
            }
            Self::Clamp(range) => {
                Ok(x0.clamp_tensor(Some(range.low.tensor(x0)?), Some(range.high.tensor(x0)?)))
            }
            Self::Dynamic { ratio, max_value } => dynamic(x0, *ratio, *max_value),
            Self::Reflect(range) => {
                Ok(reflect(x0, &range.low.tensor(x0)?, &range.high.tensor(x0)?))
            }
        }
    }

    /// The fraction of values that [`apply`](Self::apply) changes, per sample, `[batch]`, `Float`, on the device.
    ///
    /// # Errors
    ///
    /// As [`apply`](Self::apply).
    pub fn changed_fraction(&self, x0: &Tensor) -> Result<Tensor> {
        let changed = self.apply(x0)?.ne_tensor(x0).to_kind(Kind::Float);
        Ok(changed.unsqueeze(-1).flatten(1, -1).mean_dim(1, false, Kind::Float))
    }
}

/// The largest finite number of a kind; libtorch rejects larger bounds.
fn largest_of(kind: Kind) -> f64 {
    match kind {
        Kind::Half => 65504.0,
        // The bits of the largest Float without the last eight.
        Kind::BFloat16 => 3.389_531_389_251_535_5e38,
        Kind::Float => f32::MAX.into(),
        _ => f64::MAX,
    }
}

fn dynamic(x0: &Tensor, ratio: f64, max_value: f64) -> Result<Tensor> {
    const OP: &str = "Thresholding::apply";
    let kind = x0.kind();
    let batch = x0.size().first().copied().unwrap_or(1);
    let flat = x0.reshape([batch, -1]);
    // libtorch's quantile does not support the half kinds; it is computed in Float for them.
    let flat = if kind == Kind::Double { flat } else { flat.to_kind(Kind::Float) };
    let scale = per_sample_quantile(&flat.abs(), ratio)
        .map_err(Error::torch(OP))?
        .clamp(1.0, max_value)
        .view([batch, 1]);
    let limited = flat.minimum(&scale).maximum(&-&scale) / scale;
    Ok(limited.view(x0.size().as_slice()).to_kind(kind))
}

/// The quantile of each row, linearly interpolated; row by row if libtorch's limit of 2^24 values would be exceeded.
fn per_sample_quantile(rows: &Tensor, ratio: f64) -> std::result::Result<Tensor, tch::TchError> {
    const LIMIT: usize = 1 << 24;
    if rows.numel() < LIMIT {
        return rows.f_quantile_scalar(ratio, 1, false, "linear");
    }
    let values = (0..rows.size()[0])
        .map(|i| {
            let row = rows.select(0, i);
            let position = ratio * (row.numel() - 1) as f64;
            let nth = |n: i64| row.f_kthvalue(n + 1, 0, false).map(|(value, _)| value);
            let below = nth(position.floor() as i64)?;
            let above = nth(position.ceil() as i64)?;
            Ok(&below + (above - &below) * position.fract())
        })
        .collect::<std::result::Result<Vec<Tensor>, tch::TchError>>()?;
    Tensor::f_stack(&values, 0)
}

/// Reflects at both bounds: a triangle wave of period `2 (high - low)` that is the identity inside the range.
fn reflect(x0: &Tensor, low: &Tensor, high: &Tensor) -> Tensor {
    let width = high - low;
    // `remainder` rounds toward minus infinity, as required here; `fmod` would reflect negative values incorrectly.
    let turns = ((x0 - low) / &width).remainder(2.0);
    let from_far_wall: Tensor = 1.0 - turns;
    let from_low: Tensor = width * (1.0 - from_far_wall.abs());
    let folded = (low + from_low).maximum(low).minimum(high);
    // The rounding of the reflection must not change points inside the range, nor move any past a bound.
    let inside = x0.ge_tensor(low).logical_and(&x0.le_tensor(high));
    x0.where_self(&inside, &folded)
}
