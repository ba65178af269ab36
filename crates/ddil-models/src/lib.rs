//! Denoisers on libtorch with diffusers' weight names and numbers.
//!
//! Networks here only answer: they take noisy samples and timesteps and say what they see. Files are safetensors and
//! JSON as diffusers lays them out, so a teacher trained there loads here unrenamed, and a student trained here loads
//! there.

#![forbid(unsafe_code)]

mod addition_embedding;
mod attention;
mod autoencoder;
mod autoencoder_blocks;
mod autoencoder_config;
mod class_embedding;
mod clip;
mod config;
mod denoiser;
mod discriminator;
mod embeddings;
mod error;
mod layers;
mod lora;
mod mlp;
mod model;
mod parameters;
mod recompute;
mod resnet;
mod torch_script;
mod toy;
mod transformer;
mod unet;
mod unet_blocks;
mod unet_body;
mod unet_condition;
mod unet_condition_config;
mod unet_config;
pub mod weights;

pub use autoencoder::{AutoencoderKL, DiagonalGaussian};
pub use autoencoder_config::{AutoencoderKLConfig, DecoderBlockType, EncoderBlockType};
pub use clip::{
    ClipActivation, ClipConfig, ClipModel, ClipScore, ClipTextClass, ClipTextConfig, ClipTextModel,
    ClipTextOutput, ClipVisionClass, ClipVisionConfig, ClipVisionModel, ClipVisionOutput,
    HiddenState,
};
#[cfg(feature = "tokenizer")]
pub use clip::{ClipTokenizer, TokenizedPrompts};
pub use config::UnknownKeys;
pub use denoiser::{NetworkDenoiser, OutputObserver, Precision};
pub use discriminator::{DiscriminatorHead, DiscriminatorHeadConfig, NetworkDiscriminator};
pub use error::{BoxedError, Error, IndexProblems, Result, WeightProblems};
pub use layers::Activation;
pub use lora::{Lora, LoraConfig, LoraFormat, LoraLayer, Switched};
pub use mlp::{Mlp, MlpConfig, SkipConfig};
pub use model::{Model, ModelConfig, NetworkOutput};
pub use parameters::{Matched, Parameters, Placement};
pub use torch_script::{TorchScript, TorchScriptConfig};
pub use toy::{GaussianMixture, MixtureDenoiser};
pub use unet::UNet2DModel;
pub use unet_condition::{UNet2DConditionInputs, UNet2DConditionModel};
pub use unet_condition_config::{
    AdditionEmbedType, AttentionType, ConditionDownBlockType, ConditionMidBlockType,
    ConditionUpBlockType, PerLevel, TransformerDepth, TransformerLayers, UNet2DConditionConfig,
};
pub use unet_config::{
    ClassEmbedType, DownBlockType, MidBlockType, ResampleType, SampleSize, TimeEmbeddingType,
    TimeScaleShift, UNet2DConfig, UpBlockType,
};

/// The tch whose tensors this crate takes and returns. It is part of the API: a new tch is a breaking release.
pub use tch;
