//! Precision, recall, density and coverage of two sets of features.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    distances::{Block, Pairs, Tile},
    error::{Error, Result, ensure_pair_of_rows, torch},
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
    let (real, fake) =
        ensure_pair_of_rows(OP, ("real", real), ("fake", fake), ks[0].max(ks[1]) + 1)?;
    let [real_pr, real_dc] = radii(OP, &real, ks)?;
    let [fake_pr, _] = radii(OP, &fake, ks)?;

    let (n, m) = (real.size()[0], fake.size()[0]);
    let pairs = Pairs::new(OP, &real, &fake);
    let none = |len| Tensor::zeros([len], (Kind::Bool, fake.device()));
    let (precise, recalled, covered, mut inside) = (none(m), none(n), none(n), 0);
    for tile in pairs.tiles() {
        let (first, width) = tile.columns();
        let mut precise = precise.narrow(0, first, width);
        for block in tile.blocks() {
            let squares = tile.squares(block)?;
            let rows = |of: &Tensor| of.narrow(0, block.0, block.1);
            let in_real = tile.closer(&squares, block, &rows(&real_pr).unsqueeze(1))?;
            let _ = precise.logical_or_(&in_real.any_dim(0, false));
            let in_fake = tile.closer(&squares, block, &fake_pr.narrow(0, first, width))?;
            let _ = rows(&recalled).logical_or_(&in_fake.any_dim(1, false));
            let in_real = tile.closer(&squares, block, &rows(&real_dc).unsqueeze(1))?;
            inside += count(&in_real);
            let _ = rows(&covered).logical_or_(&in_real.any_dim(1, false));
        }
    }
    Ok(Prdc {
        precision: count(&precise) as f64 / m as f64,
        recall: count(&recalled) as f64 / n as f64,
        density: inside as f64 / (ks[1] as f64 * m as f64),
        coverage: count(&covered) as f64 / n as f64,
    })
}

/// For each of two `k`, the distance of every row to the k-th nearest other row.
fn radii(op: &'static str, features: &Tensor, ks: [i64; 2]) -> Result<[Tensor; 2]> {
    let most = ks[0].max(ks[1]);
    let pairs = Pairs::new(op, features, features);
    // The nearest rows of each tile, whose distances are those of differences; the nearest of all are among them.
    let mut nearest = Vec::new();
    for tile in pairs.tiles() {
        let mut of_tile = Vec::new();
        for block in tile.blocks() {
            let squares = tile.squares(block)?;
            // A row's own column is excluded by its index: excluding it by value would also exclude copies of the row.
            let _ = squares.diagonal(block.0 - tile.columns().0, 0, 1).fill_(f64::INFINITY);
            of_tile.push(nearest_of(op, &pairs, &tile, block, &squares, most)?);
        }
        nearest.push(Tensor::cat(&of_tile, 0));
    }
    let (distances, _) = Tensor::cat(&nearest, 1).sort(1, false);
    Ok(ks.map(|k| distances.select(1, k - 1)))
}

/// The distances of a block's rows to their nearest rows in a tile, at most `most` each, in any order.
fn nearest_of(
    op: &'static str,
    pairs: &Pairs<'_>,
    tile: &Tile<'_, '_>,
    block: Block,
    squares: &Tensor,
    most: i64,
) -> Result<Tensor> {
    let (first, width) = tile.columns();
    let found = most.min(width);
    let (values, columns) = squares.f_topk(found, 1, false, false).map_err(torch(op))?;
    let rows = Tensor::arange_start(block.0, block.0 + block.1, (Kind::Int64, squares.device()))
        .repeat_interleave_self_int(found, 0, None);
    let exact = pairs.exact(&rows, &(columns.flatten(0, 1) + first)).view([-1, found]);
    // A tile of few rows has too few without a row's own.
    Ok(exact.masked_fill(&values.isinf(), f64::INFINITY))
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

    /// Distances of all rows of `a` to all rows of `b`, from differences.
    fn distances(a: &Tensor, b: &Tensor) -> Tensor {
        let gaps = a.to_kind(Kind::Double).unsqueeze(1) - b.to_kind(Kind::Double).unsqueeze(0);
        gaps.square().sum_dim_intlist([2_i64].as_slice(), false, Kind::Double).sqrt()
    }

    /// The definitions, on sets of several parts, with samples that are in both sets and twice in one.
    #[test]
    fn parts_change_nothing() -> Result<()> {
        tch::manual_seed(4);
        let real = Tensor::randn([41, 2], tch::kind::FLOAT_CPU);
        let fake = Tensor::randn([30, 2], tch::kind::FLOAT_CPU) * 0.8;
        let fake = Tensor::cat(&[&fake, &real.narrow(0, 5, 6), &fake.narrow(0, 0, 2)], 0);
        let radius = |set: &Tensor, k: i64| {
            let own = distances(set, set);
            let _ = own.diagonal(0, 0, 1).fill_(f64::INFINITY);
            own.sort(1, false).0.select(1, k - 1)
        };
        let share = |mask: &Tensor| count(mask) as f64 / mask.size()[0] as f64;
        // In the second pair the last part is smaller than the number of neighbours.
        let few = (real.narrow(0, 0, 15), fake.narrow(0, 0, 8));
        for (real, fake) in [(real, fake), few] {
            let between = distances(&real, &fake);
            let in_real = |k| between.lt_tensor(&radius(&real, k).unsqueeze(1));
            let in_fake = between.lt_tensor(&radius(&fake, 3));
            let found = prdc(&real, &fake, Neighbours::default())?;
            assert_eq!(found.precision, share(&in_real(3).any_dim(0, false)));
            assert_eq!(found.recall, share(&in_fake.any_dim(1, false)));
            assert_eq!(found.coverage, share(&in_real(5).any_dim(1, false)));
            let inside = count(&in_real(5)) as f64 / (5.0 * fake.size()[0] as f64);
            assert_eq!(found.density, inside);
        }
        Ok(())
    }
}
