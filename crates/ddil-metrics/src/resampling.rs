//! Metrics of random subsets: kernel distance by subsets, and standard errors.

use rand::{SeedableRng, rngs::StdRng, seq::index};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use ddil_files::Invalid;

use crate::{
    error::{Error, Result, ensure_features, ensure_pair_of_rows, ensure_rows},
    kid, mean_pairwise_distance,
};

/// Random subsets of a set of features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Subsets {
    /// The number of subsets; default 100.
    pub count: u32,
    /// The number of samples in each; default 1000.
    pub size: u32,
    /// The seed that chooses them; default 0.
    pub seed: u64,
}

impl Default for Subsets {
    fn default() -> Self {
        Self { count: 100, size: 1000, seed: 0 }
    }
}

/// A mean over subsets with the standard deviation between them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeanDeviation {
    /// The mean.
    pub mean: f64,
    /// The standard deviation, dividing by the number of subsets.
    pub deviation: f64,
}

impl MeanDeviation {
    fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
        Self { mean, deviation: variance.sqrt() }
    }
}

/// Kernel distance (KID) over random subsets without repetition, as most published numbers: see [`kid`] for the distance
/// of complete sets.
///
/// # Shapes and units
///
/// - `a`: `[n, d]`, `b`: `[m, d]`, any floating kind
///
/// # Errors
///
/// Those of [`kid`]; [`Error::TooFewSamples`] if a set is smaller than a subset; [`Error::Invalid`] unless there is a
/// subset and it has two samples.
///
/// # Example
///
/// ```
/// use ddil_metrics::{Subsets, kid, kid_of_subsets};
/// let a = tch::Tensor::randn([400, 8], tch::kind::FLOAT_CPU);
/// let b = tch::Tensor::randn([400, 8], tch::kind::FLOAT_CPU) + 0.5;
/// let found = kid_of_subsets(&a, &b, Subsets { count: 20, size: 100, seed: 0 })?;
/// assert!((found.mean - kid(&a, &b)?).abs() < 3.0 * found.deviation);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn kid_of_subsets(a: &Tensor, b: &Tensor, subsets: Subsets) -> Result<MeanDeviation> {
    const OP: &str = "kid_of_subsets";
    let Subsets { count, size, seed } = subsets;
    if count < 1 {
        return Err(Invalid::new("count", count.to_string(), "1 or more").into());
    }
    if size < 2 {
        return Err(Invalid::new("size", size.to_string(), "2 or more").into());
    }
    let (a, b) = ensure_pair_of_rows(OP, ("a", a), ("b", b), i64::from(size))?;
    let mut random = StdRng::seed_from_u64(seed);
    let values: Result<Vec<f64>> = (0..count)
        .map(|_| {
            let a = subset(&a, size as usize, &mut random);
            kid(&a, &subset(&b, size as usize, &mut random))
        })
        .collect();
    Ok(MeanDeviation::of(&values?))
}

/// `size` rows without repetition.
fn subset(features: &Tensor, size: usize, random: &mut StdRng) -> Tensor {
    let chosen = index::sample(random, features.size()[0] as usize, size);
    let chosen: Vec<i64> = chosen.into_iter().map(|index| index as i64).collect();
    features.index_select(0, &Tensor::from_slice(&chosen).to_device(features.device()))
}

/// Standard errors of metrics of `samples`: how much they would differ for other samples of the same distribution.
///
/// The delete-half jackknife ([Shao and Wu 1989](https://doi.org/10.1214/aos/1176347263)): the standard deviation of each
/// metric between random halves of the samples. Halves contain no sample twice, which metrics of nearest neighbours
/// would not bear. The bias that a metric has for half as many samples does not enter. The reference stays fixed.
///
/// # Shapes and units
///
/// - `samples`: `[n, d]`, any floating kind
/// - `metrics`: a function of features `[n / 2, d]` that returns as many numbers each time
/// - returns: the standard errors of these numbers for `n` samples
///
/// # Errors
///
/// [`Error::TooFewSamples`] below four samples, [`Error::Invalid`] below two halves, and the errors of `metrics`.
///
/// # Example
///
/// ```
/// use ddil_metrics::standard_errors;
/// use tch::Kind;
///
/// // The standard error of a mean is known: s / sqrt(n), here 1 / 20.
/// let samples = tch::Tensor::randn([400, 1], tch::kind::DOUBLE_CPU);
/// let errors = standard_errors(&samples, 200, 0, |half| {
///     Ok(vec![half.mean(Kind::Double).double_value(&[])])
/// })?;
/// assert!((errors[0] * 20.0 - 1.0).abs() < 0.3);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn standard_errors(
    samples: &Tensor,
    halves: u32,
    seed: u64,
    mut metrics: impl FnMut(&Tensor) -> Result<Vec<f64>>,
) -> Result<Vec<f64>> {
    let samples = ensure_rows("standard_errors", "samples", samples, 4)?;
    if halves < 2 {
        return Err(Invalid::new("halves", halves.to_string(), "2 or more").into());
    }
    let n = samples.size()[0];
    let size = n / 2;
    let mut random = StdRng::seed_from_u64(seed);
    let rows: Vec<Vec<f64>> = (0..halves)
        .map(|_| metrics(&subset(&samples, size as usize, &mut random)))
        .collect::<Result<_>>()?;
    // A mean over `size` of `n` values without repetition has the variance s^2 / size * (1 - size / n).
    let scale = (size as f64 / (n - size) as f64).sqrt();
    let unbiased = (f64::from(halves) / f64::from(halves - 1)).sqrt();
    Ok((0..rows[0].len())
        .map(|column| {
            let values: Vec<f64> = rows.iter().map(|row| row[column]).collect();
            MeanDeviation::of(&values).deviation * unbiased * scale
        })
        .collect())
}

/// Mean distance between the samples of each group, averaged over groups: diversity per prompt.
///
/// `mean_g 2 / (k (k - 1)) sum_{i < j} |x_gi - x_gj|`, where `k` consecutive rows are the images of one prompt. Samples
/// that depend on the prompt alone have 0.
///
/// # Shapes and units
///
/// - `features`: `[groups * k, d]`, any floating kind
/// - returns: the unit of the features
///
/// # Errors
///
/// [`Error::Invalid`] unless `k` is 2 or more; [`Error::TooFewSamples`] without a complete group;
/// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) for an incomplete group.
///
/// # Example
///
/// ```
/// // Two prompts with two images each: 3 apart, and equal.
/// let features = tch::Tensor::from_slice(&[0.0, 3.0, 7.0, 7.0]).view([4, 1]);
/// assert_eq!(ddil_metrics::diversity_per_group(&features, 2)?.mean, 1.5);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn diversity_per_group(features: &Tensor, k: u32) -> Result<MeanDeviation> {
    const OP: &str = "diversity_per_group";
    if k < 2 {
        return Err(Invalid::new("k", k.to_string(), "2 or more").into());
    }
    let k = i64::from(k);
    let features = ensure_features(OP, "features", features, k)?;
    let n = features.size()[0];
    if n % k != 0 {
        return Err(Error::Argument(ddil_libtorch::ArgumentError::Shape {
            op: OP,
            name: "features",
            shape: features.size(),
            expected: format!("[groups * {k}, d]"),
        }));
    }
    let values: Result<Vec<f64>> =
        (0..n / k).map(|group| mean_pairwise_distance(&features.narrow(0, group * k, k))).collect();
    Ok(MeanDeviation::of(&values?))
}
