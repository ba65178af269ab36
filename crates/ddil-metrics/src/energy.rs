//! Energy distance.

use tch::Tensor;

use crate::{
    distances::Pairs,
    error::{Result, ensure_pair},
};

/// Unbiased estimate of the energy distance between the distributions of `a` and `b`.
///
/// `2 E|X - Y| - E|X - X'| - E|Y - Y'|` of [Székely and Rizzo 2013](https://doi.org/10.1016/j.jspi.2013.03.018), where
/// the last two means exclude a sample's distance to itself. The true value is 0 only for equal distributions. The
/// estimate then has mean 0 and can be negative. Computed in `Double`; `ddil_core::measure_shift` has an estimate of its
/// own in `Float` for states on a device.
///
/// # Shapes and units
///
/// - `a`: `[n, d]`, `b`: `[m, d]`, any floating kind
/// - returns: in units of the features
///
/// # Errors
///
/// [`Error::TooFewSamples`](crate::Error::TooFewSamples) if `n` or `m` is below 2,
/// [`FeatureMismatch`](crate::Error::FeatureMismatch) if the columns differ, and the errors of bad features:
/// [`Argument`](crate::Error::Argument), [`NonFinite`](crate::Error::NonFinite).
///
/// # Example
///
/// ```
/// let a = tch::Tensor::from_slice(&[0.0, 1.0]).view([2, 1]);
/// let distance = ddil_metrics::energy_distance(&a, &(&a + 10.0))?;
/// assert_eq!(distance, 2.0 * 10.0 - 1.0 - 1.0);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn energy_distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    const OP: &str = "energy_distance";
    let (a, b) = ensure_pair(OP, ("a", a), ("b", b), 2)?;
    let (n, m) = (a.size()[0] as f64, b.size()[0] as f64);

    let between = Pairs::new(OP, &a, &b).sum_of_distances()? / (n * m);
    let within_a = Pairs::new(OP, &a, &a).sum_of_distances()? / (n * (n - 1.0));
    let within_b = Pairs::new(OP, &b, &b).sum_of_distances()? / (m * (m - 1.0));
    Ok(2.0 * between - within_a - within_b)
}
