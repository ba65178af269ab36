//! Diffusion pipelines: from a model folder of diffusers to images, and back into a folder.
//!
//! [`TextToImage`] draws images of prompts, [`ClassToImage`] those of models of pixels. Below them, [`Pipeline`] reads and
//! writes model folders, [`SamplePlan`] determines how samples are drawn, [`generate`] draws them, and [`Picture`] lays
//! images out in a grid. No command line, no plots, no training.
//!
//! | for | there is | shapes |
//! | --- | --- | --- |
//! | prompts to images | [`TextToImage`], [`PromptImages`] | `[n, 3, height, width]`, -1 to 1 |
//! | classes to images | [`ClassToImage`], [`ClassImages`] | `[n, channels, height, width]`, -1 to 1 |
//! | model folders | [`Pipeline`], [`Card`], [`Scheduler`], [`PipelineParts`], [`Parts`] | |
//! | text encoders and autoencoder | [`TextToImageComponents`], [`EncodedPrompts`] | `[prompts, tokens, width]`, latents `[n, channels, height / 8, width / 8]` |
//! | guidance | [`Guide`] | |
//! | sampling | [`SamplePlan`], [`generate`], [`initial_noise`], [`classes`] | `[n, channels, height, width]` |
//! | prompts, step by step | [`PromptRequest`], [`draw_latents`], [`decode`] | |
//! | PNG files and grids | [`Picture`], [`Layout`], [`Arrangement`], [`save_each`] | |
//!
//! # Example
//!
//! ```
//! use ddil_pipelines::{Layout, Picture, TextToImage};
//! use std::num::NonZeroU32;
//!
//! # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-text-to-image");
//! # let folder = tempfile::tempdir()?;
//! # let file = folder.path().join("sneakers.png");
//! let model = TextToImage::open(path, Default::default())?;
//! let images = model.prompt("a sneaker").images_per_prompt(2).steps(2).seed(7).images()?;
//!
//! let two = NonZeroU32::new(2).ok_or("not zero")?;
//! Picture::grid(&images, Layout::columns(two))?.save(&file)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod error;
mod generation;
mod guidance;
mod picture;
mod pipeline;
mod prompting;
mod sampling;

pub use ddil_models::Precision;
pub use error::{Error, Result};
pub use generation::{ClassImages, ClassToImage, PromptImages, TextToImage};
pub use guidance::Guide;
pub use picture::{Layout, Picture, save_each};
pub use pipeline::{
    AdapterCard, Card, EncodedPrompts, PartSummary, Parts, Pipeline, PipelineClass, PipelineParts,
    Scheduler, TextToImageComponents, WeightForm,
};
pub use prompting::{PromptRequest, Told, decode, draw_latents, spaced_as_published};
pub use sampling::{
    Arrangement, Observed, SamplePlan, asked, classes, generate, grid_of_classes, grid_of_prompts,
    initial_noise, layout,
};
pub use tch;
