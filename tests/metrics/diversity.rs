//! Mean pairwise and energy distance.

use ddil_libtorch::ArgumentError;
use ddil_metrics::{
    Error, TorchScriptDistance, energy_distance, mean_cosine_distance, mean_pairwise_distance,
};
use tch::{CModule, Device, Kind, Tensor, kind};

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

/// All pairs one by one, and lengths do not matter.
#[test]
fn cosines_of_all_pairs() -> ddil_metrics::Result<()> {
    let x = normal(3, 7, 4);
    let unit = &x / x.norm_scalaropt_dim(2.0, [1_i64].as_slice(), true);
    let cosines = unit.matmul(&unit.tr());
    let mut sum = 0.0;
    for i in 0..7 {
        for j in 0..i {
            sum += 1.0 - cosines.double_value(&[i, j]);
        }
    }
    assert_close(mean_cosine_distance(&x)?, sum / 21.0, 1e-12);
    let scaled = &x * Tensor::from_slice(&[1.0, 2.0, 3.0, 1e-9, 1e9, 5.0, 6.0]).view([7, 1]);
    assert_close(mean_cosine_distance(&scaled)?, sum / 21.0, 1e-12);
    let same = Tensor::full([6, 4], 0.1, kind::FLOAT_CPU);
    assert!(mean_cosine_distance(&same)? < 1e-12);
    Ok(())
}

/// A `TorchScript` file of a function of two batches.
fn compares(
    folder: &tempfile::TempDir,
    forward: fn(&Tensor, &Tensor) -> Tensor,
) -> ddil_metrics::Result<TorchScriptDistance> {
    let path = folder.path().join("distance.pt");
    let mut closure = |inputs: &[Tensor]| vec![forward(&inputs[0], &inputs[1])];
    let images = [(); 2].map(|()| Tensor::ones([2, 3, 4, 4], kind::FLOAT_CPU));
    CModule::create_by_tracing("distance", "forward", &images, &mut closure)
        .and_then(|module| module.save(&path))
        .expect("the folder can be written");
    TorchScriptDistance::from_file(&path, Device::Cpu)
}

fn mean_gap(a: &Tensor, b: &Tensor) -> Tensor {
    (a - b).abs().mean_dim([1_i64, 2, 3].as_slice(), true, Kind::Float)
}

/// More pairs than one pass takes; the mean gap of two numbers of a ladder is known.
#[test]
fn a_network_compares_all_pairs() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let distance = compares(&folder, mean_gap)?;
    assert!(distance.id().starts_with("distance-") && distance.id().len() == 9 + 64);
    let ladder =
        Tensor::arange(12, kind::FLOAT_CPU).view([12, 1, 1, 1]).expand([12, 3, 4, 4], false);
    assert_close(distance.mean_pairwise(&(&ladder * 0.1))?, 1.3 / 3.0, 1e-6);
    let found = distance.between(&ladder, &(&ladder + 0.5))?;
    assert_eq!((found.size(), found.double_value(&[3])), (vec![12], 0.5));
    Ok(())
}

#[test]
fn bad_comparisons() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let images = Tensor::zeros([3, 3, 4, 4], kind::FLOAT_CPU);
    let maps = compares(&folder, |a, b| (a - b).abs())?;
    let said = maps.mean_pairwise(&images).expect_err("a map is no distance").to_string();
    assert!(said.contains("[3, 3, 4, 4] for 3 pairs") && said.contains("[3, 1, 1, 1]"), "{said}");
    let distance = compares(&folder, mean_gap)?;
    let one = images.narrow(0, 0, 1);
    assert!(matches!(distance.mean_pairwise(&one), Err(Error::TooFewSamples { found: 1, .. })));
    for bad in [one, Tensor::zeros([3, 3, 4, 5], kind::FLOAT_CPU), images.view([3, 3, 16])] {
        let refused = distance.between(&images, &bad);
        let shape = matches!(refused, Err(Error::Argument(ArgumentError::Shape { name: "b", .. })));
        assert!(shape, "{refused:?}");
    }
    let infinite = distance.between(&images, &(&images / 0.0));
    assert!(matches!(infinite, Err(Error::NonFinite { .. })));
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
