//! A text-to-image model of Stable Diffusion's classes that is small enough to be trained on one core.
//!
//! An autoencoder makes latents of pictures; a text encoder and a U-Net are then trained together to say what noise is in
//! noised latents, told a caption. What is written is a folder of diffusers' `StableDiffusionPipeline`.

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
