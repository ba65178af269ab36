use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_models::{AutoencoderKL, ClipTokenizer, NetworkConfig, weights};
use ddil_pipelines::Card;
use ddil_schedulers::{CommonConfig, SchedulerConfig, Thresholding};
use serde_json::json;
use tch::Kind;

use super::{Networks, Settings};
use crate::Result;
use crate::vocabulary::Vocabulary;

/// The parts to write in addition to the tokenizer.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The autoencoder.
    pub vae: &'a AutoencoderKL,
    /// Text encoder and U-Net.
    pub networks: &'a Networks,
    /// Duration of the training in seconds.
    pub seconds: f64,
}

/// Writes the tokenizer of a model folder and reads it back.
///
/// # Errors
///
/// Errors of the file system.
pub fn write_tokenizer(
    folder: &Path,
    vocabulary: &Vocabulary,
    settings: &Settings,
) -> Result<ClipTokenizer> {
    let folder = folder.join("tokenizer");
    vocabulary.write(&folder, settings.text_encoder.max_position_embeddings)?;
    Ok(ClipTokenizer::from_folder(folder)?)
}

/// Writes everything except the tokenizer to a folder of diffusers' `StableDiffusionPipeline`, weights of autoencoder
/// and U-Net in `Half`.
///
/// diffusers still computes in `Float`. transformers computes in the kind of the file, so the text encoder's is
/// `Float`: otherwise its output would not fit the U-Net.
///
/// # Errors
///
/// Errors of the file system.
pub fn write_folder(folder: &Path, settings: &Settings, parts: &Parts<'_>) -> Result<()> {
    let Parts { vae, networks: Networks { text_encoder, unet }, seconds } = parts;
    vae.save_to_folder(folder.join("vae"))?;
    halve(&folder.join("vae/diffusion_pytorch_model.safetensors"))?;
    text_encoder.save_to_folder(folder.join("text_encoder"))?;
    fs::create_dir_all(folder.join("unet"))?;
    fs::write(folder.join("unet/config.json"), settings.unet.to_json())?;
    let weights_file = folder.join("unet/diffusion_pytorch_model.safetensors");
    weights::save(&unet.parameters().named(), &weights_file, &BTreeMap::new())?;
    halve(&weights_file)?;

    let output = settings.prediction_type;
    let scheduler = CommonConfig::new(&settings.schedule, output, &Thresholding::None)?;
    fs::create_dir_all(folder.join("scheduler"))?;
    SchedulerConfig::Ddim(scheduler).write(folder.join("scheduler/scheduler_config.json"))?;
    let side = settings.side() >> (settings.vae.block_out_channels.len() - 1);
    let card = Card {
        method: "teacher".to_owned(),
        image_shape: [settings.vae.latent_channels.into(), side, side],
        updates: settings.diffusion.training.updates,
        seconds: *seconds,
        seed: settings.seed,
        ..Card::default()
    };
    fs::write(folder.join("ddil.json"), serde_json::to_string_pretty(&card)? + "\n")?;
    // Written last: a folder with an index is complete.
    fs::write(folder.join("model_index.json"), serde_json::to_string_pretty(&index())? + "\n")?;
    Ok(())
}

fn index() -> serde_json::Value {
    json!({
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [null, null],
        "image_encoder": [null, null],
        "requires_safety_checker": false,
        "safety_checker": [null, null],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

/// Rewrites the weights of a file in half precision.
fn halve(path: &Path) -> Result<()> {
    let tensors = weights::read_all(path)?.into_iter();
    let tensors: Vec<_> =
        tensors.map(|(name, tensor)| (name, tensor.to_kind(Kind::Half))).collect();
    Ok(weights::save(&tensors, path, &weights::read_metadata(path)?)?)
}
