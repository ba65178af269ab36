//! Precision, recall, density and coverage of two sets of features.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    distances::Pairs,
    error::{Error, Result, ensure_pair, torch},
};

/// The number of neighbours that define the radius of a sample's ball.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Neighbours {
    /// For precision and recall; 3 as in [Kynkäänniemi et al. 2019](https://arxiv.org/abs/1904.06991).
    pub precision_recall: u32,
    /// For density and coverage; 5 as in [Naeem et al. 2020](https://arxiv.org/abs/2002.09797).
    pub density_coverage: u32,
}

impl Default for Neighbours {
    fn default() -> Self {
        Self { precision_recall: 3, density_coverage: 5 }
    }
}

/// Precision and recall of samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrecisionRecall {
    /// Fraction of generated samples in the ball of a real one.
    pub precision: f64,
    /// Fraction of real samples in the ball of a generated one.
    pub recall: f64,
}

/// Density and coverage of samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DensityCoverage {
    /// Mean number of real samples' balls that contain a generated sample, divided by `k`; 1 in expectation for equal
    /// distributions, and above 1 for samples in dense regions of the real ones.
    pub density: f64,
    /// Fraction of real samples with a generated one in their ball.
    pub coverage: f64,
}

/// All four metrics.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prdc {
    /// See [`PrecisionRecall::precision`].
    pub precision: f64,
    /// See [`PrecisionRecall::recall`].
    pub recall: f64,
    /// See [`DensityCoverage::density`].
    pub density: f64,
    /// See [`DensityCoverage::coverage`].
    pub coverage: f64,
}

/// Precision and recall of `fake` against `real`.
///
/// With `R_k(x)` the distance from `x` to the k-th nearest *other* sample of its own set:
///
/// - `precision = mean_j 1[some i: |real_i - fake_j| < R_k(real_i)]`
/// - `recall = mean_i 1[some j: |real_i - fake_j| < R_k(fake_j)]`
///
/// [Kynkäänniemi et al. 2019](https://arxiv.org/abs/1904.06991), with the strict `<` of Naeem et al.'s code.
///
/// # Shapes and units
///
/// - `real`: `[n, d]`, `fake`: `[m, d]`, any floating kind
/// - `k`: 3 is usual
///
/// # Errors
///
/// Those of [`prdc`].
///
/// # Example
///
/// ```
/// let real = tch::Tensor::randn([200, 2], tch::kind::FLOAT_CPU);
/// let far_away = &real + 100.0;
/// let found = ddil_metrics::precision_recall(&real, &far_away, 3)?;
/// assert_eq!((found.precision, found.recall), (0.0, 0.0));
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn precision_recall(real: &Tensor, fake: &Tensor, k: u32) -> Result<PrecisionRecall> {
    let found = prdc(real, fake, Neighbours { precision_recall: k, density_coverage: k })?;
    Ok(PrecisionRecall { precision: found.precision, recall: found.recall })
}

/// Density and coverage of `fake` against `real`.
///
/// With `R_k(x)` the distance from `x` to the k-th nearest *other* real sample:
///
/// - `density = 1 / (k m) * sum_{i, j} 1[|real_i - fake_j| < R_k(real_i)]`
/// - `coverage = mean_i 1[min_j |real_i - fake_j| < R_k(real_i)]`
///
/// [Naeem et al. 2020](https://arxiv.org/abs/2002.09797). Equal distributions have a density of 1 in expectation, and a
/// coverage of `1 - prod_{l=1..k} (n - l) / (n + m - l)`: 0.969 for `k = 5` and `n = m` large.
///
/// # Shapes and units
///
/// - `real`: `[n, d]`, `fake`: `[m, d]`, any floating kind
/// - `k`: 5 is usual
///
/// # Errors
///
/// Those of [`prdc`].
pub fn density_coverage(real: &Tensor, fake: &Tensor, k: u32) -> Result<DensityCoverage> {
    let found = prdc(real, fake, Neighbours { precision_recall: k, density_coverage: k })?;
    Ok(DensityCoverage { density: found.density, coverage: found.coverage })
}

