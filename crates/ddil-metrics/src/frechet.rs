//! Fréchet distance between Gaussians fitted to two sets of features.

use ddil_libtorch::ArgumentError;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result, ensure_features, ensure_rows, torch};

/// Mean and covariance of features, accumulated batch by batch.
///
/// Batches are merged as in [Chan et al. 1983](https://doi.org/10.1080/00031305.1983.10483115): deviations are taken
/// from the mean of the batch, so no precision is lost if the mean is large. The result does not depend on the batch
/// size, up to rounding.
///
/// # Example
///
/// ```
/// use ddil_metrics::{Moments, Statistics};
/// let features = tch::Tensor::randn([100, 4], tch::kind::FLOAT_CPU);
/// let mut moments = Moments::new();
/// for batch in features.split(32, 0) {
///     moments.extend(&batch)?;
/// }
/// assert_eq!(moments.build()?.num_samples(), Some(100));
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Moments {
    seen: Option<Seen>,
}

/// The state of [`Moments`] after the first batch.
#[derive(Debug)]
struct Seen {
    count: i64,
    mean: Tensor,
    /// Sum of outer products of deviations from `mean`.
    scatter: Tensor,
}

impl Moments {
    /// Moments without features.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a batch.
    ///
    /// # Shapes and units
    ///
    /// - `features`: `[n, d]` with `n >= 1`, any floating kind; `d` as in earlier batches
    ///
    /// # Errors
    ///
    /// [`Error::FeatureMismatch`] if `d` changed; [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) above
    /// [`Statistics::MAX_DIM`] features, and the errors of bad features:
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape), [`Error::TooFewSamples`] for an empty batch,
    /// [`Error::NonFinite`]. On an error nothing is added.
    pub fn extend(&mut self, features: &Tensor) -> Result<()> {
        const OP: &str = "Moments::extend";
        let features = ensure_features(OP, "features", features, 1)?;
        let shape = features.size();
        if shape[1] > Statistics::MAX_DIM as i64 {
            let gibibytes = (shape[1] as f64).powi(2) * 8.0 / f64::from(1 << 30);
            let most = Statistics::MAX_DIM;
            let expected = format!(
                "at most {most} features: a covariance of {} takes {gibibytes:.1} GiB",
                shape[1]
            );
            return Err(ArgumentError::Shape { op: OP, name: "features", shape, expected }.into());
        }
        let batch = Seen::new(&features);
        if let Some(seen) = &mut self.seen {
            let [before, now] = [&seen.mean, &batch.mean].map(|mean| mean.size()[0]);
            if before != now {
                return Err(Error::FeatureMismatch {
                    op: OP,
                    left: ("earlier batches", before),
                    right: ("features", now),
                });
            }
            seen.merge(&batch);
        } else {
            self.seen = Some(batch);
        }
        Ok(())
    }

    /// The statistics of all batches.
    ///
    /// # Errors
    ///
    /// [`Error::TooFewSamples`] below two samples, which have no covariance.
    pub fn build(&self) -> Result<Statistics> {
        let count = self.seen.as_ref().map_or(0, |seen| seen.count);
        match &self.seen {
            Some(seen) if seen.count >= 2 => Ok(Statistics {
                num_samples: Some(count as u64),
                mean: to_vec("Moments::build", &seen.mean)?,
                covariance: to_vec(
                    "Moments::build",
                    &(&seen.scatter / (count as f64 - 1.0)).view(-1),
                )?,
            }),
            _ => Err(Error::TooFewSamples {
                op: "Moments::build",
                name: "features",
                found: count,
                needed: 2,
            }),
        }
    }
}

impl Seen {
    fn new(features: &Tensor) -> Self {
        let mean = features.mean_dim([0_i64].as_slice(), false, Kind::Double);
        let deviations = features - &mean;
        Self { count: features.size()[0], mean, scatter: deviations.tr().matmul(&deviations) }
    }

    fn merge(&mut self, other: &Self) {
        let (n, m) = (self.count as f64, other.count as f64);
        let gap = &other.mean - &self.mean;
        self.scatter += &other.scatter + gap.outer(&gap) * (n * m / (n + m));
        self.mean += gap * (m / (n + m));
        self.count += other.count;
    }
}

