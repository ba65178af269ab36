//! A text-to-image model with Stable Diffusion's classes that is small enough to train on one core.
//!
//! An autoencoder encodes images as latents; a text encoder and a U-Net are then trained together to predict the noise
//! in noised latents, conditioned on a caption. The output is a folder for diffusers' `StableDiffusionPipeline`.

mod autoencoder;
mod diffusion;
mod draw;
mod folder;
mod latents;
mod settings;
mod stage;

pub use autoencoder::train_autoencoder;
pub use diffusion::{Networks, Prompts, train_networks};
pub use draw::{Drawn, Sampling, draw};
pub use folder::{Parts, write_folder, write_tokenizer};
pub use latents::Latents;
pub use settings::{Settings, StageSettings, vocabulary};
pub use stage::Progress;

#[cfg(test)]
mod tests;
