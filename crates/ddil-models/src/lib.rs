//! Denoisers on libtorch with diffusers' weight names and numbers.
//!
//! Networks here only answer: they take noisy samples and timesteps and say what they see. Files are safetensors and
//! JSON as diffusers lays them out, so a teacher trained there loads here unrenamed, and a student trained here loads
//! there.

#![forbid(unsafe_code)]

mod autoencoder;
mod clip;
mod config;
mod denoiser;
mod discriminator;
mod error;
mod layers;
mod lora;
mod mlp;
mod model;
mod network_output;
mod parameters;
mod torch_script;
mod toy;
mod unet;
pub mod weights;

pub use autoencoder::{
    AutoencoderKL, AutoencoderKLConfig, DecoderBlockType, DiagonalGaussian, EncoderBlockType,
};
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
pub use model::{Model, ModelConfig};
pub use network_output::NetworkOutput;
pub use parameters::{Matched, Parameters, Placement};
pub use torch_script::{TorchScript, TorchScriptConfig};
pub use toy::{GaussianMixture, MixtureDenoiser};
pub use unet::{
    AdditionEmbedType, AttentionType, ClassEmbedType, ConditionDownBlockType,
    ConditionMidBlockType, ConditionUpBlockType, DownBlockType, MidBlockType, PerLevel,
    ResampleType, SampleSize, TimeEmbeddingType, TimeScaleShift, TransformerDepth,
    TransformerLayers, UNet2DConditionConfig, UNet2DConditionInputs, UNet2DConditionModel,
    UNet2DConfig, UNet2DModel, UpBlockType,
};
