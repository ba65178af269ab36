//! Sliced Wasserstein distance.

use ddil_files::Invalid;
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};
use tch::{Kind, Tensor};

use crate::error::{Error, Result, ensure_features, ensure_pair};

/// Number of directions projected at a time, so that memory does not grow with their number.
const DIRECTIONS_AT_ONCE: i64 = 32;
/// The limit of directions, which are all drawn before the first is used; the error of their mean is 0.4 %.
const MAX_PROJECTIONS: u32 = 1 << 16;

/// Squared sliced 2-Wasserstein distance between `a` and `b`, over `num_projections` directions drawn from `seed`.
///
/// Directions are uniform on the sphere and depend only on `seed`, `num_projections` and `d`, so values with the same
/// seed are comparable without sampling noise of the directions. See [`sliced_wasserstein_along`] for the formula.
///
/// # Shapes and units
///
/// - `a`, `b`: `[n, d]`, any floating kind
/// - `num_projections`: 256 is a good choice
/// - returns: squared units of the features
///
/// # Errors
///
/// [`Error::Invalid`] if `num_projections` is 0 or above 65536, and those of [`sliced_wasserstein_along`].
///
/// # Example
///
/// ```
/// let a = tch::Tensor::randn([50, 3], tch::kind::FLOAT_CPU);
/// assert_eq!(ddil_metrics::sliced_wasserstein(&a, &a, 16, 0)?, 0.0);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn sliced_wasserstein(a: &Tensor, b: &Tensor, num_projections: u32, seed: u64) -> Result<f64> {
    if !(1..=MAX_PROJECTIONS).contains(&num_projections) {
        return Err(Error::Invalid(Invalid::new(
            "num_projections",
            num_projections,
            "from 1 to 65536",
        )));
    }
    let (a, b) = ensure_pair("sliced_wasserstein", ("a", a), ("b", b), 1)?;
    let directions = unit_directions(num_projections, a.size()[1], seed).to_device(a.device());
    sliced_wasserstein_along(&a, &b, &directions)
}

/// Squared sliced 2-Wasserstein distance between `a` and `b` along given directions.
///
/// Mean over the directions and samples of `(a_(i) - b_(i))^2`, where `a_(i)` is the i-th smallest projection of a
/// sample on the direction: in one dimension the optimal transport pairs sorted values ([Bonneel et al.
/// 2015](https://doi.org/10.1007/s10851-014-0506-3)).
///
/// # Shapes and units
///
/// - `a`, `b`: `[n, d]`, any floating kind
/// - `directions`: `[projections, d]`, not normalised; of length 1 for the usual definition
/// - returns: squared units of the features
///
/// # Errors
///
/// [`Error::CountMismatch`] if `a` and `b` differ in their number of rows, [`Error::FeatureMismatch`] if the columns of
/// `a`, `b` and `directions` differ, and the errors of bad features: [`Error::TooFewSamples`] for empty sets,
/// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape), [`Error::NonFinite`].
pub fn sliced_wasserstein_along(a: &Tensor, b: &Tensor, directions: &Tensor) -> Result<f64> {
    const OP: &str = "sliced_wasserstein";
    let (a, b) = ensure_pair(OP, ("a", a), ("b", b), 1)?;
    let [n, m] = [&a, &b].map(|features| features.size()[0]);
    if n != m {
        return Err(Error::CountMismatch { op: OP, left: ("a", n), right: ("b", m) });
    }
    let directions = ensure_features(OP, "directions", directions, 1)?;
    let (_, directions) = ensure_pair(OP, ("a", &a), ("directions", &directions), 1)?;

    let num_directions = directions.size()[0];
    let mut sum = 0.0;
    for start in (0..num_directions).step_by(DIRECTIONS_AT_ONCE as usize) {
        let len = DIRECTIONS_AT_ONCE.min(num_directions - start);
        let towards = directions.narrow(0, start, len).tr();
        let gaps = sorted_projections(&a, &towards) - sorted_projections(&b, &towards);
        sum += gaps.square().sum(Kind::Double).double_value(&[]);
    }
    Ok(sum / (n as f64 * num_directions as f64))
}

/// Projections on each direction, sorted: one contiguous row per direction, which sorts faster than a column.
fn sorted_projections(features: &Tensor, towards: &Tensor) -> Tensor {
    features.matmul(towards).tr().contiguous().sort(1, false).0
}

/// Unit vectors `[num, dim]`, uniform on the sphere.
fn unit_directions(num: u32, dim: i64, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let normals: Vec<f64> =
        StandardNormal.sample_iter(&mut rng).take(num as usize * dim as usize).collect();
    let normals = Tensor::from_slice(&normals).view([i64::from(num), dim]);
    let lengths = normals.norm_scalaropt_dim(2, [1_i64].as_slice(), true);
    normals / lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_are_unit_vectors_without_a_preferred_side() {
        let directions = unit_directions(4000, 3, 7);
        let lengths = directions.norm_scalaropt_dim(2, [1_i64].as_slice(), false);
        assert!((lengths - 1.0).abs().max().double_value(&[]) < 1e-12);
        let second_moments = directions.tr().matmul(&directions) / 4000.0;
        let isotropic = Tensor::eye(3, tch::kind::DOUBLE_CPU) / 3.0;
        assert!((second_moments - isotropic).abs().max().double_value(&[]) < 0.02);
    }

    #[test]
    fn directions_depend_on_the_seed_alone() {
        tch::manual_seed(1);
        let first = unit_directions(5, 4, 3);
        tch::manual_seed(2);
        assert_eq!(first, unit_directions(5, 4, 3));
        assert_ne!(first, unit_directions(5, 4, 4));
    }
}
