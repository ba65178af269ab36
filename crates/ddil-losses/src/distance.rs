//! Distances between two batches, one value per sample.

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::ensure_same_shape;
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// Mean squared difference over each sample.
///
/// # Shapes and units
///
/// - `prediction`, `target`: `[batch, ..]`, any rank from 2, the same shape
/// - returns: `[batch]`, `Float` or `Double`, differentiable if the arguments are
///
/// # Errors
///
/// [`Error::Argument`] if the shapes differ or `batch` is the only dimension.
///
/// # Example
///
/// ```
/// use tch::Tensor;
///
/// # fn main() -> ddil_losses::Result<()> {
/// let x = Tensor::from_slice2(&[[1.0_f32, 3.0], [0.0, 0.0]]);
/// let per_sample = ddil_losses::squared_error(&x, &x.zeros_like())?;
/// assert_eq!(per_sample, Tensor::from_slice(&[5.0_f32, 0.0]));
/// # Ok(())
/// # }
/// ```
pub fn squared_error(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    let difference = difference("squared_error", prediction, target)?;
    Ok(mean_over_sample(&difference.square()))
}

/// Mean over each sample of the element-wise pseudo-Huber distance `sqrt(d² + c²) - c`.
///
/// Quadratic for differences far below `c`, linear far above. It is the loss of latent consistency distillation in
/// [Luo et al. 2023](https://arxiv.org/abs/2310.04378), with `c = 0.001`. Computed as
/// `d² / (sqrt(d² + c²) + c)`, which is equal and does not cancel for small differences in `Float`.
///
/// # Shapes and units
///
/// - `prediction`, `target`: `[batch, ..]`, any rank from 2, the same shape
/// - `c`: data scale
/// - returns: `[batch]`, `Float` or `Double`, differentiable if the arguments are
///
/// # Errors
///
/// [`Error::Invalid`] unless `c` is positive and finite; otherwise those of [`squared_error`].
pub fn pseudo_huber(prediction: &Tensor, target: &Tensor, c: f64) -> Result<Tensor> {
    ensure_huber_c("huber_c", c)?;
    let squared = difference("pseudo_huber", prediction, target)?.square();
    let root = (&squared + c * c).sqrt();
    Ok(mean_over_sample(&(squared / (root + c))))
}

/// Checks that `c` is valid for [`pseudo_huber`].
pub(crate) fn ensure_huber_c(field: &'static str, c: f64) -> Result<()> {
    if c > 0.0 && c.is_finite() {
        return Ok(());
    }
    Err(Error::Invalid(Invalid::new(field, c, "positive and finite")))
}

/// `prediction - target` in `Float` or wider: squares of small differences underflow in the half kinds.
pub(crate) fn difference(op: &'static str, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    ensure_same_shape(op, ("prediction", prediction), ("target", target))?;
    if prediction.dim() < 2 {
        return Err(Error::Argument(ArgumentError::Shape {
            op,
            name: "prediction",
            shape: prediction.size(),
            expected: "[batch, ..] with at least one dimension after the batch".to_owned(),
        }));
    }
    let difference = prediction - target;
    Ok(match difference.kind() {
        Kind::Half | Kind::BFloat16 => difference.to_kind(Kind::Float),
        _ => difference,
    })
}

/// `[batch, ..]` to `[batch]`.
pub(crate) fn mean_over_sample(values: &Tensor) -> Tensor {
    values.flatten(1, -1).mean_dim(1, false, values.kind())
}
