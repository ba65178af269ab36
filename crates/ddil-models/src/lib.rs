//! Networks on libtorch that load and save diffusers' and transformers' files: U-Nets for pixels and for text to image,
//! the latent autoencoder, CLIP, `DINOv2`, LoRA adapters, and small networks for experiments.
//!
//! A teacher trained in diffusers loads here without renaming, and a student trained here loads in diffusers. Outputs
//! agree with diffusers' up to rounding. A [`NetworkDenoiser`] wraps a network as teacher, student or critic for
//! `ddil-core` and `ddil-losses`.
//!
//! | purpose | types |
//! | --- | --- |
//! | settings in files, and networks from them | [`NetworkConfig`], [`UnknownKeys`], [`Placement`] |
//! | a network of any class, and its folder | [`ModelConfig`], [`Model`] |
//! | samples of pixels or latents | [`UNet2DConfig`], [`UNet2DModel`] |
//! | text to image | [`UNet2DConditionConfig`], [`UNet2DConditionModel`] |
//! | images to latents and back | [`AutoencoderKLConfig`], [`AutoencoderKL`] |
//! | text and images in one space | [`ClipTextModel`], [`ClipVisionModel`], [`ClipModel`], [`ClipScore`] |
//! | features of images | [`Dinov2Model`] |
//! | vectors, other networks | [`Mlp`], [`TorchScript`] |
//! | sampling and losses | [`NetworkDenoiser`], with [`Precision`] and [`OutputObserver`]; [`NetworkDiscriminator`] |
//! | adapters | [`LoraConfig`], [`Lora`] |
//! | parameters and files | [`Parameters`], [`Matched`], [`weights`] |
//!
//! # Example
//!
//! ```
//! use ddil_core::{Conditioning, Denoiser};
//! use ddil_models::{
//!     DownBlockType, Model, NetworkConfig, NetworkDenoiser, Placement, UNet2DConfig, UpBlockType,
//! };
//! use ddil_schedulers::{NoiseScheduleConfig, PredictionType};
//! use tch::{Tensor, kind};
//!
//! let config = UNet2DConfig {
//!     in_channels: 1,
//!     out_channels: 1,
//!     down_block_types: vec![DownBlockType::DownBlock2D, DownBlockType::AttnDownBlock2D],
//!     up_block_types: vec![UpBlockType::AttnUpBlock2D, UpBlockType::UpBlock2D],
//!     block_out_channels: vec![8, 16],
//!     norm_num_groups: 4,
//!     ..UNet2DConfig::default()
//! };
//! let network = Model::UNet2D(config.build(Placement::default(), 0)?);
//! let schedule = NoiseScheduleConfig::default().build()?;
//! let denoiser = NetworkDenoiser::new(network, PredictionType::Epsilon, schedule)?;
//!
//! let x_t = Tensor::randn([2, 1, 8, 8], kind::FLOAT_CPU);
//! let timesteps = Tensor::from_slice(&[999_i64, 249]);
//! let prediction = denoiser.predict(&x_t, &timesteps, &Conditioning::none())?;
//! assert_eq!(prediction.x0.size(), [2, 1, 8, 8]);
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod autoencoder;
mod clip;
mod config;
mod denoiser;
mod dinov2;
mod discriminator;
mod error;
mod foreign_keys;
mod layers;
mod lora;
mod mlp;
mod model;
mod network_output;
mod parameters;
mod torch_script;
mod transformers_folder;
mod transformers_json;
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
pub use config::{NetworkConfig, UnknownKeys};
pub use ddil_files::Report;
pub use denoiser::{NetworkDenoiser, OutputObserver, Precision};
pub use dinov2::{Dinov2Config, Dinov2Model, Dinov2Output};
pub use discriminator::{DiscriminatorHead, DiscriminatorHeadConfig, NetworkDiscriminator};
pub use error::{BoxedError, Error, IndexProblems, Result, WeightProblems};
pub use layers::Activation;
pub use lora::{Lora, LoraConfig, LoraFormat, LoraLayer, Switched};
pub use mlp::{Mlp, MlpConfig, SkipConfig};
pub use model::{Model, ModelConfig};
pub use network_output::NetworkOutput;
pub use parameters::{Matched, Parameters, Placement};
pub use torch_script::{TorchScript, TorchScriptConfig};
pub use unet::{
    AdditionEmbedType, AttentionType, ClassEmbedType, ConditionDownBlockType,
    ConditionMidBlockType, ConditionUpBlockType, DownBlockType, MidBlockType, PerLevel,
    ResampleType, SampleSize, TimeEmbeddingType, TimeScaleShift, TransformerDepth,
    TransformerLayers, UNet2DConditionConfig, UNet2DConditionInputs, UNet2DConditionModel,
    UNet2DConfig, UNet2DModel, UpBlockType,
};
