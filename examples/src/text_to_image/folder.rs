use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_models::{AutoencoderKL, ClipTokenizer, weights};
use ddil_pipelines::Card;
use ddil_schedulers::{CommonConfig, SchedulerConfig, Thresholding};
use serde_json::json;
use tch::Kind;

use super::{Networks, Settings};
use crate::Result;
use crate::vocabulary::Vocabulary;

/// What is written beside the tokenizer.
#[derive(Debug)]
pub struct Parts<'a> {
    /// Pictures to latents and back.
    pub vae: &'a AutoencoderKL,
    /// Text encoder and U-Net.
    pub networks: &'a Networks,
    /// Seconds that the training took.
    pub seconds: f64,
}

/// Writes the tokenizer of a model folder and reads it back.
///
/// # Errors
///
/// What the file system refuses.
pub fn write_tokenizer(
    folder: &Path,
    vocabulary: &Vocabulary,
    settings: &Settings,
) -> Result<ClipTokenizer> {
    let folder = folder.join("tokenizer");
    vocabulary.write(&folder, settings.text_encoder.max_position_embeddings)?;
    Ok(ClipTokenizer::from_folder(folder)?)
}

/// Writes what stands beside the tokenizer in a folder of diffusers' `StableDiffusionPipeline`, weights of autoencoder and
/// U-Net in `Half`.
///
/// diffusers computes in `Float` all the same. transformers computes in the kind of the file, so the text encoder's is
/// `Float`: else its states would not fit the U-Net.
///
/// # Errors
///
/// What the file system refuses.
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
    // Last: a folder with an index is a whole one.
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

/// Writes the weights of a file again with half the bytes.
fn halve(path: &Path) -> Result<()> {
    let tensors = weights::read_all(path)?.into_iter();
    let tensors: Vec<_> =
        tensors.map(|(name, tensor)| (name, tensor.to_kind(Kind::Half))).collect();
    Ok(weights::save(&tensors, path, &weights::read_metadata(path)?)?)
}
