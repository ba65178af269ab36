//! `ClipScore` against recorded outputs of transformers, and its errors.

use ddil_libtorch::ArgumentError;
use ddil_models::{ClipModel, ClipScore, Error, Placement, UnknownKeys};
use tch::{Kind, Tensor, kind};

use super::{TOLERANCE, expected};
use crate::common::{TestResult, golden, relative_error};

/// Shapes of recorded images.
const NUM_SHAPES: usize = 3;

fn score(placement: Placement) -> Result<ClipScore, Box<dyn std::error::Error>> {
    let model = ClipModel::from_folder(golden("clip"), placement, UnknownKeys::Refuse)?;
    Ok(ClipScore::new(model)?)
}

fn signed(images: &Tensor) -> Tensor {
    images.to_kind(Kind::Float) / 127.5 - 1.0
}

#[test]
fn images_are_preprocessed_as_in_the_reference() -> TestResult {
    let (score, recorded) = (score(Placement::default())?, expected("clip")?);
    for i in 0..NUM_SHAPES {
        let found = score.preprocess(&signed(&recorded[&format!("{i}.images")]))?;
        let error = relative_error(&found, &recorded[&format!("{i}.pixel_values")]);
        println!("shape {i}: {error:.1e}");
        assert!(error <= TOLERANCE, "shape {i}: {error}");
        // Half a step of 8 bits after each direction, and as much of the weights' own rounding, over the smallest
        // deviation of a channel.
        let rounded = (found - &recorded[&format!("{i}.rounded_pixel_values")]).abs().max();
        let rounded = rounded.double_value(&[]);
        println!("shape {i}, against 8 bits: {rounded:.1e}");
        assert!(rounded <= 2.0 / 255.0 / 0.26, "shape {i}: {rounded}");
    }
    Ok(())
}

#[test]
fn cosines_are_those_of_transformers() -> TestResult {
    let recorded = expected("clip")?;
    let (ids, mask) = (&recorded["input_ids"], &recorded["attention_mask"]);
    for (kind, tolerance, rounded_tolerance) in
        [(Kind::Float, TOLERANCE, 1e-3), (Kind::BFloat16, 2e-2, 2e-2)]
    {
        let score = score(Placement { kind, ..Placement::default() })?;
        for i in 0..NUM_SHAPES {
            let images = signed(&recorded[&format!("{i}.images")]);
            let found = score.similarities(&images, ids, Some(mask))?;
            assert_eq!((found.size(), found.kind()), (vec![2], Kind::Float));
            for (name, tolerance) in
                [("cosines", tolerance), ("rounded_cosines", rounded_tolerance)]
            {
                let cosines = &recorded[&format!("{i}.{name}")];
                let error = (&found - cosines).abs().max().double_value(&[]);
                println!("shape {i} {name} {kind:?}: {error:.1e}");
                assert!(error <= tolerance, "shape {i} {name} {kind:?}: {error}");
            }
            let mean = found.mean(Kind::Double).double_value(&[]);
            assert_eq!(score.score(&images, ids, Some(mask))?, mean);
        }
    }
    Ok(())
}

#[test]
fn embeddings_have_length_one_and_the_temperature_is_read() -> TestResult {
    let (score, recorded) = (score(Placement::default())?, expected("clip")?);
    let images = score.image_embeds(&signed(&recorded["0.images"]))?;
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
    let score = score(Placement::default())?;
    let white = score.preprocess(&Tensor::ones([1, 3, 9, 50], kind::FLOAT_CPU))?;
    assert_eq!(white.size(), [1, 3, 28, 28]);
    let expected = (1.0 - 0.481_454_66) / 0.268_629_54;
    let red = white.get(0).get(0);
    assert!((red - expected).abs().max().double_value(&[]) < 1e-5);
    Ok(())
}

#[test]
fn empty_batches_and_invalid_images_are_refused() -> TestResult {
    let score = score(Placement::default())?;
    let images = |size: &[i64]| Tensor::zeros(size, kind::FLOAT_CPU);
    let ids = Tensor::zeros([2, 5], kind::INT64_CPU);
    let three = score.similarities(&images(&[3, 3, 8, 8]), &ids, None);
    assert!(matches!(three, Err(Error::Argument(ArgumentError::Shape { name: "input_ids", .. }))));
    let none = score.score(&images(&[0, 3, 8, 8]), &ids.narrow(0, 0, 0), None);
    assert!(matches!(none, Err(Error::Argument(ArgumentError::Shape { name: "images", .. }))));
    for size in [vec![2, 1, 8, 8], vec![2, 3, 8], vec![2, 3, 0, 8]] {
        let error = score.preprocess(&images(&size));
        assert!(
            matches!(error, Err(Error::Argument(ArgumentError::Shape { name: "images", .. }))),
            "{size:?}"
        );
    }
    let integers = score.preprocess(&images(&[2, 3, 8, 8]).to_kind(Kind::Uint8));
    assert!(matches!(integers, Err(Error::Argument(ArgumentError::Kind { name: "images", .. }))));
    Ok(())
}