/// Mean and covariance of a set of features: all that the Fréchet distance requires.
///
/// Serialise it (serde) to reuse a reference set without its features. The covariance divides by `n - 1`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StoredStatistics")]
pub struct Statistics {
    num_samples: Option<u64>,
    mean: Vec<f64>,
    covariance: Vec<f64>,
}

/// Rows of a complete set that are converted to `f64` at once.
const ROWS_AT_ONCE: i64 = 1 << 14;

impl Statistics {
    /// The largest number of features, whose covariance takes 2 GiB.
    pub const MAX_DIM: usize = 1 << 14;

    /// Statistics of a complete set of features.
    ///
    /// # Shapes and units
    ///
    /// - `features`: `[n, d]`, any floating kind
    ///
    /// # Errors
    ///
    /// [`Error::TooFewSamples`] if `n < 2`, and the errors of bad features:
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape), [`Error::NonFinite`].
    pub fn from_features(features: &Tensor) -> Result<Self> {
        let mut moments = Moments::new();
        let features = ensure_rows("Statistics::from_features", "features", features, 2)?;
        for rows in features.split(ROWS_AT_ONCE, 0) {
            moments.extend(&rows)?;
        }
        moments.build()
    }

    /// Statistics from their values, as stored by another program.
    ///
    /// # Shapes and units
    ///
    /// - `mean`: `d` values, `covariance`: `d * d` values row by row, divided by `n - 1`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape), [`Error::TooFewSamples`] below two samples,
    /// [`Error::NonFinite`].
    pub fn from_parts(
        num_samples: Option<u64>,
        mean: Vec<f64>,
        covariance: Vec<f64>,
    ) -> Result<Self> {
        StoredStatistics { num_samples, mean, covariance }.try_into()
    }

    /// The number of samples; `None` if the file of another program does not contain it.
    pub fn num_samples(&self) -> Option<u64> {
        self.num_samples
    }

    /// Number of features per sample.
    pub fn dim(&self) -> usize {
        self.mean.len()
    }

    /// The mean, `d` values.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The covariance, `d * d` values row by row.
    pub fn covariance(&self) -> &[f64] {
        &self.covariance
    }

    fn covariance_matrix(&self) -> Tensor {
        let dim = self.dim() as i64;
        Tensor::from_slice(&self.covariance).view([dim, dim])
    }
}

/// [`Statistics`] as read from a file, before checks.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredStatistics {
    num_samples: Option<u64>,
    mean: Vec<f64>,
    covariance: Vec<f64>,
}

impl TryFrom<StoredStatistics> for Statistics {
    type Error = Error;

    fn try_from(stored: StoredStatistics) -> Result<Self> {
        const OP: &str = "Statistics";
        let StoredStatistics { num_samples, mean, covariance } = stored;
        let dim = mean.len();
        if dim == 0 || covariance.len() != dim * dim {
            return Err(Error::Argument(ArgumentError::Shape {
                op: OP,
                name: "covariance",
                shape: vec![covariance.len() as i64],
                expected: format!("the square of the mean's {dim} values, 1 or more"),
            }));
        }
        if let Some(found) = num_samples.filter(|&found| found < 2) {
            let (name, found) = ("num_samples", found as i64);
            return Err(Error::TooFewSamples { op: OP, name, found, needed: 2 });
        }
        let found = mean.iter().chain(&covariance).filter(|value| !value.is_finite()).count();
        if found > 0 {
            return Err(Error::NonFinite { op: OP, name: "mean, covariance", found: found as i64 });
        }
        if !is_symmetric(&covariance, dim) {
            return Err(Error::Argument(ArgumentError::Value {
                op: OP,
                name: "covariance",
                value: "not symmetric".to_owned(),
                expected: "a symmetric matrix".into(),
            }));
        }
        Ok(Self { num_samples, mean, covariance })
    }
}

