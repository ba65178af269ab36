//! `Dinov2Model` against recorded outputs of transformers, its settings, and its errors.

use std::collections::BTreeMap;
use std::fs;

use ddil_files::Invalid;
use ddil_metrics::{ImageInput, Resize};
use ddil_models::{
    Activation, Dinov2Config, Dinov2Model, Error, NetworkConfig, Placement, UnknownKeys, weights,
};
use serde_json::{Value, json};
use tch::{Kind, Tensor, kind};
use tempfile::TempDir;

use crate::common::{TestResult, golden, relative_error};

/// Relative to the largest value, in `Float`.
const TOLERANCE: f64 = 1e-5;
/// The networks that were recorded.
const NAMES: [&str; 2] = ["dinov2", "dinov2_gated"];

fn load(name: &str, placement: Placement) -> ddil_models::Result<Dinov2Model> {
    Dinov2Model::from_folder(golden(name), placement, UnknownKeys::Refuse)
}

fn expected(name: &str) -> ddil_models::Result<BTreeMap<String, Tensor>> {
    weights::read_all(golden(name).join("expected.safetensors"))
}

/// At the size of the position embeddings, and at two others, for which they are interpolated.
#[test]
fn outputs_are_those_of_transformers() -> TestResult {
    for name in NAMES {
        let recorded = expected(name)?;
        for (kind, channels_last, tolerance) in [
            (Kind::Float, false, TOLERANCE),
            (Kind::Float, true, TOLERANCE),
            (Kind::BFloat16, false, 3e-2),
        ] {
            let network = load(name, Placement { kind, channels_last, ..Placement::default() })?;
            for size in ["", "smaller.", "larger."] {
                // Of another kind than the parameters in the last case: it is cast.
                let output = network.forward(&recorded[&format!("{size}pixel_values")])?;
                for (part, found) in
                    [("last_hidden_state", &output.last_hidden_state), ("pooled", &output.pooled)]
                {
                    assert_eq!(found.kind(), kind);
                    let found = found.to_kind(Kind::Float);
                    let error = relative_error(&found, &recorded[&format!("{size}{part}")]);
                    println!("{name} {size}{part} {kind:?}: {error:.1e}");
                    assert!(error <= tolerance, "{name} {size}{part} {kind:?}: {error}");
                }
            }
        }
    }
    Ok(())
}

/// From pixels to features: resized, cropped, rounded and normalised as by transformers' image processor.
#[test]
fn features_of_images_are_those_of_transformers() -> TestResult {
    let (network, recorded) = (load("dinov2", Placement::default())?, expected("dinov2")?);
    let mut input = ImageInput::imagenet();
    (input.resize, input.rounded) = (Resize::BicubicCrop { side: 32, crop: 28 }, true);
    for i in 0..3 {
        let pixels = input.prepare(&recorded[&format!("{i}.images")])?;
        let error = relative_error(&pixels, &recorded[&format!("{i}.pixel_values")]);
        println!("shape {i}: pixels {error:.1e}");
        assert!(error <= TOLERANCE, "shape {i}: {error}");
        let error =
            relative_error(&network.forward(&pixels)?.pooled, &recorded[&format!("{i}.pooled")]);
        println!("shape {i}: features {error:.1e}");
        assert!(error <= TOLERANCE, "shape {i}: {error}");
    }
    Ok(())
}

#[test]
fn saved_weights_load_again() -> TestResult {
    for name in NAMES {
        let (network, folder) = (load(name, Placement::default())?, TempDir::new()?);
        network.save_to_folder(folder.path())?;
        let again =
            Dinov2Model::from_folder(folder.path(), Placement::default(), UnknownKeys::Refuse)?;
        assert_eq!(again.config(), network.config());
        let pixels = &expected(name)?["pixel_values"];
        assert_eq!(again.forward(pixels)?.pooled, network.forward(pixels)?.pooled);
    }
    Ok(())
}

/// Then `tools/record/record_dinov2.py --check` loads every folder in transformers.
#[test]
#[ignore = "needs DDIL_WRITE_MODELS, a folder to write networks to"]
fn write_folders_for_transformers() -> TestResult {
    let root = std::path::PathBuf::from(std::env::var("DDIL_WRITE_MODELS")?);
    for name in NAMES {
        // Fresh parameters: nothing that transformers wrote is left in the folder.
        let network = load(name, Placement::default())?.config().build(Placement::default(), 1)?;
        network.save_to_folder(root.join(name))?;
        let pixels = expected(name)?["pixel_values"].shallow_clone();
        let output = network.forward(&pixels)?.last_hidden_state;
        let recorded =
            [("pixel_values".to_owned(), pixels), ("last_hidden_state".to_owned(), output)];
        let path = root.join(name).join("expected.safetensors");
        weights::save(&recorded, path, &BTreeMap::new())?;
    }
    Ok(())
}

