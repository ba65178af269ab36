//! Tests of `ddil-models`, a module for each of its files.

mod adapted;
mod autoencoder;
mod autoencoder_config;
mod clip;
mod common;
mod denoiser;
mod dinov2;
mod discriminator;
mod lora;
mod matching;
mod mlp;
mod model;
mod parameters;
mod recompute;
mod torch_script;
mod unet;
mod unet_condition;
mod unet_condition_config;
mod unet_config;
mod weight_files;
mod weights;