/// Whether a square matrix is its own transpose, up to the rounding of single precision.
fn is_symmetric(matrix: &[f64], dim: usize) -> bool {
    let largest = matrix.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    let differs = |row: usize, column: usize| {
        (matrix[row * dim + column] - matrix[column * dim + row]).abs() > 1e-5 * largest
    };
    (0..dim).all(|row| (0..row).all(|column| !differs(row, column)))
}

/// Fréchet distance between Gaussians with the mean and covariance of `a` and of `b`.
///
/// `|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a^1/2 S_b S_a^1/2)^1/2)` ([Heusel et al.
/// 2017](https://arxiv.org/abs/1706.08500)), which is FID for Inception's features. The last trace is computed as the
/// sum of the square roots of eigenvalues of a symmetric matrix, so singular covariances need no correction. The value
/// decreases with the number of samples: compare only equal counts.
///
/// # Shapes and units
///
/// - returns: squared units of the features, 0 for equal statistics up to rounding
///
/// # Errors
///
/// [`Error::FeatureMismatch`] if `a` and `b` differ in the number of features, [`Error::Torch`] if the eigenvalues do
/// not converge.
///
/// # Example
///
/// ```
/// use ddil_metrics::{Statistics, frechet_distance};
/// let narrow = Statistics::from_features(&tch::Tensor::from_slice(&[-1.0, 0.0, 1.0]).view([3, 1]))?;
/// let wide = Statistics::from_features(&tch::Tensor::from_slice(&[-2.0, 1.0, 4.0]).view([3, 1]))?;
/// // Means 0 and 1, standard deviations 1 and 3.
/// assert!((frechet_distance(&narrow, &wide)? - (1.0 + 4.0)).abs() < 1e-12);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn frechet_distance(a: &Statistics, b: &Statistics) -> Result<f64> {
    const OP: &str = "frechet_distance";
    if a.dim() != b.dim() {
        return Err(Error::FeatureMismatch {
            op: OP,
            left: ("a", a.dim() as i64),
            right: ("b", b.dim() as i64),
        });
    }
    let means: f64 = a.mean.iter().zip(&b.mean).map(|(x, y)| (x - y).powi(2)).sum();
    let (cov_a, cov_b) = (a.covariance_matrix(), b.covariance_matrix());
    let traces = (cov_a.trace() + cov_b.trace()).double_value(&[]);

    let root_a = square_root(OP, &cov_a)?;
    let product = root_a.matmul(&cov_b).matmul(&root_a);
    // Rounding makes the product slightly asymmetric.
    let product = (&product + product.tr()) / 2.0;
    let eigenvalues = product.f_linalg_eigvalsh("L").map_err(torch(OP))?;
    let cross = roots(&eigenvalues).sum(Kind::Double).double_value(&[]);
    Ok(means + traces - 2.0 * cross)
}

/// The symmetric square root of a symmetric positive semi-definite matrix.
fn square_root(op: &'static str, matrix: &Tensor) -> Result<Tensor> {
    let (values, vectors) = matrix.f_linalg_eigh("L").map_err(torch(op))?;
    Ok((&vectors * roots(&values)).matmul(&vectors.tr()))
}

/// Square roots of the eigenvalues of a positive semi-definite matrix.
///
/// Zero eigenvalues of a singular matrix become rounding errors of either sign, whose roots would be far larger than
/// the errors and would accumulate: all below the rounding error of the largest are set to 0.
fn roots(eigenvalues: &Tensor) -> Tensor {
    let floor = eigenvalues.abs().max() * (eigenvalues.numel() as f64 * f64::EPSILON);
    eigenvalues.masked_fill(&eigenvalues.le_tensor(&floor), 0.0).sqrt()
}

fn to_vec(op: &'static str, values: &Tensor) -> Result<Vec<f64>> {
    Vec::<f64>::try_from(values).map_err(torch(op))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_square_root_squares_back() -> Result<()> {
        tch::manual_seed(3);
        let factor = Tensor::randn([6, 4], tch::kind::DOUBLE_CPU);
        let singular = factor.matmul(&factor.tr());
        let root = square_root("test", &singular)?;
        let gap = (root.matmul(&root) - singular).abs().max().double_value(&[]);
        assert!(gap < 1e-12, "{gap}");
        Ok(())
    }
}
