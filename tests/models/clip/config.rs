//! CLIP's settings: transformers' files in and out, and files that are not a tower.

use std::fs;

use ddil_files::Invalid;
use ddil_models::{
    ClipActivation, ClipConfig, ClipTextClass, ClipTextConfig, ClipVisionClass, ClipVisionConfig,
    Error, NetworkConfig, Placement, UnknownKeys,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{TestResult, golden};

/// Reads settings from a file.
fn read<C>(
    value: &Value,
    from_file: impl Fn(std::path::PathBuf, UnknownKeys) -> ddil_models::Result<C>,
    unknown_keys: UnknownKeys,
) -> ddil_models::Result<C> {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("config.json");
    fs::write(&path, value.to_string()).expect("a file in it");
    from_file(path, unknown_keys)
}

fn text(value: &Value) -> ddil_models::Result<ClipTextConfig> {
    read(value, ClipTextConfig::from_file, UnknownKeys::Refuse)
}

fn keys<T: std::fmt::Debug>(result: ddil_models::Result<T>) -> Vec<String> {
    match result {
        Err(Error::InvalidConfig { problems, .. }) => {
            problems.into_iter().map(|Invalid { field, .. }| field).collect()
        }
        other => panic!("no refusal of settings: {other:?}"),
    }
}

#[test]
fn files_of_transformers_are_written_back_unchanged() -> TestResult {
    for name in ["clip_text", "clip_text_with_projection", "clip_vision"] {
        let path = golden(name).join("config.json");
        let read: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let written = if name == "clip_vision" {
            ClipVisionConfig::from_file(&path, UnknownKeys::Refuse)?.to_json()
        } else {
            ClipTextConfig::from_file(&path, UnknownKeys::Refuse)?.to_json()
        };
        let written: Value = serde_json::from_str(&written)?;
        // The kind of the parameters is that of the file they are in.
        let mut read = read.as_object().expect("settings").clone();
        assert!(read.remove("dtype").is_some());
        assert_eq!(Value::Object(read), written, "{name}");
    }
    Ok(())
}

/// The file of Stable Diffusion 1.5's encoder, and the keys that older releases added to such.
#[test]
fn a_file_of_an_older_release_is_read() -> TestResult {
    let config = json!({
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
        "id2label": {"0": "LABEL_0"},
        "is_decoder": false,
        "pruned_heads": {},
        "temperature": 1.0,
    });
    assert_eq!(text(&config)?, ClipTextConfig::stable_diffusion());
    assert_eq!(text(&json!({}))?, ClipTextConfig::default());
    assert_eq!(text(&json!({"architectures": null}))?, ClipTextConfig::default());
    Ok(())
}

#[test]
fn the_encoders_of_stable_diffusion_are_those_published() {
    let (second, xl) =
        (ClipTextConfig::stable_diffusion_2(), ClipTextConfig::stable_diffusion_xl_second());
    assert_eq!((second.hidden_size, second.num_attention_heads), (1024, 16));
    assert_eq!(second.hidden_act, ClipActivation::Gelu);
    assert_eq!((xl.hidden_size, xl.num_hidden_layers, xl.intermediate_size), (1280, 32, 5120));
    assert_eq!((xl.projection_dim, xl.num_attention_heads), (Some(1280), 20));
    assert_eq!(xl.architectures, [ClipTextClass::TextModelWithProjection]);
    for config in [ClipTextConfig::stable_diffusion(), second, xl] {
        assert_eq!((config.vocab_size, config.eos_token_id), (49408, 2));
    }
}

#[test]
fn all_problems_are_listed_at_once() {
    let config = json!({
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "hidden_size": "wide",
        "hidden_act": "gelu_new",
        "hiden_size": 3,
        "pruned_heads": {"0": [1]},
        "vocab_size": -1,
    });
    let expected = [
        "model_type",
        "pruned_heads",
        "architectures",
        "hidden_act",
        "hidden_size",
        "hiden_size",
        "vocab_size",
    ];
    assert_eq!(keys(text(&config)), expected);
    let message = text(&config).expect_err("seven problems").to_string();
    assert!(message.contains("CLIPTextModelWithProjection"), "{message}");
    assert!(message.contains("quick_gelu"), "{message}");
    let known = json!({"hiden_size": 3, "hidden_size": 64});
    let config = read(&known, ClipTextConfig::from_file, UnknownKeys::Ignore);
    assert_eq!(config.expect("only an unknown key").hidden_size, 64);
}

/// Makes one setting impossible.
type Spoil<C> = fn(&mut C);

#[test]
fn impossible_text_settings_are_refused_by_key() {
    let cases: [(&str, Spoil<ClipTextConfig>); 13] = [
        ("vocab_size", |c| c.vocab_size = 0),
        ("hidden_size", |c| c.hidden_size = 0),
        ("num_attention_heads", |c| c.num_attention_heads = 3),
        ("num_attention_heads", |c| c.num_attention_heads = 0),
        ("intermediate_size", |c| c.intermediate_size = 0),
        ("num_hidden_layers", |c| c.num_hidden_layers = 0),
        ("max_position_embeddings", |c| c.max_position_embeddings = 0),
        ("projection_dim", |c| c.projection_dim = None),
        ("projection_dim", |c| c.projection_dim = Some(0)),
        ("layer_norm_eps", |c| c.layer_norm_eps = 0.0),
        ("attention_dropout", |c| c.attention_dropout = 1.0),
        ("eos_token_id", |c| c.eos_token_id = 10),
        ("initializer_factor", |c| c.initializer_factor = f64::NAN),
    ];
    let small = ClipTextConfig {
        architectures: [ClipTextClass::TextModelWithProjection],
        vocab_size: 10,
        hidden_size: 4,
        intermediate_size: 4,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        eos_token_id: 9,
        ..ClipTextConfig::default()
    };
    assert!(small.build(Placement::default(), 0).is_ok());
    for (key, spoil) in cases {
        let mut config = small.clone();
        spoil(&mut config);
        let found = keys(config.build(Placement::default(), 0));
        assert!(found.iter().any(|found| found == key), "{key}: {found:?}");
    }
    let plain =
        ClipTextConfig { architectures: [ClipTextClass::TextModel], projection_dim: None, ..small };
    assert!(plain.build(Placement::default(), 0).is_ok());
}

fn small_vision() -> ClipVisionConfig {
    ClipVisionConfig {
        architectures: [ClipVisionClass::VisionModelWithProjection],
        hidden_size: 4,
        intermediate_size: 4,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        image_size: 8,
        patch_size: 4,
        ..ClipVisionConfig::default()
    }
}

#[test]
fn impossible_vision_settings_are_refused_by_key() {
    let cases: [(&str, Spoil<ClipVisionConfig>); 7] = [
        ("num_channels", |c| c.num_channels = 0),
        ("patch_size", |c| c.patch_size = 0),
        ("image_size", |c| c.image_size = 3),
        ("projection_dim", |c| c.projection_dim = 0),
        ("num_attention_heads", |c| c.num_attention_heads = 3),
        ("layer_norm_eps", |c| c.layer_norm_eps = f64::INFINITY),
        ("initializer_range", |c| c.initializer_range = -1.0),
    ];
    assert!(small_vision().build(Placement::default(), 0).is_ok());
    for (key, spoil) in cases {
        let mut config = small_vision();
        spoil(&mut config);
        let found = keys(config.build(Placement::default(), 0));
        assert!(found.iter().any(|found| found == key), "{key}: {found:?}");
    }
}

#[test]
fn both_towers_are_read_from_one_file_with_the_problems_of_both() -> TestResult {
    let path = golden("clip").join("config.json");
    let config = ClipConfig::from_file(&path, UnknownKeys::Refuse)?;
    assert_eq!((config.projection_dim, config.text.hidden_size), (20, 16));
    assert_eq!((config.vision.hidden_size, config.vision.image_size), (24, 28));

    let mut file: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    let from = |file: &Value| read(file, ClipConfig::from_file, UnknownKeys::Refuse);
    // As in older files; transformers lets it count first.
    file["text_config_dict"] = json!({"hidden_size": 48, "num_attention_heads": 4});
    file["vision_config_dict"] = Value::Null;
    assert_eq!(from(&file)?.text.hidden_size, 48);
    file["text_config_dict"] = json!({"hidden_sise": 48});
    file["vision_config"]["num_attention_heads"] = json!(5);
    file["projection_dim"] = json!(0);
    let expected =
        ["text_config.hidden_sise", "vision_config.num_attention_heads", "projection_dim"];
    assert_eq!(keys(from(&file)), expected);
    assert_eq!(keys(from(&json!({"model_type": "clip"}))), ["text_config", "vision_config"]);
    let broken = ClipConfig { vision: small_vision(), ..config };
    let broken =
        ClipConfig { text: ClipTextConfig { vocab_size: 0, ..broken.text.clone() }, ..broken };
    let found = keys(broken.build(Placement::default(), 0));
    assert_eq!(found, ["text_config.vocab_size"]);
    Ok(())
}

#[test]
fn both_towers_are_built_and_written_to_one_file() -> TestResult {
    let config = ClipConfig {
        text: ClipTextConfig {
            vocab_size: 5,
            hidden_size: 4,
            intermediate_size: 4,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            eos_token_id: 4,
            ..ClipTextConfig::default()
        },
        // The class of a tower in such a file is ignored.
        vision: ClipVisionConfig {
            architectures: [ClipVisionClass::VisionModel],
            ..small_vision()
        },
        projection_dim: 3,
        logit_scale_init_value: 1.5,
    };
    let clip = config.build(Placement::default(), 0)?;
    let shapes = config.parameter_shapes()?;
    assert_eq!(clip.parameters().shapes(), shapes);
    assert!(shapes.contains(&("logit_scale".to_owned(), vec![])));
    assert!(shapes.contains(&("text_projection.weight".to_owned(), vec![3, 4])));
    assert!((clip.temperature()? - 1.5_f64.exp()).abs() < 1e-6);
    let again = ClipConfig::from_json(&config.to_json(), UnknownKeys::Refuse)?;
    assert_eq!(again, config);
    Ok(())
}
