//! `UNet2DConditionConfig`: diffusers' files in and out, unsupported settings, and files that are not networks.

use std::fs;

use ddil_files::Invalid;
use ddil_models::{
    AdditionEmbedType, ClassEmbedType, ConditionDownBlockType, ConditionMidBlockType,
    ConditionUpBlockType, Error, NetworkConfig, PerLevel, Placement, TransformerDepth,
    TransformerLayers, UNet2DConditionConfig, UnknownKeys,
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::common::{CONDITION_GOLDEN, TestResult, golden};

fn read(value: &Value) -> ddil_models::Result<UNet2DConditionConfig> {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("config.json");
    fs::write(&path, value.to_string()).expect("a file in it");
    UNet2DConditionConfig::from_file(path, UnknownKeys::Refuse)
}

fn problems<T: std::fmt::Debug>(result: ddil_models::Result<T>) -> Vec<Invalid> {
    match result {
        Err(Error::InvalidConfig { problems, .. }) => problems,
        other => panic!("no refusal of settings: {other:?}"),
    }
}

fn same(left: &Value, right: &Value) -> bool {
    match (left.as_f64(), right.as_f64()) {
        (Some(left), Some(right)) => (left - right).abs() < 1e-12,
        _ => left == right,
    }
}

#[test]
fn files_of_diffusers_are_written_back_unchanged() -> TestResult {
    for name in CONDITION_GOLDEN {
        let path = golden(name).join("config.json");
        let config = UNet2DConditionConfig::from_file(&path, UnknownKeys::Refuse)?;
        let read: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let written: Value = serde_json::from_str(&config.to_json())?;
        for (key, value) in read.as_object().expect("settings") {
            assert!(same(value, &written[key]), "{name} {key}: {value} became {}", written[key]);
        }
        assert_eq!(read.as_object().map(Map::len), written.as_object().map(Map::len));
    }
    Ok(())
}

#[test]
fn missing_keys_have_the_defaults_of_diffusers() -> TestResult {
    assert_eq!(read(&json!({}))?, UNet2DConditionConfig::default());
    // As SDXL's file has them.
    let config = read(&json!({
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.0.dev0",
        "upcast_attention": null,
        "num_attention_heads": null,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 2048,
        "use_linear_projection": true,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    }))?;
    assert_eq!(config, UNet2DConditionConfig::sdxl());
    Ok(())
}

/// The sums are those of diffusers 0.42.1 with the same settings.
#[test]
fn published_networks_have_their_number_of_parameters() -> TestResult {
    let lcm =
        UNet2DConditionConfig { time_cond_proj_dim: Some(256), ..UNet2DConditionConfig::sd15() };
    let published = [
        ("sd15", UNet2DConditionConfig::sd15(), 859_520_964_i64, 686),
        ("sd21", UNet2DConditionConfig::sd21(), 865_910_724, 686),
        ("sdxl", UNet2DConditionConfig::sdxl(), 2_567_463_684, 1680),
        ("ssd_1b", UNet2DConditionConfig::ssd_1b(), 1_331_334_404, 944),
        ("lcm", lcm, 859_602_884, 687),
    ];
    for (name, config, values, len) in published {
        let shapes = config.parameter_shapes()?;
        let found: i64 = shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        assert_eq!((found, shapes.len()), (values, len), "{name}");
    }
    Ok(())
}

#[test]
fn shapes_are_those_of_the_network() -> TestResult {
    for name in CONDITION_GOLDEN {
        let path = golden(name).join("config.json");
        let config = UNet2DConditionConfig::from_file(path, UnknownKeys::Refuse)?;
        let unet = config.build(Placement::default(), 0)?;
        let built: Vec<_> =
            unet.parameters().named().into_iter().map(|(name, t)| (name, t.size())).collect();
        assert_eq!(config.parameter_shapes()?, built);
        assert_eq!(unet.parameters().shapes(), built);
    }
    Ok(())
}

#[test]
fn all_problems_are_listed_at_once() {
    let error = read(&json!({
        "act_fn": "tanh",
        "attention_type": "gated",
        "down_block_types": ["SimpleCrossAttnDownBlock2D"],
        "in_chanels": 3,
        "layers_per_block": [1, 2.5],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "norm_num_groups": null,
        "transformer_layers_per_block": [1, "two"],
        "resnet_time_scale_shift": "spatial",
    }));
    let text = error.as_ref().expect_err("nine problems").to_string();
    let keys: Vec<_> = problems(error).into_iter().map(|problem| problem.field).collect();
    let expected = [
        "act_fn",
        "attention_type",
        "down_block_types",
        "in_chanels",
        "layers_per_block",
        "mid_block_type",
        "norm_num_groups",
        "resnet_time_scale_shift",
        "transformer_layers_per_block",
    ];
    assert_eq!(keys, expected, "{text}");
    let down = "expected `CrossAttnDownBlock2D`, `DownBlock2D` or `UNetResDownBlock2D`, not \
                \"SimpleCrossAttnDownBlock2D\"";
    for part in [down, "one value for all levels"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn unsupported_settings_are_named() {
    let found = problems(read(&json!({
        "dual_cross_attention": true,
        "class_embeddings_concat": true,
        "encoder_hid_dim": 1024,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_norm": "layer_norm",
        "num_attention_heads": [5, 10, 20, 20],
        "time_embedding_type": "fourier",
    })));
    let keys: Vec<_> = found.iter().map(|problem| problem.field.as_str()).collect();
    let expected = [
        "dual_cross_attention",
        "class_embeddings_concat",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "cross_attention_norm",
        "num_attention_heads",
        "time_embedding_type",
    ];
    assert_eq!(keys, expected);
    assert_eq!(found[0].to_string(), "`dual_cross_attention` is true; expected false");
    for value in ["text_image", "image", "image_hint"] {
        let found = problems(read(&json!({"addition_embed_type": value})));
        assert_eq!(found[0].field, "addition_embed_type");
    }
}

/// A small valid network.
fn small() -> UNet2DConditionConfig {
    UNet2DConditionConfig {
        down_block_types: vec![
            ConditionDownBlockType::CrossAttnDownBlock2D,
            ConditionDownBlockType::DownBlock2D,
        ],
        up_block_types: vec![
            ConditionUpBlockType::UpBlock2D,
            ConditionUpBlockType::CrossAttnUpBlock2D,
        ],
        block_out_channels: vec![4, 8],
        layers_per_block: PerLevel::All(1),
        attention_head_dim: PerLevel::Each(vec![2, 4]),
        norm_num_groups: 2,
        cross_attention_dim: PerLevel::All(6),
        ..UNet2DConditionConfig::default()
    }
}

/// Makes one setting impossible.
type Spoil = fn(&mut UNet2DConditionConfig);

fn ensure_refused(cases: &[(&str, Spoil)]) {
    assert!(small().build(Placement::default(), 0).is_ok());
    for (key, spoil) in cases {
        let mut config = small();
        spoil(&mut config);
        let found = problems(config.build(Placement::default(), 0));
        assert!(found.iter().any(|problem| problem.field == *key), "{key}: {found:?}");
        assert_eq!(found, problems(config.parameter_shapes()));
    }
}

#[test]
fn impossible_numbers_are_refused_by_key() {
    ensure_refused(&[
        ("block_out_channels", |c| c.block_out_channels.clear()),
        ("block_out_channels[1]", |c| c.block_out_channels[1] = 5),
        ("norm_num_groups", |c| c.norm_num_groups = 0),
        ("in_channels", |c| c.in_channels = 0),
        ("out_channels", |c| c.out_channels = 0),
        ("layers_per_block", |c| c.layers_per_block = PerLevel::Each(vec![1, 0])),
        ("num_class_embeds", |c| c.num_class_embeds = Some(0)),
        ("time_embedding_dim", |c| c.time_embedding_dim = Some(0)),
        ("time_cond_proj_dim", |c| c.time_cond_proj_dim = Some(2)),
        ("downsample_padding", |c| c.downsample_padding = 2),
        ("dropout", |c| c.dropout = 1.0),
        ("norm_eps", |c| c.norm_eps = f64::NAN),
        ("mid_block_scale_factor", |c| c.mid_block_scale_factor = 0.0),
        ("freq_shift", |c| c.freq_shift = 2.0),
        ("conv_in_kernel", |c| c.conv_in_kernel = 4),
        ("conv_out_kernel", |c| c.conv_out_kernel = 0),
    ]);
}

#[test]
fn lists_have_one_entry_a_level() {
    ensure_refused(&[
        ("down_block_types", |c| c.down_block_types.push(ConditionDownBlockType::DownBlock2D)),
        ("up_block_types", |c| c.up_block_types.clear()),
        ("only_cross_attention", |c| c.only_cross_attention = PerLevel::Each(vec![true])),
        ("layers_per_block", |c| c.layers_per_block = PerLevel::Each(vec![1; 3])),
        ("cross_attention_dim", |c| c.cross_attention_dim = PerLevel::Each(vec![6])),
        ("attention_head_dim", |c| c.attention_head_dim = PerLevel::Each(vec![2; 3])),
        ("transformer_layers_per_block", |c| {
            c.transformer_layers_per_block = TransformerLayers::Each(vec![]);
        }),
        ("reverse_transformer_layers_per_block", |c| {
            c.reverse_transformer_layers_per_block = Some(vec![]);
        }),
    ]);
}

#[test]
fn heads_text_and_depths_fit_the_levels() {
    use TransformerDepth::{All, Each};
    ensure_refused(&[
        ("attention_head_dim", |c| c.attention_head_dim = PerLevel::All(3)),
        ("attention_head_dim", |c| c.attention_head_dim = PerLevel::Each(vec![0, 4])),
        ("cross_attention_dim", |c| c.cross_attention_dim = PerLevel::All(0)),
        ("cross_attention_dim", |c| c.cross_attention_dim = PerLevel::Each(vec![6, 7])),
        ("transformer_layers_per_block[0]", |c| {
            c.transformer_layers_per_block = TransformerLayers::All(0);
        }),
        // Down there is one transformer in the level, up there are two.
        ("reverse_transformer_layers_per_block", |c| {
            c.transformer_layers_per_block = TransformerLayers::Each(vec![Each(vec![1]), All(1)]);
        }),
        ("reverse_transformer_layers_per_block[1]", |c| {
            c.reverse_transformer_layers_per_block = Some(vec![All(1), Each(vec![1])]);
        }),
        ("transformer_layers_per_block[0]", |c| {
            c.transformer_layers_per_block =
                TransformerLayers::Each(vec![Each(vec![1, 1]), All(1)]);
            c.reverse_transformer_layers_per_block = Some(vec![All(1), All(1)]);
        }),
        ("transformer_layers_per_block[1]", |c| {
            c.transformer_layers_per_block = TransformerLayers::Each(vec![All(1), Each(vec![])]);
            c.reverse_transformer_layers_per_block = Some(vec![All(1), All(1)]);
        }),
    ]);
}

#[test]
fn embeddings_have_the_widths_they_need() {
    ensure_refused(&[
        ("projection_class_embeddings_input_dim", |c| {
            c.class_embed_type = Some(ClassEmbedType::Projection);
        }),
        ("projection_class_embeddings_input_dim", |c| {
            c.class_embed_type = Some(ClassEmbedType::SimpleProjection);
        }),
        ("projection_class_embeddings_input_dim", |c| {
            c.addition_embed_type = Some(AdditionEmbedType::TextTime);
            c.addition_time_embed_dim = Some(4);
        }),
        ("addition_time_embed_dim", |c| {
            c.addition_embed_type = Some(AdditionEmbedType::TextTime);
            c.projection_class_embeddings_input_dim = Some(40);
        }),
        ("addition_time_embed_dim", |c| {
            c.addition_embed_type = Some(AdditionEmbedType::TextTime);
            c.addition_time_embed_dim = Some(1);
            c.projection_class_embeddings_input_dim = Some(40);
        }),
        ("addition_embed_type_num_heads", |c| {
            c.addition_embed_type = Some(AdditionEmbedType::Text);
        }),
        ("cross_attention_dim", |c| {
            c.addition_embed_type = Some(AdditionEmbedType::Text);
            c.cross_attention_dim = PerLevel::Each(vec![6, 6]);
        }),
    ]);
}

#[test]
fn settings_of_attention_matter_only_where_there_is_attention() -> TestResult {
    let config = UNet2DConditionConfig {
        mid_block_type: Some(ConditionMidBlockType::UNetMidBlock2D),
        attention_head_dim: PerLevel::Each(vec![2, 3]),
        cross_attention_dim: PerLevel::Each(vec![6, 0]),
        transformer_layers_per_block: TransformerLayers::Each(vec![
            TransformerDepth::All(1),
            TransformerDepth::All(0),
        ]),
        ..small()
    };
    config.build(Placement::default(), 0)?;
    let crossed = UNet2DConditionConfig {
        mid_block_type: Some(ConditionMidBlockType::UNetMidBlock2DCrossAttn),
        ..config
    };
    let keys: Vec<_> = problems(crossed.build(Placement::default(), 0))
        .into_iter()
        .map(|problem| problem.field)
        .collect();
    let expected = ["attention_head_dim", "cross_attention_dim", "transformer_layers_per_block[1]"];
    assert_eq!(keys, expected);
    Ok(())
}
