//! Fréchet distance: closed forms, streaming, storage.

use ddil_metrics::{Error, Moments, Statistics, frechet_distance};
use proptest::prelude::*;
use tch::{Kind, Tensor, kind};

use crate::{assert_close, assert_refuses_bad_pairs, ladder, normal, with_a_nan};

/// Features whose mean and covariance are given exactly: corners of a box, doubled to have `n - 1` come out.
fn with_statistics(mean: &[f64], deviations: &[f64]) -> Tensor {
    let dim = mean.len() as u32;
    let corners: Vec<f64> = (0..1_u32 << dim)
        .flat_map(|corner| (0..dim).map(move |axis| f64::from(corner >> axis & 1) * 2.0 - 1.0))
        .collect();
    let n = 1_i64 << dim;
    let scale = ((n - 1) as f64 / n as f64).sqrt();
    let corners = Tensor::from_slice(&corners).view([n, i64::from(dim)]);
    corners * Tensor::from_slice(deviations) * scale + Tensor::from_slice(mean)
}

fn distance(a: &Tensor, b: &Tensor) -> ddil_metrics::Result<f64> {
    frechet_distance(&Statistics::from_features(a)?, &Statistics::from_features(b)?)
}

/// Covariances that commute: the sum over axes of squared gaps in mean and in deviation.
#[test]
fn axis_aligned_gaussians() -> ddil_metrics::Result<()> {
    let a = with_statistics(&[0.0, 1.0, -2.0], &[1.0, 2.0, 0.0]);
    let b = with_statistics(&[0.5, 1.0, 2.0], &[3.0, 0.5, 0.25]);
    let means = 0.5_f64.powi(2) + 4.0_f64.powi(2);
    let deviations = 2.0_f64.powi(2) + 1.5_f64.powi(2) + 0.25_f64.powi(2);
    assert_close(distance(&a, &b)?, means + deviations, 1e-12);
    Ok(())
}

/// Covariances that do not commute: in two dimensions `tr (A B)^1/2 = sqrt(tr(A B) + 2 sqrt(det A det B))`.
#[test]
fn tilted_gaussians() -> ddil_metrics::Result<()> {
    let upright = with_statistics(&[0.0, 0.0], &[3.0, 1.0]);
    let (sin, cos) = 0.7_f64.sin_cos();
    let turn = Tensor::from_slice(&[cos, sin, -sin, cos]).view([2, 2]);
    let tilted = with_statistics(&[0.0, 0.0], &[3.0, 1.0]).matmul(&turn);
    let trace_of_product = (81.0 + 1.0) * cos * cos + (9.0 + 9.0) * sin * sin;
    let cross = (trace_of_product + 2.0 * 9.0_f64).sqrt();
    assert_close(distance(&upright, &tilted)?, 2.0 * 10.0 - 2.0 * cross, 1e-12);
    Ok(())
}

#[test]
fn fewer_samples_than_features_make_no_trouble() -> ddil_metrics::Result<()> {
    let a = normal(1, 5, 40);
    assert_close(distance(&a, &a)?, 0.0, 1e-9);
    assert_close(distance(&a, &(&a + 2.0))?, 4.0 * 40.0, 1e-9);
    Ok(())
}

