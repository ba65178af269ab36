#![allow(unsafe_code, reason = "calls C++")]

use std::ptr;

use tch::Tensor;

use crate::ffi::{self, new_tensor};
use crate::{Error, Result};

/// The settings of [`group_norm`] for a tensor `[batch, channels, ..]`.
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm<'a> {
    /// Number of groups of channels, each with its own mean and variance per sample; a divisor of the channels.
    pub num_groups: i64,
    /// Added to the variance; 0 or more.
    pub eps: f64,
    /// Factor of each channel, `[channels]`; 1 by default.
    pub weight: Option<&'a Tensor>,
    /// Added to each channel afterwards, `[channels]`; 0 by default.
    pub bias: Option<&'a Tensor>,
    /// Added to each channel of each sample before normalisation, `[batch, channels]`.
    pub offset: Option<&'a Tensor>,
    /// Whether [`SiLU`](https://arxiv.org/abs/1702.03118), `y / (1 + exp(-y))`, follows.
    pub silu: bool,
}

/// `silu((x + offset - mean) / sqrt(variance + eps) * weight + bias)` as a new tensor, with mean and population variance
/// of each group of channels of each sample: group normalisation of [Wu and He 2018](https://arxiv.org/abs/1803.08494),
/// with the operations around it in residual blocks.
///
/// One operation on libtorch's own threads for channels last (or a single pixel) in `Float`, `BFloat16` and `Half` on the
/// CPU, with weight and bias of that kind or `Float` and the offset of that kind. Memory is read twice and written once.
/// Everything is computed in `Float`, sums of more than 64 numbers in `Double`, and rounded once, where libtorch's
/// operations round to the kind of `x` after each. So the two differ by rounding. Results do not depend on the number
/// of threads, nor on whether gradients are recorded. Variances below 1e-37 may be treated as 0, and `SiLU` of less
/// than -88 is 0. A group that contains NaN or infinity becomes NaN.
///
/// Its gradient is also a single operation, rounded once; until then only `x` and the moments of each group are kept.
/// That gradient can be differentiated once more, through libtorch's operations.
///
/// In all other cases libtorch's operations are used.
///
/// # Shapes and units
///
/// - `x`: `[batch, channels, ..]`
/// - returns: that shape and kind, in the memory format of `x`: channels last is preserved, a tensor that is neither
///   channels last nor contiguous becomes one of them
///
/// # Errors
///
/// [`Error::Argument`] unless `eps` is finite and 0 or more, [`Error::Torch`] if shapes, kinds or devices do not
/// fit.
///
/// # Example
///
/// ```
/// use ddil_libtorch::{GroupNorm, group_norm};
/// use tch::Tensor;
///
/// let x = Tensor::from_slice(&[1.0_f32, 3.0, 10.0, 30.0]).view([1, 4, 1]);
/// let settings =
///     GroupNorm { num_groups: 2, eps: 0.0, weight: None, bias: None, offset: None, silu: false };
/// let y = group_norm(&x, &settings)?;
/// assert_eq!(Vec::<f32>::try_from(y.flatten(0, -1)).expect("floats"), [-1.0, 1.0, -1.0, 1.0]);
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
pub fn group_norm(x: &Tensor, settings: &GroupNorm<'_>) -> Result<Tensor> {
    let GroupNorm { num_groups, eps, weight, bias, offset, silu } = *settings;
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(Error::value("group_norm", "eps", eps, "finite and 0 or more"));
    }
    let [weight, bias, offset] =
        [weight, bias, offset].map(|t| t.map_or(ptr::null(), Tensor::as_ptr));
    // SAFETY: the tensors live through the call, and C++ accepts a null pointer for none.
    new_tensor("group_norm", |out| unsafe {
        ffi::ddil_group_norm(x.as_ptr(), num_groups, weight, bias, offset, eps, silu, out)
    })
}
