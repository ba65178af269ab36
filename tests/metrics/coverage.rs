//! Precision, recall, density, coverage: known expectations, and sets of points on a line.

use ddil_metrics::{Error, Neighbours, density_coverage, prdc, precision_recall};
use proptest::prelude::*;
use tch::Tensor;

use crate::{assert_refuses_bad_pairs, ladder, normal};

/// For equal distributions density is 1 on average and coverage `1 - prod_{l=1..k} (n - l) / (n + m - l)`, in any
/// dimension.
#[test]
fn equal_distributions() -> ddil_metrics::Result<()> {
    let (n, m, k) = (300, 200, 5);
    let repeats = 30;
    let (mut density, mut coverage) = (0.0, 0.0);
    for seed in 0..repeats {
        let both = normal(seed, n + m, 6);
        let found = density_coverage(&both.narrow(0, 0, n), &both.narrow(0, n, m), k)?;
        density += found.density / repeats as f64;
        coverage += found.coverage / repeats as f64;
    }
    let missed: f64 = (1..=i64::from(k)).map(|l| (n - l) as f64 / (n + m - l) as f64).product();
    // Standard errors over the repeats are near 0.016 and 0.003.
    assert!((density - 1.0).abs() < 0.06, "{density}");
    assert!((coverage - (1.0 - missed)).abs() < 0.012, "{coverage}, expected {}", 1.0 - missed);
    Ok(())
}

/// Ten thousand of each would take too long; the formula gives the values.
#[test]
fn expected_coverage_of_large_sets() {
    let missed: f64 = (1..=5).map(|l| f64::from(10_000 - l) / f64::from(20_000 - l)).product();
    assert!((1.0 - missed - 0.969).abs() < 1e-3);
}

/// On 0, 1, ..., 9 every radius is 1 (2 at the ends for k = 2), and a sample at 4.25 is in the balls of 4 and 5.
#[test]
fn counted_by_hand() -> ddil_metrics::Result<()> {
    let real = ladder(0, 10);
    let fake = Tensor::from_slice(&[4.25, 4.5, 30.0, 31.0]).view([4, 1]);
    let found = prdc(&real, &fake, Neighbours { precision_recall: 1, density_coverage: 2 })?;
    assert_eq!(found.precision, 0.5);
    // With k = 2 radii are 1 inside: 4.25 and 4.5 are within 1 of 4 and of 5 only.
    assert_eq!(found.density, 4.0 / (2.0 * 4.0));
    assert_eq!(found.coverage, 0.2);
    // Radii of the samples are 0.25, 0.25, 1, 1: no real sample is inside the first two balls.
    assert_eq!(found.recall, 0.0);
    Ok(())
}

/// The border of a ball is not in it.
#[test]
fn strictly_inside() -> ddil_metrics::Result<()> {
    let real = ladder(0, 4);
    let on_the_border = Tensor::from_slice(&[-1.0, 4.0]).view([2, 1]);
    let found = density_coverage(&real, &on_the_border, 1)?;
    assert_eq!((found.density, found.coverage), (0.0, 0.0));
    Ok(())
}

/// A set against itself: `k` neighbours would be in the ball, but the farthest is on its border, and the sample itself
/// takes its place.
#[test]
fn a_set_against_itself() -> ddil_metrics::Result<()> {
    let real = normal(4, 80, 5);
    let found = prdc(&real, &real, Neighbours::default())?;
    assert_eq!(
        (found.precision, found.recall, found.density, found.coverage),
        (1.0, 1.0, 1.0, 1.0)
    );
    Ok(())
}

/// Samples in one of two far modes are precise and miss half.
#[test]
fn half_of_the_modes() -> ddil_metrics::Result<()> {
    let real = Tensor::cat(&[normal(5, 100, 3) - 50.0, normal(6, 100, 3) + 50.0], 0);
    let found = prdc(&real, &(normal(7, 200, 3) + 50.0), Neighbours::default())?;
    assert!(found.precision > 0.8 && found.recall < 0.5 && found.recall > 0.35, "{found:?}");
    assert!(found.coverage > 0.4 && found.coverage <= 0.5, "{found:?}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Recall is precision with the sets exchanged, and neither depends on scale or origin.
    #[test]
    fn symmetries(seed in 0_i64..1000, k in 1_u32..5, doublings in -3_i32..4) {
        let (real, fake) = (normal(seed, 30, 3), normal(seed + 1, 40, 3) * 0.8);
        let there = precision_recall(&real, &fake, k).expect("good features");
        let back = precision_recall(&fake, &real, k).expect("good features");
        prop_assert_eq!((there.precision, there.recall), (back.recall, back.precision));

        let scale = 2.0_f64.powi(doublings);
        let scaled = prdc(&(&real * scale), &(&fake * scale), Neighbours::default());
        let plain = prdc(&real, &fake, Neighbours::default());
        prop_assert_eq!(scaled.expect("good features"), plain.expect("good features"));
    }
}

#[test]
fn bad_input() {
    assert_refuses_bad_pairs(|a, b| prdc(a, b, Neighbours::default()).map(|found| found.density));
    let real = normal(0, 5, 2);
    assert!(matches!(precision_recall(&real, &real, 0), Err(Error::Invalid(_))));
    assert!(matches!(
        precision_recall(&real, &real, 5),
        Err(Error::TooFewSamples { found: 5, needed: 6, .. })
    ));
    assert!(precision_recall(&real, &real, 4).is_ok());
}
