//! A text-to-image model of a few thousand weights, images with captions, and a config for its distillation.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_models::{
    AdditionEmbedType, AutoencoderKLConfig, ClipTextClass, ClipTextConfig, ConditionDownBlockType,
    ConditionUpBlockType, DecoderBlockType, EncoderBlockType, Model, NetworkConfig, PerLevel,
    Placement, SampleSize, UNet2DConditionConfig,
};
use ddil_schedulers::{
    CommonConfig, NoiseScheduleConfig, PredictionType, SchedulerConfig, Thresholding,
};
use serde_json::json;

use crate::support::Workshop;

/// Height and width of the teacher's images; two pixels per latent.
pub(crate) const SIDE: u32 = 16;
/// Tokens of a prompt, of which two are marks.
pub(crate) const TOKENS: u32 = 8;
/// Width of the hidden states of each text encoder.
pub(crate) const WIDTHS: [u32; 2] = [8, 12];

/// The properties of the teacher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// One text encoder.
    StableDiffusion,
    /// Two text encoders, sizes, and zeros for no prompt.
    StableDiffusionXl,
}

impl Workshop {
    /// A workshop with a text-to-image teacher, `captions` and a `distill.toml` for them.
    pub(crate) fn of_text(family: Family) -> Self {
        let workshop = Self::new();
        write_text_teacher(&workshop.path("teacher"), family);
        write_captions(&workshop.path("captions"));
        let runs = workshop.path("runs").display().to_string();
        let config = format!("[run]\nfolder = {runs:?}\n{DISTILLATION}");
        fs::write(workshop.path("distill.toml"), config).expect("it is writable");
        workshop
    }
}

/// Four updates on captions, guided, from all three sources.
const DISTILLATION: &str = r#"seed = 3
threads = 1

[data]
kind = "captions"
path = "captions"
cache = "cache"
batch_size = 4

[teacher]
path = "teacher"
guidance = { kind = "cfg", scale = 3.0 }

[student]
stages = [2]
updates_per_stage = 4

[objective]
method = "progressive"
substeps = 2

[mixing.priors]
kind = "constant"
priors = { forward = 0.5, student = 0.25, teacher = 0.25 }

[mixing.student]
policy = { kind = "buffer", new_fraction = 0.25, buffer = { capacity = 16 } }

[mixing.teacher]
pool = 4

[learning_rate]
peak = 0.001
warmup_steps = 2

[ema]
decay = 0.9

[output]
log_interval = 1
sample_interval = 0
checkpoint_interval = 2
samples_per_class = 1
checkpoints = { keep_last = 100 }
"#;

/// Writes the folder of a text-to-image model with fresh weights, as diffusers would.
pub(crate) fn write_text_teacher(folder: &Path, family: Family) -> PathBuf {
    let unet = unet(family).build(Placement::default(), 5).expect("the config is valid");
    Model::UNet2DCondition(unet).save_to_folder(folder.join("unet")).expect("it is writable");
    let vae = autoencoder().build(Placement::default(), 6).expect("the config is valid");
    vae.save_to_folder(make(folder, "vae")).expect("it is writable");
    let schedule = NoiseScheduleConfig::default();
    let common = CommonConfig::new(&schedule, PredictionType::Epsilon, &Thresholding::None);
    let scheduler = SchedulerConfig::Ddim(common.expect("diffusers knows it"));
    let file = make(folder, "scheduler").join("scheduler_config.json");
    scheduler.write(file).expect("it is writable");
    let mut parts = vec![
        ("unet", ["diffusers", "UNet2DConditionModel"]),
        ("vae", ["diffusers", "AutoencoderKL"]),
        ("scheduler", ["diffusers", "DDIMScheduler"]),
        ("tokenizer", ["transformers", "CLIPTokenizer"]),
        ("text_encoder", ["transformers", "CLIPTextModel"]),
    ];
    write_text_encoder(folder, "", ClipTextClass::TextModel, WIDTHS[0]);
    let mut index = json!({ "_class_name": "StableDiffusionPipeline" });
    if family == Family::StableDiffusionXl {
        write_text_encoder(folder, "_2", ClipTextClass::TextModelWithProjection, WIDTHS[1]);
        parts.push(("tokenizer_2", ["transformers", "CLIPTokenizer"]));
        parts.push(("text_encoder_2", ["transformers", "CLIPTextModelWithProjection"]));
        index = json!({
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": true,
        });
    }
    for (name, part) in parts {
        index[name] = json!(part);
    }
    fs::write(folder.join("model_index.json"), index.to_string()).expect("it is writable");
    folder.to_owned()
}

