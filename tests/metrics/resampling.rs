//! Metrics of random subsets.

use ddil_libtorch::ArgumentError;
use ddil_metrics::{
    Error, Subsets, diversity_per_group, kid, kid_of_subsets, mean_pairwise_distance,
    standard_errors,
};
use tch::{Kind, Tensor};

use crate::{assert_close, normal};

#[test]
fn subsets_as_large_as_the_sets_give_the_whole_distance() -> ddil_metrics::Result<()> {
    let (a, b) = (normal(1, 30, 4), normal(2, 30, 4) + 0.3);
    let found = kid_of_subsets(&a, &b, Subsets { count: 5, size: 30, seed: 9 })?;
    assert_close(found.mean, kid(&a, &b)?, 1e-10);
    assert!(found.deviation < 1e-10);
    Ok(())
}

#[test]
fn the_mean_over_subsets_is_unbiased() -> ddil_metrics::Result<()> {
    let (a, b) = (normal(3, 200, 4), normal(4, 150, 4) + 0.3);
    let subsets = Subsets { count: 400, size: 40, seed: 1 };
    let found = kid_of_subsets(&a, &b, subsets)?;
    let error = found.deviation / f64::from(subsets.count).sqrt();
    assert!((found.mean - kid(&a, &b)?).abs() < 4.0 * error, "{found:?}");
    assert_eq!(found, kid_of_subsets(&a, &b, subsets)?);
    assert_ne!(found, kid_of_subsets(&a, &b, Subsets { seed: 2, ..subsets })?);
    Ok(())
}

#[test]
fn subsets_that_do_not_fit() {
    let a = normal(0, 20, 2);
    let refused = |count, size| {
        kid_of_subsets(&a, &a, Subsets { count, size, seed: 0 }).expect_err("refused")
    };
    assert!(matches!(refused(1, 21), Error::TooFewSamples { found: 20, needed: 21, .. }));
    assert!(refused(0, 10).invalid().is_some_and(|invalid| invalid.field == "count"));
    assert!(refused(3, 1).invalid().is_some_and(|invalid| invalid.field == "size"));
}

/// For a mean the delete-half jackknife is exact in expectation: `s / sqrt(n)`, for even and odd `n`.
#[test]
fn the_standard_error_of_a_mean() -> ddil_metrics::Result<()> {
    for n in [100, 101, 7] {
        let samples = normal(5, n, 2) * Tensor::from_slice(&[1.0, 5.0]);
        let mean = |half: &Tensor| {
            assert_eq!(half.size(), [n / 2, 2]);
            let mean = half.mean_dim([0_i64].as_slice(), false, Kind::Double);
            Ok(Vec::<f64>::try_from(mean).expect("two numbers"))
        };
        let found = standard_errors(&samples, 4000, 0, mean)?;
        let exact = samples.std_dim([0_i64].as_slice(), true, false) / (n as f64).sqrt();
        for (column, found) in found.iter().enumerate() {
            assert_close(found / exact.double_value(&[column as i64]), 1.0, 0.05);
        }
    }
    Ok(())
}

/// Against the deviation between 60 sets of samples that were drawn anew.
#[test]
fn the_standard_error_of_a_distance() -> ddil_metrics::Result<()> {
    let reference = normal(6, 500, 3);
    let distance = |samples: &Tensor| kid(&reference, samples);
    let drawn: Vec<f64> = (0..60)
        .map(|seed| distance(&(normal(100 + seed, 200, 3) + 0.5)))
        .collect::<ddil_metrics::Result<_>>()?;
    let truth = Tensor::from_slice(&drawn).std(true).double_value(&[]);
    let samples = normal(7, 200, 3) + 0.5;
    let found = standard_errors(&samples, 100, 0, |half| Ok(vec![distance(half)?]))?[0];
    assert!((0.6..1.6).contains(&(found / truth)), "{found} of {truth}");
    Ok(())
}

#[test]
fn standard_errors_that_cannot_be() {
    let none = |_: &Tensor| Ok(vec![0.0]);
    let few = standard_errors(&normal(0, 3, 1), 10, 0, none);
    assert!(matches!(few, Err(Error::TooFewSamples { found: 3, needed: 4, .. })));
    let once = standard_errors(&normal(0, 9, 1), 1, 0, none).expect_err("one half");
    assert!(once.invalid().is_some_and(|invalid| invalid.field == "halves"));
}

#[test]
fn diversity_is_measured_within_groups() -> ddil_metrics::Result<()> {
    let (k, groups) = (4, 5);
    let features = normal(8, k * groups, 3);
    // Groups far apart, which does not count.
    let far = Tensor::arange(groups, (Kind::Double, tch::Device::Cpu)) * 1e3;
    let moved = &features + far.repeat_interleave_self_int(k, 0, k * groups).unsqueeze(1);
    let expected: f64 = (0..groups)
        .map(|group| mean_pairwise_distance(&features.narrow(0, group * k, k)))
        .sum::<ddil_metrics::Result<f64>>()?
        / groups as f64;
    let found = diversity_per_group(&moved, k as u32)?;
    assert_close(found.mean, expected, 1e-10);
    assert!(found.deviation > 0.0);
    // Whatever depends on the prompt alone has none.
    let alike = far.repeat_interleave_self_int(k, 0, k * groups).unsqueeze(1);
    assert_eq!(diversity_per_group(&alike, k as u32)?.mean, 0.0);
    Ok(())
}

#[test]
fn groups_that_are_not_complete() {
    let features = normal(0, 10, 2);
    let shape = diversity_per_group(&features, 4);
    assert!(matches!(shape, Err(Error::Argument(ArgumentError::Shape { .. }))));
    let one = diversity_per_group(&features, 1).expect_err("one image");
    assert!(one.invalid().is_some_and(|invalid| invalid.field == "k"));
}
