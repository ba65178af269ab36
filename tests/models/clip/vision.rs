//! `ClipVisionModel` against recorded outputs of transformers, and its errors.

use ddil_libtorch::ArgumentError;
use ddil_models::{ClipVisionModel, Error, Placement, UnknownKeys, weights};
use tch::{Kind, Tensor, kind};
use tempfile::TempDir;

use super::{TOLERANCE, expected};
use crate::common::{TestResult, golden, relative_error};

fn load(placement: Placement) -> ddil_models::Result<ClipVisionModel> {
    ClipVisionModel::from_folder(golden("clip_vision"), placement, UnknownKeys::Refuse)
}

#[test]
fn outputs_are_those_of_transformers() -> TestResult {
    let recorded = expected("clip_vision")?;
    for (kind, channels_last, tolerance) in [
        (Kind::Float, false, TOLERANCE),
        (Kind::Float, true, TOLERANCE),
        (Kind::BFloat16, false, 2e-2),
    ] {
        let tower = load(Placement { kind, channels_last, ..Placement::default() })?;
        // Of another kind than the parameters in the last case: it is cast.
        let output = tower.forward(&recorded["pixel_values"])?;
        let embeds = output.image_embeds.expect("there is a projection");
        for (part, found) in [
            ("last_hidden_state", &output.last_hidden_state),
            ("pooled", &output.pooled),
            ("image_embeds", &embeds),
        ] {
            assert_eq!(found.kind(), kind);
            let error = relative_error(&found.to_kind(Kind::Float), &recorded[part]);
            println!("{part} {kind:?}: {error:.1e}");
            assert!(error <= tolerance, "{part} {kind:?}: {error}");
        }
    }
    Ok(())
}

#[test]
fn saved_weights_load_again() -> TestResult {
    let (tower, folder) = (load(Placement::default())?, TempDir::new()?);
    tower.save_to_folder(folder.path())?;
    let held = weights::read_all(folder.path().join("model.safetensors"))?;
    assert!(held.contains_key("vision_model.pre_layrnorm.weight"));
    let again =
        ClipVisionModel::from_folder(folder.path(), Placement::default(), UnknownKeys::Refuse)?;
    assert_eq!(again.config(), tower.config());
    let pixels = &expected("clip_vision")?["pixel_values"];
    assert_eq!(again.forward(pixels)?.pooled, tower.forward(pixels)?.pooled);
    Ok(())
}

#[test]
fn images_that_do_not_fit_are_refused_by_name() -> TestResult {
    let tower = load(Placement::default())?;
    for size in [vec![3, 28, 28], vec![1, 1, 28, 28], vec![1, 3, 28, 27], vec![1, 3, 29, 28]] {
        let error = tower.forward(&Tensor::zeros(&size, kind::FLOAT_CPU));
        let text = error.expect_err("it does not fit").to_string();
        assert!(text.contains("`pixel_values`") && text.contains("[batch, 3, 28, 28]"), "{text}");
    }
    let integers = tower.forward(&Tensor::zeros([1, 3, 28, 28], kind::INT64_CPU));
    assert!(matches!(
        integers,
        Err(Error::Argument(ArgumentError::Kind { name: "pixel_values", .. }))
    ));
    Ok(())
}
