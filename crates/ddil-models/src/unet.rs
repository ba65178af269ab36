//! The U-Nets of diffusers: for pixels, and conditioned on a text.

pub(crate) mod blocks;
pub(crate) mod body;
pub(crate) mod condition;
pub(crate) mod condition_config;
pub(crate) mod core;
pub(crate) mod pixels;
pub(crate) mod pixels_config;

pub use condition::{UNet2DConditionInputs, UNet2DConditionModel};
pub use condition_config::{
    AdditionEmbedType, AttentionType, ConditionDownBlockType, ConditionMidBlockType,
    ConditionUpBlockType, PerLevel, TransformerDepth, TransformerLayers, UNet2DConditionConfig,
};
pub use pixels::UNet2DModel;
pub use pixels_config::{
    ClassEmbedType, DownBlockType, MidBlockType, ResampleType, SampleSize, TimeEmbeddingType,
    TimeScaleShift, UNet2DConfig, UpBlockType,
};
