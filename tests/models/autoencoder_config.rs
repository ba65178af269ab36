//! `AutoencoderKLConfig`: diffusers' files in and out, and files that are not autoencoders.

use std::fs;

use ddil_files::Invalid;
use ddil_models::{
    AutoencoderKLConfig, DecoderBlockType, EncoderBlockType, Error, NetworkConfig, Placement,
    SampleSize, UnknownKeys,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{TestResult, golden};

fn read(value: &Value, unknown_keys: UnknownKeys) -> ddil_models::Result<AutoencoderKLConfig> {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("config.json");
    fs::write(&path, value.to_string()).expect("a file in it");
    AutoencoderKLConfig::from_file(path, unknown_keys)
}

fn problems<T: std::fmt::Debug>(result: ddil_models::Result<T>) -> Vec<Invalid> {
    match result {
        Err(Error::InvalidConfig { problems, .. }) => problems,
        other => panic!("no refusal of settings: {other:?}"),
    }
}

fn keys(problems: &[Invalid]) -> Vec<&str> {
    problems.iter().map(|problem| problem.field.as_str()).collect()
}

#[test]
fn files_of_diffusers_are_written_back_unchanged() -> TestResult {
    for name in ["autoencoder_sd", "autoencoder_shift", "autoencoder_statistics"] {
        let path = golden(name).join("config.json");
        let config = AutoencoderKLConfig::from_file(&path, UnknownKeys::Refuse)?;
        let read: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let written: Value = serde_json::from_str(&config.to_json())?;
        assert_eq!(read, written, "{name}");
    }
    Ok(())
}

/// The keys that the file of Stable Diffusion 1.5 has, which is older than the others.
#[test]
fn published_files_are_the_presets() -> TestResult {
    let old = json!({
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": vec!["UpDecoderBlock2D"; 4],
    });
    let sd15 = read(&old, UnknownKeys::Refuse)?;
    assert_eq!(sd15, AutoencoderKLConfig::sd15());
    assert!((sd15.scaling_factor - 0.18215).abs() < 1e-12);

    let mut new = old;
    new["_name_or_path"] = json!("../sdxl-vae/");
    new["sample_size"] = json!(1024);
    new["scaling_factor"] = json!(0.13025);
    new["force_upcast"] = json!(true);
    assert_eq!(read(&new, UnknownKeys::Refuse)?, AutoencoderKLConfig::sdxl());
    Ok(())
}

#[test]
fn missing_keys_have_the_defaults_of_diffusers() -> TestResult {
    let config = read(&json!({}), UnknownKeys::Refuse)?;
    assert_eq!(config, AutoencoderKLConfig::default());
    assert_eq!(config.block_out_channels, [64]);
    assert_eq!(config.sample_size, SampleSize::Square(32));
    assert!(config.force_upcast && config.use_quant_conv && config.mid_block_add_attention);
    Ok(())
}

#[test]
fn every_problem_is_named() {
    let wrong = json!({
        "_class_name": "AsymmetricAutoencoderKL",
        "down_block_types": ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"],
        "act_fn": "tanh",
        "latent_channels": -4,
        "latents_mean": "zero",
        "double_z": true,
    });
    let found = problems(read(&wrong, UnknownKeys::Refuse));
    let mut names = keys(&found);
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "_class_name",
            "act_fn",
            "double_z",
            "down_block_types",
            "latent_channels",
            "latents_mean",
            "up_block_types"
        ]
    );
    let text = read(&wrong, UnknownKeys::Refuse).expect_err("seven problems").to_string();
    let up = "expected `UpDecoderBlock2D`, not \"AttnUpDecoderBlock2D\"";
    for part in ["AttnDownEncoderBlock2D", up, "AsymmetricAutoencoderKL", "tanh"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert_eq!(problems(read(&wrong, UnknownKeys::Ignore)).len(), 6);
}

#[test]
fn every_impossible_value_is_named() {
    let config = AutoencoderKLConfig {
        in_channels: 0,
        out_channels: 0,
        block_out_channels: vec![64, 48, 0],
        layers_per_block: 0,
        scaling_factor: 0.0,
        shift_factor: Some(f64::NAN),
        latents_mean: Some(vec![0.0; 3]),
        latents_std: Some(vec![1.0, 0.0, f64::INFINITY, -1.0]),
        ..AutoencoderKLConfig::default()
    };
    let found = problems(config.build(Placement::default(), 0));
    assert_eq!(
        keys(&found),
        [
            "down_block_types",
            "up_block_types",
            "block_out_channels[1]",
            "block_out_channels[2]",
            "in_channels",
            "out_channels",
            "layers_per_block",
            "scaling_factor",
            "shift_factor",
            "latents_mean",
            "latents_std[1]",
            "latents_std[2]",
            "latents_std[3]",
            "shift_factor, latents_mean, latents_std",
        ]
    );
    let one_problem = |config: AutoencoderKLConfig| {
        let found = problems(config.build(Placement::default(), 0));
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].to_string()
    };
    let default = AutoencoderKLConfig::default;
    let alone = AutoencoderKLConfig { latents_mean: Some(vec![0.0; 4]), ..default() };
    assert!(one_problem(alone).contains("one without the other"));
    let mean = Some(vec![0.0, f64::NAN, 0.0, 0.0]);
    let nan =
        AutoencoderKLConfig { latents_mean: mean, latents_std: Some(vec![1.0; 4]), ..default() };
    assert!(one_problem(nan).contains("latents_mean[1]"));
    let negative = AutoencoderKLConfig { scaling_factor: -1.0, ..default() };
    assert!(one_problem(negative).contains("above 0"));
    let groups = AutoencoderKLConfig { norm_num_groups: 0, ..default() };
    assert!(one_problem(groups).contains("norm_num_groups"));
    let latent = AutoencoderKLConfig { latent_channels: 0, ..default() };
    assert!(one_problem(latent).contains("latent_channels"));
    let deep = AutoencoderKLConfig {
        block_out_channels: vec![64; 70],
        down_block_types: vec![EncoderBlockType::DownEncoderBlock2D; 70],
        up_block_types: vec![DecoderBlockType::UpDecoderBlock2D; 70],
        ..default()
    };
    assert!(one_problem(deep).contains("1 to 16 levels"));
    let flat = AutoencoderKLConfig {
        block_out_channels: vec![],
        down_block_types: vec![],
        up_block_types: vec![],
        ..default()
    };
    assert!(one_problem(flat).contains("1 to 16 levels"));
}