/// The U-Net of such a model: two levels, 8x8 latents of four channels.
pub(crate) fn unet(family: Family) -> UNet2DConditionConfig {
    let config = UNet2DConditionConfig {
        sample_size: Some(SampleSize::Square(SIDE / 2)),
        down_block_types: vec![
            ConditionDownBlockType::CrossAttnDownBlock2D,
            ConditionDownBlockType::DownBlock2D,
        ],
        up_block_types: vec![
            ConditionUpBlockType::UpBlock2D,
            ConditionUpBlockType::CrossAttnUpBlock2D,
        ],
        block_out_channels: vec![8, 16],
        layers_per_block: PerLevel::All(1),
        norm_num_groups: 4,
        attention_head_dim: PerLevel::All(2),
        cross_attention_dim: PerLevel::All(WIDTHS[0]),
        ..UNet2DConditionConfig::default()
    };
    match family {
        Family::StableDiffusion => config,
        Family::StableDiffusionXl => UNet2DConditionConfig {
            cross_attention_dim: PerLevel::All(WIDTHS[0] + WIDTHS[1]),
            addition_embed_type: Some(AdditionEmbedType::TextTime),
            addition_time_embed_dim: Some(4),
            projection_class_embeddings_input_dim: Some(WIDTHS[1] + 6 * 4),
            ..config
        },
    }
}

/// Its autoencoder.
fn autoencoder() -> AutoencoderKLConfig {
    AutoencoderKLConfig {
        down_block_types: vec![EncoderBlockType::DownEncoderBlock2D; 2],
        up_block_types: vec![DecoderBlockType::UpDecoderBlock2D; 2],
        block_out_channels: vec![4, 8],
        norm_num_groups: 4,
        sample_size: SampleSize::Square(SIDE),
        ..AutoencoderKLConfig::default()
    }
}

fn write_text_encoder(folder: &Path, number: &str, class: ClipTextClass, width: u32) {
    let vocabulary = write_tokenizer(&make(folder, &format!("tokenizer{number}")), number == "_2");
    let config = ClipTextConfig {
        architectures: [class],
        vocab_size: vocabulary,
        hidden_size: width,
        intermediate_size: 2 * width,
        projection_dim: Some(width),
        num_hidden_layers: 2,
        num_attention_heads: 2,
        max_position_embeddings: TOKENS,
        // Large enough that prompts change the U-Net's output.
        initializer_range: 0.5,
        initializer_factor: 5.0,
        pad_token_id: None,
        bos_token_id: None,
        eos_token_id: i64::from(vocabulary) - 1,
        ..ClipTextConfig::default()
    };
    let encoder = config.build(Placement::default(), 7).expect("the config is valid");
    let folder = make(folder, &format!("text_encoder{number}"));
    encoder.save_to_folder(folder).expect("it is writable");
}

/// Letters, digits and a few words in CLIP's byte-pair encoding; returns the number of tokens.
fn write_tokenizer(folder: &Path, padded_with_exclamation: bool) -> u32 {
    let merges = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>"];
    let singles = ('!'..='~').filter(|c| !c.is_ascii_uppercase()).map(String::from);
    let tokens = singles.flat_map(|c| [c.clone(), format!("{c}</w>")]);
    let merged = merges.iter().map(|pair| pair.replace(' ', ""));
    let marks = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
    let all = tokens.chain(merged).chain(marks);
    let vocabulary: BTreeMap<String, u32> = all.zip(0..).collect();
    let padding = if padded_with_exclamation { "!" } else { "<|endoftext|>" };
    let config = json!({
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": padding,
    });
    let text = format!("#version: 0.2\n{}\n", merges.join("\n"));
    let written = [
        ("vocab.json", json!(vocabulary).to_string()),
        ("merges.txt", text),
        ("tokenizer_config.json", config.to_string()),
    ];
    for (name, text) in written {
        fs::write(folder.join(name), text).expect("it is writable");
    }
    vocabulary.len() as u32
}

/// Six images of several sizes with one or two phrasings each, in the form of `metadata.jsonl`.
pub(crate) fn write_captions(folder: &Path) {
    fs::create_dir_all(folder).expect("it is writable");
    let texts = [
        json!("a cat"),
        json!(["a red cat", "cat, red"]),
        json!("a dog"),
        json!("a cat"),
        json!(["a red dog", "dog, red"]),
        json!("2 dogs"),
    ];
    let mut lines = String::new();
    for (number, text) in (0_u32..).zip(texts) {
        let name = format!("{number:02}.png");
        let (width, height) = (SIDE + 4 * (number % 2), SIDE + 6 * (number % 3));
        write_colours(&folder.join(&name), width, height, number);
        lines.push_str(&json!({ "file_name": name, "text": text }).to_string());
        lines.push('\n');
    }
    fs::write(folder.join("metadata.jsonl"), lines).expect("it is writable");
}

/// An image in colours that differ from number to number.
pub(crate) fn write_colours(path: &Path, width: u32, height: u32, number: u32) {
    let value =
        |at: u32| (at % 3 * 70 + at / 3 % width * 9 + at / 3 / width * 5 + number * 31) as u8;
    let pixels: Vec<u8> = (0..3 * width * height).map(value).collect();
    let file = fs::File::create(path).expect("it is writable");
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().expect("the header is valid");
    writer.write_image_data(&pixels).expect("there are as many pixels");
}

fn make(folder: &Path, name: &str) -> PathBuf {
    let folder = folder.join(name);
    fs::create_dir_all(&folder).expect("it is writable");
    folder
}
