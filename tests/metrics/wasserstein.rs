//! Sliced Wasserstein distance.

use ddil_metrics::{Error, sliced_wasserstein, sliced_wasserstein_along};
use proptest::prelude::*;
use tch::Tensor;

use crate::{assert_close, assert_refuses_bad_pairs, normal};

/// A set moved by `g`: on direction `u` each sorted pair is `g.u` apart, so the squares average to `|g|^2 / d`.
#[test]
fn a_shifted_set() -> ddil_metrics::Result<()> {
    let a = normal(0, 40, 3);
    let gap = Tensor::from_slice(&[1.0, -2.0, 2.0]);
    let axes = Tensor::eye(3, tch::kind::DOUBLE_CPU);
    assert_close(sliced_wasserstein_along(&a, &(&a + &gap), &axes)?, 9.0 / 3.0, 1e-12);
    // Over random directions it holds on average.
    assert!((sliced_wasserstein(&a, &(&a + &gap), 2000, 1)? - 3.0).abs() < 0.25);
    Ok(())
}

/// Directions beyond one block count like those in it.
#[test]
fn many_directions_are_averaged() -> ddil_metrics::Result<()> {
    let (a, b) = (normal(1, 20, 2), normal(2, 20, 2));
    let directions = normal(3, 70, 2);
    let one_by_one: f64 = (0..70)
        .map(|i| sliced_wasserstein_along(&a, &b, &directions.narrow(0, i, 1)))
        .sum::<ddil_metrics::Result<f64>>()?;
    assert_close(sliced_wasserstein_along(&a, &b, &directions)?, one_by_one / 70.0, 1e-12);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Order of samples and global randomness do not matter; exchanging the sets does not either.
    #[test]
    fn depends_on_sets_and_seed_alone(seed in 0_u64..100) {
        let (a, b) = (normal(seed as i64, 30, 4), normal(seed as i64 + 1, 30, 4));
        let there = sliced_wasserstein(&a, &b, 40, seed).expect("good features");
        let mixed = a.index_select(0, &Tensor::randperm(30, tch::kind::INT64_CPU));
        let back = sliced_wasserstein(&b, &mixed, 40, seed).expect("good features");
        prop_assert!((there - back).abs() < 1e-13);
        let other = sliced_wasserstein(&a, &b, 40, seed + 1).expect("good features");
        prop_assert!(there != other);
    }
}

#[test]
fn bad_input() {
    assert_refuses_bad_pairs(|a, b| sliced_wasserstein(a, b, 4, 0));
    let a = normal(0, 5, 2);
    assert!(matches!(
        sliced_wasserstein(&a, &normal(0, 6, 2), 4, 0),
        Err(Error::CountMismatch { left: ("a", 5), right: ("b", 6), .. })
    ));
    assert!(matches!(sliced_wasserstein(&a, &a, 0, 0), Err(Error::Invalid(_))));
    assert!(matches!(
        sliced_wasserstein_along(&a, &a, &normal(0, 5, 3)),
        Err(Error::FeatureMismatch { right: ("directions", 3), .. })
    ));
}