#[test]
fn a_large_mean_loses_no_precision() -> ddil_metrics::Result<()> {
    let a = normal(2, 200, 3);
    let mut moments = Moments::new();
    for batch in (&a + 1e6).split(7, 0) {
        moments.extend(&batch)?;
    }
    let (near, far) = (Statistics::from_features(&a)?, moments.build()?);
    for (near, far) in near.covariance().iter().zip(far.covariance()) {
        assert_close(*far, *near, 1e-8);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Cutting a set into batches changes nothing.
    #[test]
    fn batches_merge(seed in 0_i64..1000, n in 2_i64..60, size in 1_i64..20) {
        let features = normal(seed, n, 3) * 2.0 + 5.0;
        let mut moments = Moments::new();
        for batch in features.split(size, 0) {
            moments.extend(&batch).expect("good features");
        }
        let merged = moments.build().expect("two samples or more");
        let whole = Statistics::from_features(&features).expect("two samples or more");
        prop_assert_eq!(merged.num_samples(), Some(n as u64));
        for (merged, whole) in merged.mean().iter().zip(whole.mean()) {
            prop_assert!((merged - whole).abs() < 1e-12);
        }
        for (merged, whole) in merged.covariance().iter().zip(whole.covariance()) {
            prop_assert!((merged - whole).abs() < 1e-10);
        }
    }

    /// The distance is symmetric, at least 0, and 0 from a set to itself.
    #[test]
    fn is_a_distance(seed in 0_i64..1000, scale in 0.1_f64..3.0) {
        let a = normal(seed, 30, 4);
        let b = normal(seed + 1, 20, 4) * scale;
        let there = distance(&a, &b).expect("good features");
        let back = distance(&b, &a).expect("good features");
        prop_assert!(there > 0.0);
        prop_assert!((there - back).abs() < 1e-10);
        prop_assert!(distance(&a, &a).expect("good features").abs() < 1e-10);
    }
}

#[test]
fn covariance_divides_by_one_less_than_the_count() -> ddil_metrics::Result<()> {
    let statistics = Statistics::from_features(&ladder(0, 3))?;
    assert_eq!((statistics.mean(), statistics.covariance()), ([1.0].as_slice(), [1.0].as_slice()));
    assert_eq!((statistics.dim(), statistics.num_samples()), (1, Some(3)));
    Ok(())
}

#[test]
fn stored_and_read_back() -> Result<(), Box<dyn std::error::Error>> {
    let statistics = Statistics::from_features(&normal(3, 20, 5))?;
    let stored = serde_json::to_string(&statistics)?;
    assert_eq!(serde_json::from_str::<Statistics>(&stored)?, statistics);

    for (damage, complaint) in [
        (stored.replacen("\"mean\":[", "\"mean\":[0.5,", 1), "square of the mean's 6 values"),
        (stored.replacen("\"num_samples\":20", "\"num_samples\":1", 1), "at least 2"),
        (stored.replacen("\"num_samples\"", "\"samples\"", 1), "unknown field"),
    ] {
        let error = serde_json::from_str::<Statistics>(&damage).expect_err("damaged");
        assert!(error.to_string().contains(complaint), "{error}");
    }
    Ok(())
}

#[test]
fn half_precision_features_are_summed_in_double() -> ddil_metrics::Result<()> {
    // In f16 a count stops at 2048.
    let features = Tensor::ones([5000, 1], kind::DOUBLE_CPU);
    let _ = features.narrow(0, 0, 2500).fill_(3.0);
    let statistics = Statistics::from_features(&features.to_kind(Kind::Half))?;
    assert_close(statistics.mean()[0], 2.0, 1e-12);
    Ok(())
}

#[test]
fn bad_features() {
    assert_refuses_bad_pairs(distance);
    let one = Statistics::from_features(&ladder(0, 1)).expect_err("one sample has no covariance");
    assert!(matches!(one, Error::TooFewSamples { found: 1, needed: 2, .. }));
    let none = Moments::new().build().expect_err("no sample at all");
    assert!(matches!(none, Error::TooFewSamples { found: 0, .. }));

    let mut moments = Moments::new();
    moments.extend(&ladder(0, 3)).expect("good features");
    assert!(matches!(moments.extend(&normal(0, 3, 2)), Err(Error::FeatureMismatch { .. })));
    assert!(matches!(moments.extend(&with_a_nan(3, 1)), Err(Error::NonFinite { found: 1, .. })));
    let kept = moments.build().expect("the refused batches left no trace");
    assert_eq!(kept, Statistics::from_features(&ladder(0, 3)).expect("good features"));
}

#[test]
fn a_covariance_that_would_exhaust_memory_is_refused() {
    let most = Statistics::MAX_DIM as i64;
    let features = Tensor::zeros([2, most + 1], kind::FLOAT_CPU);
    let error = Moments::new().extend(&features).expect_err("it takes two GiB").to_string();
    assert!(error.contains("[2, 16385]") && error.contains("2.0 GiB"), "{error}");
}
