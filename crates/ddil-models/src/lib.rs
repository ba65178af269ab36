//! Denoisers on libtorch with diffusers' weight names and numbers.
//!
//! Networks here only answer: they take noisy samples and timesteps and say what they see. Files are safetensors and
//! JSON as diffusers lays them out, so a teacher trained there loads here unrenamed, and a student trained here loads
//! there.

mod attention;
mod config;
mod embeddings;
mod error;
mod layers;
mod parameters;
mod resnet;
mod unet;
mod unet_blocks;
mod unet_config;
pub mod weights;

pub use config::UnknownKeys;
pub use error::{BoxedError, ConfigProblem, Error, Result, WeightProblems};
pub use layers::Activation;
pub use parameters::{Parameters, Placement};
pub use unet::{UNet2DModel, UNet2DOutput};
pub use unet_config::{
    ClassEmbedType, DownBlockType, MidBlockType, ResampleType, SampleSize, TimeEmbeddingType,
    TimeScaleShift, UNet2DConfig, UpBlockType,
};
