//! CLIP against recorded outputs of transformers, and its errors.

mod config;
mod score;
mod text;
mod tokenizer;
mod vision;

use std::collections::BTreeMap;

use ddil_models::{ClipTextModel, ClipVisionModel, NetworkConfig, Placement, UnknownKeys, weights};
use tch::Tensor;

use crate::common::{TestResult, golden};

/// Relative to the largest value, in `Float`.
const TOLERANCE: f64 = 1e-5;

fn expected(name: &str) -> ddil_models::Result<BTreeMap<String, Tensor>> {
    weights::read_all(golden(name).join("expected.safetensors"))
}

/// Then `tools/record/record_clip.py --check` loads every folder in transformers.
#[test]
#[ignore = "needs DDIL_WRITE_MODELS, a folder to write networks to"]
fn write_folders_for_transformers() -> TestResult {
    let root = std::path::PathBuf::from(std::env::var("DDIL_WRITE_MODELS")?);
    let place = Placement::default();
    let save = |name: &str, input: &str, input_values: &Tensor, output: Tensor| {
        let recorded = [
            (input.to_owned(), input_values.shallow_clone()),
            ("last_hidden_state".to_owned(), output),
        ];
        weights::save(&recorded, root.join(name).join("expected.safetensors"), &BTreeMap::new())
    };
    // Fresh parameters: nothing that transformers wrote is left in the folder.
    for name in ["clip_text", "clip_text_with_projection"] {
        let recorded = ClipTextModel::from_folder(golden(name), place, UnknownKeys::Refuse)?;
        let encoder = recorded.config().build(place, 1)?;
        encoder.save_to_folder(root.join(name))?;
        let ids = &expected(name)?["input_ids"];
        save(name, "input_ids", ids, encoder.forward(ids, None)?.last_hidden_state)?;
    }
    let name = "clip_vision";
    let recorded = ClipVisionModel::from_folder(golden(name), place, UnknownKeys::Refuse)?;
    let tower = recorded.config().build(place, 1)?;
    tower.save_to_folder(root.join(name))?;
    let pixels = &expected(name)?["pixel_values"];
    save(name, "pixel_values", pixels, tower.forward(pixels)?.last_hidden_state)?;
    Ok(())
}
