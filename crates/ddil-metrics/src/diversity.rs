//! Diversity: the mean distance between samples.

use tch::{Kind, Tensor};

use crate::{
    distances::Pairs,
    error::{Result, ensure_features, torch},
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

/// Mean cosine distance over all pairs of different samples.
///
/// `2 / (n (n - 1)) * sum_{i<j} (1 - cos(x_i, x_j))`, for embeddings whose length means nothing, such as CLIP's: 0 if all
/// samples have one direction.
///
/// # Shapes and units
///
/// - `features`: `[n, d]`, any floating kind
/// - returns: a number from 0 to 2
///
/// # Errors
///
/// Those of [`mean_pairwise_distance`]; a sample of zeros has no direction and counts as at a right angle to all others.
///
/// # Example
///
/// ```
/// let axes = tch::Tensor::from_slice(&[5.0, 0.0, 0.0, 0.1]).view([2, 2]);
/// assert_eq!(ddil_metrics::mean_cosine_distance(&axes)?, 1.0);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn mean_cosine_distance(features: &Tensor) -> Result<f64> {
    const OP: &str = "mean_cosine_distance";
    let features = ensure_features(OP, "features", features, 2)?;
    let n = features.size()[0] as f64;
    let cosines = || {
        let lengths = features.f_norm_scalaropt_dim(2.0, [1_i64].as_slice(), true)?;
        let unit = features.f_div(&lengths.f_clamp_min(f64::MIN_POSITIVE)?)?;
        // |sum x|^2 = sum |x_i|^2 + the cosines of all ordered pairs.
        let squares = |rows: &Tensor| rows.f_square()?.f_sum(Kind::Double)?.f_double_value(&[]);
        let sum = unit.f_sum_dim_intlist([0_i64].as_slice(), false, Kind::Double)?;
        Ok(squares(&sum)? - squares(&unit)?)
    };
    let cosines: f64 = cosines().map_err(torch(OP))?;
    // Rounding of equal directions may leave less than nothing.
    Ok((1.0 - cosines / (n * (n - 1.0))).max(0.0))
}
