//! Mean pairwise and energy distance.

use ddil_libtorch::ArgumentError;
use ddil_metrics::{Error, energy_distance, mean_pairwise_distance};
use tch::Tensor;

use crate::{assert_close, assert_refuses_bad_pairs, ladder, normal, with_a_nan};

/// The mean gap of two different numbers from 0..n is `(n + 1) / 3`.
#[test]
fn pairs_on_a_ladder() -> ddil_metrics::Result<()> {
    for n in [2, 3, 10, 37] {
        assert_close(mean_pairwise_distance(&ladder(5, n))?, (n + 1) as f64 / 3.0, 1e-13);
    }
    Ok(())
}

#[test]
fn one_point_has_no_variety() -> ddil_metrics::Result<()> {
    let same = Tensor::full([6, 4], 0.1, tch::kind::FLOAT_CPU);
    assert_eq!(mean_pairwise_distance(&same)?, 0.0);
    Ok(())
}

/// Far apart the energy distance is twice the gap less both spreads.
#[test]
fn energy_of_far_ladders() -> ddil_metrics::Result<()> {
    let found = energy_distance(&ladder(0, 4), &ladder(1000, 7))?;
    assert_close(found, 2.0 * (1003.0 - 1.5) - 5.0 / 3.0 - 8.0 / 3.0, 1e-12);
    Ok(())
}

/// No bias: over many draws of two sets from one distribution the mean is 0, and both signs occur.
#[test]
fn energy_of_equal_distributions() -> ddil_metrics::Result<()> {
    let found: Vec<f64> = (0..100)
        .map(|seed| {
            let both = normal(seed, 60, 3);
            energy_distance(&both.narrow(0, 0, 25), &both.narrow(0, 25, 35))
        })
        .collect::<ddil_metrics::Result<_>>()?;
    let n = found.len() as f64;
    let mean = found.iter().sum::<f64>() / n;
    let variance = found.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    assert!(mean.abs() < 3.5 * (variance / n).sqrt(), "{mean} +- {}", (variance / n).sqrt());
    assert!(found.iter().any(|&value| value < 0.0));
    Ok(())
}

#[test]
fn energy_grows_with_the_gap() {
    let a = normal(1, 100, 3);
    let found = [0.0, 0.5, 1.0, 2.0]
        .map(|gap| energy_distance(&a, &(normal(2, 100, 3) + gap)).expect("good features"));
    assert!(found.is_sorted() && found[3] > 1.0, "{found:?}");
}

#[test]
fn bad_features() {
    assert_refuses_bad_pairs(energy_distance);
    let one = ladder(0, 1);
    assert!(matches!(energy_distance(&one, &one), Err(Error::TooFewSamples { needed: 2, .. })));
    assert!(matches!(mean_pairwise_distance(&one), Err(Error::TooFewSamples { found: 1, .. })));
    assert!(matches!(mean_pairwise_distance(&with_a_nan(3, 2)), Err(Error::NonFinite { .. })));
    assert!(matches!(
        mean_pairwise_distance(&one.view([1])),
        Err(Error::Argument(ArgumentError::Shape { .. }))
    ));
}
