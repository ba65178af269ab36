//! `ClipScore` against recorded outputs of transformers, and its errors.

use ddil_libtorch::ArgumentError;
use ddil_metrics::ImageInput;
use ddil_models::{ClipModel, ClipScore, Error, Placement, UnknownKeys};
use tch::{Kind, Tensor, kind};

use super::{TOLERANCE, expected};
use crate::common::{TestResult, golden, relative_error};

/// Shapes of recorded images.
const NUM_SHAPES: usize = 3;

fn score(placement: Placement) -> Result<ClipScore, Box<dyn std::error::Error>> {
    let model = ClipModel::from_folder(golden("clip"), placement, UnknownKeys::Refuse)?;
    Ok(ClipScore::new(model))
}

/// As the network expects images, rounded to 8 bits or not.
fn prepared(images: &Tensor, rounded: bool) -> ddil_metrics::Result<Tensor> {
    let mut input = ImageInput::clip(28);
    input.rounded = rounded;
    input.prepare(&(images.to_kind(Kind::Float) / 127.5 - 1.0))
}

#[test]
fn images_are_preprocessed_as_in_the_reference() -> TestResult {
    let recorded = expected("clip")?;
    for i in 0..NUM_SHAPES {
        for (rounded, name) in [(false, "pixel_values"), (true, "rounded_pixel_values")] {
            let found = prepared(&recorded[&format!("{i}.images")], rounded)?;
            let error = relative_error(&found, &recorded[&format!("{i}.{name}")]);
            println!("shape {i} {name}: {error:.1e}");
            assert!(error <= TOLERANCE, "shape {i} {name}: {error}");
        }
    }
    Ok(())
}

#[test]
fn cosines_are_those_of_transformers() -> TestResult {
    let recorded = expected("clip")?;
    let (ids, mask) = (&recorded["input_ids"], &recorded["attention_mask"]);
    for (kind, tolerance) in [(Kind::Float, TOLERANCE), (Kind::BFloat16, 2e-2)] {
        let score = score(Placement { kind, ..Placement::default() })?;
        for i in 0..NUM_SHAPES {
            for (rounded, name) in [(false, "cosines"), (true, "rounded_cosines")] {
                let pixels = prepared(&recorded[&format!("{i}.images")], rounded)?;
                let found = score.similarities(&pixels, ids, Some(mask))?;
                assert_eq!((found.size(), found.kind()), (vec![2], Kind::Float));
                let cosines = &recorded[&format!("{i}.{name}")];
                let error = (&found - cosines).abs().max().double_value(&[]);
                println!("shape {i} {name} {kind:?}: {error:.1e}");
                assert!(error <= tolerance, "shape {i} {name} {kind:?}: {error}");
                let mean = found.mean(Kind::Double).double_value(&[]);
                assert_eq!(score.score(&pixels, ids, Some(mask))?, mean);
            }
        }
    }
    Ok(())
}

#[test]
fn embeddings_have_length_one_and_the_temperature_is_read() -> TestResult {
    let (score, recorded) = (score(Placement::default())?, expected("clip")?);
    let images = score.image_embeds(&prepared(&recorded["0.images"], true)?)?;
    let text = score.text_embeds(&recorded["input_ids"], None)?;
    for embeds in [images, text] {
        let lengths = embeds.square().sum_dim_intlist(1, false, Kind::Float);
        assert!((lengths - 1.0).abs().max().double_value(&[]) < 1e-5);
    }
    assert!((score.model().temperature()? - 2.6592_f64.exp()).abs() < 1e-5);
    Ok(())
}

#[test]
fn black_and_white_survive_resizing() -> TestResult {
    for rounded in [false, true] {
        let white = prepared(&Tensor::full([1, 3, 9, 50], 255, kind::FLOAT_CPU), rounded)?;
        assert_eq!(white.size(), [1, 3, 28, 28]);
        let expected = (1.0 - 0.481_454_66) / 0.268_629_54;
        let red = white.get(0).get(0);
        assert!((red - expected).abs().max().double_value(&[]) < 1e-5);
    }
    Ok(())
}

#[test]
fn empty_batches_and_invalid_images_are_refused() -> TestResult {
    let score = score(Placement::default())?;
    let images = |size: &[i64]| Tensor::zeros(size, kind::FLOAT_CPU);
    let ids = Tensor::zeros([2, 5], kind::INT64_CPU);
    let three = score.similarities(&images(&[3, 3, 28, 28]), &ids, None);
    assert!(matches!(three, Err(Error::Argument(ArgumentError::Shape { name: "input_ids", .. }))));
    let shape = |found: ddil_models::Result<f64>| {
        matches!(found, Err(Error::Argument(ArgumentError::Shape { name: "pixel_values", .. })))
    };
    assert!(shape(score.score(&images(&[0, 3, 28, 28]), &ids.narrow(0, 0, 0), None)));
    for size in [vec![2, 1, 28, 28], vec![2, 3, 28], vec![2, 3, 0, 8]] {
        assert!(shape(score.score(&images(&size), &ids, None)), "{size:?}");
    }
    let bytes = images(&[2, 3, 28, 28]).to_kind(Kind::Uint8);
    let integers = score.score(&bytes, &ids, None);
    assert!(matches!(
        integers,
        Err(Error::Argument(ArgumentError::Kind { name: "pixel_values", .. }))
    ));
    Ok(())
}
