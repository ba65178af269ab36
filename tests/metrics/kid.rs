//! Kernel distance.

use ddil_metrics::{Error, kid};

use crate::{assert_refuses_bad_pairs, ladder, normal};

/// No bias: over many draws of two sets from one distribution the mean is 0.
#[test]
fn equal_distributions() -> ddil_metrics::Result<()> {
    let found: Vec<f64> = (0..100)
        .map(|seed| {
            let both = normal(seed, 60, 4);
            kid(&both.narrow(0, 0, 25), &both.narrow(0, 25, 35))
        })
        .collect::<ddil_metrics::Result<_>>()?;
    let n = found.len() as f64;
    let mean = found.iter().sum::<f64>() / n;
    let variance = found.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    assert!(mean.abs() < 3.5 * (variance / n).sqrt(), "{mean} +- {}", (variance / n).sqrt());
    assert!(found.iter().any(|&value| value < 0.0));
    Ok(())
}

/// The kernel of degree three depends on third moments: equal means and variances do not hide a skewed distribution.
#[test]
fn sees_skewness() -> ddil_metrics::Result<()> {
    let plain = normal(1, 2000, 1);
    let skewed = (normal(2, 2000, 1).square() - 1.0) / 2.0_f64.sqrt();
    let null = kid(&plain, &normal(3, 2000, 1))?;
    let found = kid(&plain, &skewed)?;
    assert!(found > 10.0 * null.abs() && found > 3.0, "{found}, null {null}");
    Ok(())
}

#[test]
fn bad_features() {
    assert_refuses_bad_pairs(kid);
    assert!(matches!(kid(&ladder(0, 1), &ladder(0, 2)), Err(Error::TooFewSamples { .. })));
}
