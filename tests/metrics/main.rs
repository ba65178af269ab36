//! Tests of `ddil-metrics`, a module for each of its files.

mod classes;
mod classifier;
mod coverage;
mod diversity;
mod features;
mod frechet;
mod golden;
mod image_input;
mod kid;
mod reference;
mod report;
mod resampling;
mod wasserstein;

use ddil_libtorch::ArgumentError;
use tch::{Kind, Tensor, kind};

/// Standard normal features, from a seed.
fn normal(seed: i64, n: i64, dim: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn([n, dim], kind::DOUBLE_CPU)
}

/// Features with one value that is not a number.
fn with_a_nan(n: i64, dim: i64) -> Tensor {
    let features = Tensor::ones([n, dim], kind::DOUBLE_CPU);
    let _ = features.get(n - 1).get(dim - 1).fill_(f64::NAN);
    features
}

/// `n` rows of one feature, `start`, `start + 1`, ...
fn ladder(start: i64, n: i64) -> Tensor {
    Tensor::arange_start(start, start + n, kind::DOUBLE_CPU).view([n, 1])
}

fn assert_close(found: f64, expected: f64, relative: f64) {
    let tolerance = relative * expected.abs().max(1.0);
    assert!((found - expected).abs() <= tolerance, "{found}, expected {expected} +- {tolerance}");
}

/// What every function of two feature sets must refuse.
fn assert_refuses_bad_pairs(metric: impl Fn(&Tensor, &Tensor) -> ddil_metrics::Result<f64>) {
    use ddil_metrics::Error;
    let good = normal(0, 12, 3);
    let refused = |a: &Tensor, b: &Tensor| metric(a, b).expect_err("bad features");

    assert!(matches!(
        refused(&good, &normal(0, 12, 4)),
        Error::FeatureMismatch { left: (_, 3), right: (_, 4), .. }
    ));
    for bad in [with_a_nan(12, 3), with_a_nan(12, 3).nan_to_num(f64::INFINITY, None, None)] {
        assert!(matches!(refused(&bad, &good), Error::NonFinite { found: 1, .. }));
        assert!(matches!(refused(&good, &bad), Error::NonFinite { found: 1, .. }));
    }
    for bad in [good.view([36]), good.view([12, 3, 1]), good.narrow(1, 0, 0)] {
        assert!(matches!(refused(&bad, &good), Error::Argument(ArgumentError::Shape { .. })));
    }
    assert!(matches!(refused(&good.narrow(0, 0, 0), &good), Error::TooFewSamples { .. }));
    // Whole numbers are valid values.
    assert!(metric(&good.to_kind(Kind::Int64), &good).is_ok());
}
