use ddil_models::{
    AutoencoderKLConfig, ClipTextConfig, ConditionDownBlockType, ConditionUpBlockType,
    DecoderBlockType, EncoderBlockType, PerLevel, SampleSize, UNet2DConditionConfig,
};
use ddil_schedulers::{NoiseScheduleConfig, PredictionType};

use crate::captions::{HELD_OUT, NAMES, PHRASINGS, captions};
use crate::vocabulary::Vocabulary;
use crate::{Result, Training};

/// Tokens per prompt, including start and end marks: the longest caption has fifteen.
const PROMPT_LENGTH: u32 = 24;

/// The networks and how they are trained.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The autoencoder for images of 32x32 pixels.
    pub vae: AutoencoderKLConfig,
    /// The text encoder.
    pub text_encoder: ClipTextConfig,
    /// The U-Net that denoises latents.
    pub unet: UNet2DConditionConfig,
    /// The U-Net's prediction type.
    pub prediction_type: PredictionType,
    /// The noise schedule of the latents.
    pub schedule: NoiseScheduleConfig,
    /// How the autoencoder is trained.
    pub autoencoder: StageSettings,
    /// How text encoder and U-Net are trained.
    pub diffusion: StageSettings,
    /// Share of samples conditioned on the empty prompt, for guidance.
    pub prompt_dropout: f64,
    /// Seed of weights, noise and captions.
    pub seed: u64,
}

/// How networks are trained.
#[derive(Clone, Copy, Debug)]
pub struct StageSettings {
    /// Updates, learning rate, average.
    pub training: Training,
    /// Samples per update.
    pub batch_size: usize,
}

impl Settings {
    /// The settings of the full model.
    pub fn new(vocabulary: &Vocabulary) -> Self {
        Self {
            vae: autoencoder(&[16, 32, 48], 8),
            text_encoder: text_encoder(vocabulary, 64),
            unet: unet([64, 96], 64, 16),
            prediction_type: PredictionType::VPrediction,
            schedule: NoiseScheduleConfig::default(),
            autoencoder: StageSettings {
                training: Training { updates: 1000, learning_rate: 2e-3, ema_decay: 0.99 },
                batch_size: 32,
            },
            diffusion: StageSettings {
                training: Training { updates: 5000, learning_rate: 1e-3, ema_decay: 0.998 },
                batch_size: 32,
            },
            prompt_dropout: 0.1,
            seed: 0,
        }
    }

    /// Tiny settings that take seconds, as a smoke test.
    pub fn quick(vocabulary: &Vocabulary) -> Self {
        let stage = |updates| StageSettings {
            training: Training { updates, learning_rate: 3e-3, ema_decay: 0.9 },
            batch_size: 8,
        };
        Self {
            vae: autoencoder(&[8, 8, 8], 4),
            text_encoder: text_encoder(vocabulary, 16),
            unet: unet([8, 8], 16, 4),
            autoencoder: stage(30),
            diffusion: stage(30),
            ..Self::new(vocabulary)
        }
    }

    /// Height and width of the images, in pixels.
    pub fn side(&self) -> i64 {
        match self.vae.sample_size {
            SampleSize::Square(side) => side.into(),
            SampleSize::Rectangle([height, _]) => height.into(),
        }
    }
}

/// The tokens of all captions, including the held-out ones, which have no other words.
///
/// # Errors
///
/// Captions from which no vocabulary can be learned.
pub fn vocabulary() -> Result<Vocabulary> {
    let texts = |phrasings| (0..NAMES.len()).flat_map(move |label| captions(phrasings, label));
    let texts: Vec<String> = texts(&PHRASINGS).chain(texts(&HELD_OUT)).collect();
    Vocabulary::learn(texts.iter().map(String::as_str))
}

fn autoencoder(channels: &[u32], groups: u32) -> AutoencoderKLConfig {
    AutoencoderKLConfig {
        down_block_types: vec![EncoderBlockType::DownEncoderBlock2D; channels.len()],
        up_block_types: vec![DecoderBlockType::UpDecoderBlock2D; channels.len()],
        block_out_channels: channels.to_vec(),
        layers_per_block: 1,
        norm_num_groups: groups,
        sample_size: SampleSize::Square(32),
        force_upcast: false,
        ..AutoencoderKLConfig::default()
    }
}

fn text_encoder(vocabulary: &Vocabulary, width: u32) -> ClipTextConfig {
    let end = i64::from(vocabulary.len()) - 1;
    ClipTextConfig {
        vocab_size: vocabulary.len(),
        hidden_size: width,
        intermediate_size: 4 * width,
        projection_dim: Some(width),
        num_hidden_layers: 2,
        num_attention_heads: 4,
        max_position_embeddings: PROMPT_LENGTH,
        bos_token_id: Some(end - 1),
        eos_token_id: end,
        pad_token_id: Some(end),
        ..ClipTextConfig::default()
    }
}

/// As in Stable Diffusion, the coarsest level attends to the text only in the middle block.
fn unet(channels: [u32; 2], text_width: u32, groups: u32) -> UNet2DConditionConfig {
    use ConditionDownBlockType::{CrossAttnDownBlock2D, DownBlock2D};
    use ConditionUpBlockType::{CrossAttnUpBlock2D, UpBlock2D};
    UNet2DConditionConfig {
        sample_size: Some(SampleSize::Square(8)),
        down_block_types: vec![CrossAttnDownBlock2D, DownBlock2D],
        up_block_types: vec![UpBlock2D, CrossAttnUpBlock2D],
        block_out_channels: channels.to_vec(),
        layers_per_block: PerLevel::All(1),
        attention_head_dim: PerLevel::All(4),
        cross_attention_dim: PerLevel::All(text_width),
        norm_num_groups: groups,
        ..UNet2DConditionConfig::default()
    }
}
