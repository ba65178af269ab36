//! `UNet2DConfig`: diffusers' files in and out, and files that are not networks.

use std::fs;

use ddil_files::Invalid;
use ddil_models::{
    ClassEmbedType, DownBlockType, Error, NetworkConfig, Placement, SampleSize, UNet2DConfig,
    UnknownKeys, UpBlockType,
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::common::{GOLDEN, TestResult, golden};

fn read(value: &Value, unknown_keys: UnknownKeys) -> ddil_models::Result<UNet2DConfig> {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("config.json");
    fs::write(&path, value.to_string()).expect("a file in it");
    UNet2DConfig::from_file(path, unknown_keys)
}

fn problems<T: std::fmt::Debug>(result: ddil_models::Result<T>) -> Vec<Invalid> {
    match result {
        Err(Error::InvalidConfig { problems, .. }) => problems,
        other => panic!("no refusal of settings: {other:?}"),
    }
}

#[test]
fn files_of_diffusers_are_written_back_unchanged() -> TestResult {
    for name in GOLDEN {
        let path = golden(name).join("config.json");
        let config = UNet2DConfig::from_file(&path, UnknownKeys::Refuse)?;
        let read: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let written: Value = serde_json::from_str(&config.to_json())?;
        for (key, value) in read.as_object().expect("settings") {
            let same = match (value.as_f64(), written[key].as_f64()) {
                (Some(read), Some(written)) => (read - written).abs() < 1e-12,
                _ => *value == written[key],
            };
            assert!(same, "{name} {key}: {value} became {}", written[key]);
        }
        assert_eq!(read.as_object().map(Map::len), written.as_object().map(Map::len));
    }
    Ok(())
}

#[test]
fn missing_keys_have_the_defaults_of_diffusers() -> TestResult {
    assert_eq!(read(&json!({}), UnknownKeys::Refuse)?, UNet2DConfig::default());
    let config = read(&json!({"sample_size": [4, 8], "act_fn": "swish"}), UnknownKeys::Refuse)?;
    assert_eq!(config.sample_size, Some(SampleSize::Rectangle([4, 8])));
    assert_eq!(config.act_fn, ddil_models::Activation::Silu);
    Ok(())
}

#[test]
fn all_problems_are_listed_at_once() {
    let config = json!({
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.1",
        "in_chanels": 3,
        "layers_per_block": "two",
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "resnet_time_scale_shift": "spatial",
        "downsample_type": "resnet",
        "dropout": -1.0,
    });
    let error = read(&config, UnknownKeys::Refuse).expect_err("six problems");
    let text = error.to_string();
    let listed: Vec<_> = problems(Err::<(), _>(error)).into_iter().map(|p| p.field).collect();
    let expected = [
        "down_block_types",
        "downsample_type",
        "in_chanels",
        "layers_per_block",
        "resnet_time_scale_shift",
    ];
    assert_eq!(listed, expected);
    assert!(text.contains("CrossAttnDownBlock2D") && text.contains("AttnDownBlock2D"), "{text}");
    assert!(text.contains("config.json"), "{text}");
}

#[test]
fn unknown_keys_are_ignored_only_on_request() -> TestResult {
    let config = json!({"in_channels": 1, "in_chanels": 3});
    assert_eq!(problems(read(&config, UnknownKeys::Refuse))[0].field, "in_chanels");
    assert_eq!(read(&config, UnknownKeys::Ignore)?.in_channels, 1);
    Ok(())
}

#[test]
fn settings_of_another_class_are_refused() {
    let found =
        problems(read(&json!({"_class_name": "UNet2DConditionModel"}), UnknownKeys::Ignore));
    assert_eq!(found[0].field, "_class_name");
}

#[test]
fn no_file_and_no_json_are_named() {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("config.json");
    let missing = UNet2DConfig::from_file(&path, UnknownKeys::Refuse);
    assert!(matches!(missing, Err(Error::Read { .. })));
    fs::write(&path, "{\"in_channels\": ").expect("a file");
    let error = UNet2DConfig::from_file(&path, UnknownKeys::Refuse).expect_err("half a file");
    assert!(
        matches!(error, Error::InvalidJson { .. }) && error.to_string().contains("config.json")
    );
}

/// A small valid network.
fn small() -> UNet2DConfig {
    UNet2DConfig {
        down_block_types: vec![DownBlockType::DownBlock2D, DownBlockType::AttnDownBlock2D],
        up_block_types: vec![UpBlockType::AttnUpBlock2D, UpBlockType::UpBlock2D],
        block_out_channels: vec![4, 8],
        layers_per_block: 1,
        attention_head_dim: Some(4),
        norm_num_groups: 2,
        ..UNet2DConfig::default()
    }
}

/// Makes one setting impossible.
type Spoil = fn(&mut UNet2DConfig);

#[test]
fn impossible_values_are_refused_by_key() {
    let cases: [(&str, Spoil); 18] = [
        ("block_out_channels", |c| c.block_out_channels.clear()),
        ("block_out_channels[1]", |c| c.block_out_channels[1] = 5),
        ("block_out_channels[0]", |c| c.block_out_channels[0] = 0),
        ("down_block_types", |c| c.down_block_types.push(DownBlockType::DownBlock2D)),
        ("up_block_types", |c| c.up_block_types.clear()),
        ("attention_head_dim", |c| c.attention_head_dim = Some(3)),
        ("attention_head_dim", |c| c.attention_head_dim = Some(0)),
        ("attn_norm_num_groups", |c| c.attn_norm_num_groups = Some(3)),
        ("norm_num_groups", |c| c.norm_num_groups = 0),
        ("in_channels", |c| c.in_channels = 0),
        ("out_channels", |c| c.out_channels = 0),
        ("layers_per_block", |c| c.layers_per_block = 0),
        ("num_class_embeds", |c| c.num_class_embeds = Some(0)),
        ("downsample_padding", |c| c.downsample_padding = 2),
        ("dropout", |c| c.dropout = 1.0),
        ("norm_eps", |c| c.norm_eps = f64::NAN),
        ("freq_shift", |c| c.freq_shift = 2.0),
        ("class_embed_type", |c| c.class_embed_type = Some(ClassEmbedType::Projection)),
    ];
    assert!(small().build(Placement::default(), 0).is_ok());
    for (key, spoil) in cases {
        let mut config = small();
        spoil(&mut config);
        let found = problems(config.build(Placement::default(), 0));
        assert!(found.iter().any(|p| p.field == key), "{key}: {found:?}");
    }
}

#[test]
fn a_head_size_matters_only_where_there_is_attention() {
    let config = UNet2DConfig { block_out_channels: vec![6, 8], ..small() };
    assert!(config.build(Placement::default(), 0).is_ok());
    let config = UNet2DConfig { block_out_channels: vec![8, 6], add_attention: false, ..small() };
    assert_eq!(problems(config.build(Placement::default(), 0))[0].field, "attention_head_dim");
}

#[test]
fn a_key_that_diffusers_does_not_have_is_written_only_where_it_is_set() -> TestResult {
    let plain = UNet2DConfig::default();
    assert!(!plain.to_json().contains("time_cond_proj_dim"));
    let guided = UNet2DConfig { time_cond_proj_dim: Some(256), ..plain };
    let object: Map<String, Value> = serde_json::from_str(&guided.to_json())?;
    assert_eq!(read(&Value::Object(object), UnknownKeys::Refuse)?, guided);
    let narrow = problems(read(&json!({"time_cond_proj_dim": 3}), UnknownKeys::Refuse));
    assert_eq!(narrow[0].field, "time_cond_proj_dim");
    Ok(())
}