#[test]
fn images_that_do_not_fit_are_refused_by_name() -> TestResult {
    let network = load("dinov2", Placement::default())?;
    for size in [vec![3, 28, 28], vec![1, 1, 28, 28], vec![1, 3, 28, 6], vec![1, 3, 0, 28]] {
        let error = network.forward(&Tensor::zeros(&size, kind::FLOAT_CPU));
        let text = error.expect_err("it does not fit").to_string();
        let expected = "[batch, 3, 7 or more, 7 or more]";
        assert!(text.contains("`pixel_values`") && text.contains(expected), "{text}");
    }
    Ok(())
}

/// The file of the published base network, as transformers 4.31 wrote it.
#[test]
fn published_settings_are_read_and_written() -> TestResult {
    let published = json!({
        "architectures": ["Dinov2Model"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 768,
        "image_size": 518,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-06,
        "layerscale_value": 1.0,
        "mlp_ratio": 4,
        "model_type": "dinov2",
        "num_attention_heads": 12,
        "num_channels": 3,
        "num_hidden_layers": 12,
        "patch_size": 14,
        "qkv_bias": true,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0.dev0",
        "use_swiglu_ffn": false
    });
    let config = Dinov2Config::from_json(&published.to_string(), UnknownKeys::Refuse)?;
    assert_eq!(config, Dinov2Config { image_size: 518, ..Dinov2Config::default() });
    assert_eq!(config.without_values()?.parameters().num_values(), 86_580_480);
    // The keys of the file, except for those of another class of the same files.
    for name in NAMES {
        let path = golden(name).join("config.json");
        let mut file: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let written = Dinov2Config::from_file(&path, UnknownKeys::Refuse)?.to_json();
        let keys = file.as_object_mut().expect("settings");
        for key in ["apply_layernorm", "dtype", "out_features", "out_indices"] {
            assert!(keys.remove(key).is_some(), "{key}");
        }
        assert!(keys.remove("reshape_hidden_states").is_some());
        assert!(keys.remove("stage_names").is_some());
        assert_eq!(file, serde_json::from_str::<Value>(&written)?, "{name}");
    }
    Ok(())
}

fn keys<T: std::fmt::Debug>(result: ddil_models::Result<T>) -> Vec<String> {
    match result {
        Err(Error::InvalidConfig { problems, .. }) => {
            problems.into_iter().map(|Invalid { field, .. }| field).collect()
        }
        other => panic!("no refusal of settings: {other:?}"),
    }
}

/// Makes one setting impossible.
type Spoil = fn(&mut Dinov2Config);

#[test]
fn impossible_settings_are_refused_by_key() {
    let small = Dinov2Config {
        hidden_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        image_size: 28,
        hidden_act: Activation::Silu,
        ..Dinov2Config::default()
    };
    assert!(small.build(Placement::default(), 0).is_ok());
    let cases: [(&str, Spoil); 9] = [
        ("hidden_size", |c| c.hidden_size = 0),
        ("num_hidden_layers", |c| c.num_hidden_layers = 0),
        ("num_attention_heads", |c| c.num_attention_heads = 3),
        ("mlp_ratio", |c| c.mlp_ratio = 0),
        ("patch_size", |c| c.patch_size = 0),
        ("image_size", |c| c.image_size = 13),
        ("layer_norm_eps", |c| c.layer_norm_eps = 0.0),
        ("drop_path_rate", |c| c.drop_path_rate = 1.0),
        ("layerscale_value", |c| c.layerscale_value = f64::NAN),
    ];
    for (key, spoil) in cases {
        let mut config = small.clone();
        spoil(&mut config);
        let found = keys(config.build(Placement::default(), 0));
        assert!(found.iter().any(|found| found == key), "{key}: {found:?}");
    }
    let classifier =
        json!({"model_type": "dinov2", "architectures": ["Dinov2ForImageClassification"]});
    let read = |file: &Value| Dinov2Config::from_json(&file.to_string(), UnknownKeys::Refuse);
    assert_eq!(keys(read(&classifier)), ["architectures"]);
    assert_eq!(keys(read(&json!({"model_type": "dinov2_with_registers"}))), ["model_type"]);
}
