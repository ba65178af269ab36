//! Diffusion pipelines: generate images from diffusers model folders, and write such folders.
//!
//! [`TextToImage`] generates images from prompts, [`ClassToImage`] from class labels with pixel-space models. The lower
//! level is public too: [`Pipeline`] reads and writes model folders, [`SamplePlan`] contains the sampling settings,
//! [`generate`] runs the sampler, and [`Image`] arranges images in a grid.
//!
//! | task | items | shapes |
//! | --- | --- | --- |
//! | prompts to images | [`TextToImage`], [`PromptImages`] | `[n, 3, height, width]`, -1 to 1 |
//! | classes to images | [`ClassToImage`], [`ClassImages`] | `[n, channels, height, width]`, -1 to 1 |
//! | model folders | [`Pipeline`], [`Card`], [`Scheduler`], [`PipelineParts`] | |
//! | conversion of model files | [`ModelFiles`], [`PartSummary`], [`WeightForm`] | |
//! | text encoders and autoencoder | [`TextToImageComponents`], [`EncodedPrompts`] | `[prompts, tokens, width]`, latents `[n, channels, height / 8, width / 8]` |
//! | guidance | [`Guidance`] | |
//! | sampling | [`SamplePlan`], [`with_published_solver`], [`generate`], [`generate_from`], [`initial_noise`], [`class_conditioning`] | `[n, channels, height, width]` |
//! | prompts, step by step | [`PromptRequest`], [`EncodedRequest`], [`sample_latents`], [`sample_latents_seeded`], [`decode`] | |
//! | PNG files and grids | [`Image`], [`Layout`], [`SampleGrid`], [`save_each`] | |
//!
//! # Example
//!
//! ```
//! use ddil_pipelines::{Layout, Image, TextToImage};
//! use std::num::NonZeroU32;
//!
//! # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-text-to-image");
//! # let folder = tempfile::tempdir()?;
//! # let file = folder.path().join("sneakers.png");
//! let model = TextToImage::open(path, Default::default())?;
//! let images = model.prompt("a sneaker").images_per_prompt(2).steps(2).seed(7).images()?;
//!
//! let two = NonZeroU32::new(2).ok_or("not zero")?;
//! Image::grid(&images, Layout::columns(two))?.save(&file)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod error;
mod generation;
mod guidance;
mod image;
mod model_card;
mod notes;
mod pipeline;
mod prompting;
mod sampling;

pub use ddil_files::Report;
pub use ddil_models::Precision;
pub use error::{Error, Result};
pub use generation::{ClassImages, ClassToImage, PromptImages, TextToImage};
pub use guidance::Guidance;
pub use image::{Image, Layout, save_each};
pub use model_card::{model_card, write_model_card};
pub use pipeline::{
    AdapterCard, Card, EncodedPrompts, ModelFiles, PartSummary, Pipeline, PipelineClass,
    PipelineParts, Scheduler, TextToImageComponents, WeightForm,
};
pub use prompting::{
    EncodedRequest, PromptRequest, decode, sample_latents, sample_latents_seeded,
    with_published_solver, with_published_timesteps,
};
pub use sampling::{
    SampleGrid, SamplePlan, WithCallback, class_conditioning, generate, generate_from,
    grid_of_classes, grid_of_prompts, initial_noise, layout, num_samples_of_grid,
    sampling_denoiser,
};
pub use tch;