/// Precision, recall, density and coverage of `fake` against `real` in one pass over the distances.
///
/// See [`precision_recall`] and [`density_coverage`] for the formulas. Time grows with `(n + m)^2 d`; memory does not.
///
/// # Shapes and units
///
/// - `real`: `[n, d]`, `fake`: `[m, d]`, any floating kind
///
/// # Errors
///
/// [`Error::Invalid`] if a number of neighbours is 0, [`Error::TooFewSamples`] if a set does not have more samples than
/// the number of neighbours, [`Error::FeatureMismatch`] if the columns differ, and the errors of bad features:
/// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape), [`Error::NonFinite`].
///
/// # Example
///
/// ```
/// use ddil_metrics::{Neighbours, prdc};
/// let real = tch::Tensor::randn([300, 2], tch::kind::FLOAT_CPU);
/// let one_point = tch::Tensor::zeros([300, 2], tch::kind::FLOAT_CPU);
/// let found = prdc(&real, &one_point, Neighbours::default())?;
/// assert!(found.precision == 1.0 && found.coverage < 0.2);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn prdc(real: &Tensor, fake: &Tensor, neighbours: Neighbours) -> Result<Prdc> {
    const OP: &str = "prdc";
    let ks = [neighbours.precision_recall, neighbours.density_coverage].map(i64::from);
    if ks.contains(&0) {
        return Err(Error::Invalid(Invalid::new("neighbours", "0", "1 or more")));
    }
    let (real, fake) = ensure_pair(OP, ("real", real), ("fake", fake), ks[0].max(ks[1]) + 1)?;
    let [real_pr, real_dc] = radii(OP, &real, ks)?;
    let [fake_pr, _] = radii(OP, &fake, ks)?;

    let (n, m) = (real.size()[0], fake.size()[0]);
    let pairs = Pairs::new(OP, &real, &fake);
    let mut precise = Tensor::zeros([m], (Kind::Bool, fake.device()));
    let (mut recalled, mut covered, mut inside) = (0, 0, 0);
    for block in pairs.blocks() {
        let squares = pairs.squares(block)?;
        let rows = |radii: &Tensor| radii.narrow(0, block.0, block.1).unsqueeze(1);
        let in_real = pairs.closer(&squares, block, &rows(&real_pr))?;
        precise = precise.logical_or(&in_real.any_dim(0, false));
        recalled += count(&pairs.closer(&squares, block, &fake_pr)?.any_dim(1, false));
        let in_real = pairs.closer(&squares, block, &rows(&real_dc))?;
        inside += count(&in_real);
        covered += count(&in_real.any_dim(1, false));
    }
    Ok(Prdc {
        precision: count(&precise) as f64 / m as f64,
        recall: recalled as f64 / n as f64,
        density: inside as f64 / (ks[1] as f64 * m as f64),
        coverage: covered as f64 / n as f64,
    })
}

/// For each of two `k`, the distance of every row to the k-th nearest other row.
fn radii(op: &'static str, features: &Tensor, ks: [i64; 2]) -> Result<[Tensor; 2]> {
    let most = ks[0].max(ks[1]);
    let pairs = Pairs::new(op, features, features);
    let mut found = [const { Vec::new() }; 2];
    for block in pairs.blocks() {
        let squares = pairs.squares(block)?;
        // A row's own column is excluded by its index: excluding it by value would also exclude copies of the row.
        let _ = squares.diagonal(block.0, 0, 1).fill_(f64::INFINITY);
        let (_, nearest) = squares.f_topk(most, 1, false, false).map_err(torch(op))?;
        let rows =
            Tensor::arange_start(block.0, block.0 + block.1, (Kind::Int64, nearest.device()))
                .repeat_interleave_self_int(most, 0, None);
        let distances =
            pairs.exact(&rows, &nearest.flatten(0, 1)).view([-1, most]).sort(1, false).0;
        for (of_k, k) in found.iter_mut().zip(ks) {
            of_k.push(distances.select(1, k - 1));
        }
    }
    Ok(found.map(|parts| Tensor::cat(&parts, 0)))
}

fn count(mask: &Tensor) -> i64 {
    mask.count_nonzero(None).int64_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn radii_leave_a_row_out_by_its_index() -> Result<()> {
        // The first two rows are copies: their distance is 0.
        let features = Tensor::from_slice(&[1.0, 1.0, 3.0, 7.0]).view([4, 1]);
        let [first, second] = radii("test", &features, [1, 2])?;
        assert_eq!(Vec::<f64>::try_from(&first).expect("a vector"), [0.0, 0.0, 2.0, 4.0]);
        assert_eq!(Vec::<f64>::try_from(&second).expect("a vector"), [2.0, 2.0, 2.0, 6.0]);
        Ok(())
    }
}
