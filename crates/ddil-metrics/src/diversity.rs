//! Diversity: the mean distance between samples.

use tch::Tensor;

use crate::{
    distances::Pairs,
    error::{Result, ensure_features},
};

/// Mean Euclidean distance over all pairs of different samples.
///
/// `2 / (n (n - 1)) * sum_{i<j} |x_i - x_j|`: decreases when samples lose diversity, independent of any reference.
///
/// # Shapes and units
///
/// - `features`: `[n, d]`, any floating kind
/// - returns: in units of the features
///
/// # Errors
///
/// [`Error::TooFewSamples`](crate::Error::TooFewSamples) if `n < 2`, and the errors of bad features:
/// [`Argument`](crate::Error::Argument), [`NonFinite`](crate::Error::NonFinite).
///
/// # Example
///
/// ```
/// let corners = tch::Tensor::from_slice(&[0.0, 3.0, 6.0]).view([3, 1]);
/// assert_eq!(ddil_metrics::mean_pairwise_distance(&corners)?, 4.0);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn mean_pairwise_distance(features: &Tensor) -> Result<f64> {
    const OP: &str = "mean_pairwise_distance";
    let features = ensure_features(OP, "features", features, 2)?;
    let n = features.size()[0] as f64;
    Ok(Pairs::new(OP, &features, &features).sum_of_distances()? / (n * (n - 1.0)))
}
