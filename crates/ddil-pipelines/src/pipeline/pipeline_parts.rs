//! The parts of a model folder other than network and scheduler.

use std::fs;
use std::path::{Path, PathBuf};

use ddil_models::{AutoencoderKL, AutoencoderKLConfig, ModelConfig, Placement};
use ddil_schedulers::SchedulerConfig;

use super::index::{Index, PipelineClass};
use super::published::{self, VAE};
use super::text_to_image::TextToImageComponents;
use crate::error::{Error, Result};

/// The parts of a model folder other than network and scheduler: for a text-to-image model tokenizers, text encoders
/// and autoencoder; none for a pixel-space model.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineParts {
    path: PathBuf,
    index: Index,
}

/// Parts that are written, not copied.
const WRITTEN: [&str; 2] = ["unet", "scheduler"];

impl PipelineParts {
    /// Reads the index of a folder.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        Ok(Self { path: folder.to_owned(), index: Index::read(folder)? })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The class of the pipeline.
    pub fn class(&self) -> PipelineClass {
        self.index.class
    }

    /// Loads the components of a text-to-image model.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a pixel-space model or a missing component; otherwise the error of a component.
    pub fn text_to_image(&self, placement: Placement) -> Result<TextToImageComponents> {
        TextToImageComponents::read(&self.path, &self.index, placement)
    }

    /// Loads only the autoencoder of a text-to-image model, which is sufficient to decode latents.
    ///
    /// # Errors
    ///
    /// The errors of its files.
    pub fn autoencoder(&self, placement: Placement) -> Result<AutoencoderKL> {
        published::autoencoder(&self.path, self.class(), placement)
    }

    /// The config of that autoencoder, with the settings that diffusers' pipeline applies to latents.
    ///
    /// # Errors
    ///
    /// [`Error::Models`] if it cannot be read.
    pub fn autoencoder_config(&self) -> Result<AutoencoderKLConfig> {
        published::autoencoder_config(&self.path, self.class())
    }

    /// Names of the folders that encoded texts and images depend on.
    pub fn text_parts(&self) -> Vec<String> {
        let of_text = |name: &str| {
            name == VAE || name.starts_with("text_encoder") || name.starts_with("tokenizer")
        };
        let parts = self.index.parts.iter().filter(|(name, part)| part.is_some() && of_text(name));
        parts.map(|(name, _)| name.clone()).collect()
    }

    /// The class and settings in the index, in one line.
    pub fn settings(&self) -> String {
        format!("{} {:?}", self.index.class.as_str(), self.index.settings)
    }

    /// Copies the other parts of `source` and writes the index.
    pub(super) fn write(
        folder: &Path,
        network: &ModelConfig,
        scheduler: &SchedulerConfig,
        source: Option<&Self>,
    ) -> Result<()> {
        let class = match scheduler {
            SchedulerConfig::Ddim(_) => PipelineClass::Ddim,
            SchedulerConfig::Lcm(_) => PipelineClass::Ddpm,
        };
        let written = Index::of_unet(class, network.class_name(), scheduler.class());
        let index = match source {
            Some(source) if source.class().is_text_to_image() => {
                source.copy_parts(folder)?;
                let mut index = source.index.clone();
                index.parts.extend(written.parts);
                index.select_class(network.time_cond_proj_dim().is_some(), scheduler.class());
                index
            }
            _ => written,
        };
        index.write(folder)
    }

    fn copy_parts(&self, folder: &Path) -> Result<()> {
        let others = self.index.parts.iter().filter(|(name, _)| !WRITTEN.contains(&name.as_str()));
        for (name, _) in others.filter(|(_, part)| part.is_some()) {
            copy_folder(&self.path.join(name), &folder.join(name))?;
        }
        Ok(())
    }
}

/// Copies a folder file by file and replaces existing files. Links to folders are not followed: they can form cycles or
/// lead to unrelated files.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io("create", to))?;
    for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
        let entry = entry.map_err(Error::io("list", from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().map_err(Error::io("read the type of", &source))?.is_dir() {
            copy_folder(&source, &target)?;
        } else if source.is_file() {
            fs::copy(&source, &target).map_err(Error::io("copy", &source))?;
        }
    }
    Ok(())
}
