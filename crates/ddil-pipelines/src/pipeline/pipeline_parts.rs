//! What stands around the network in a model folder, and its copy in another.

use std::fs;
use std::path::{Path, PathBuf};

use ddil_models::{AutoencoderKL, ModelConfig, Placement, UnknownKeys};
use ddil_schedulers::SchedulerConfig;

use super::index::{Index, PipelineClass};
use super::text_to_image::TextToImageComponents;
use crate::error::{Error, Result};

/// A model folder without its network and scheduler: for a text-to-image model the text encoders with their tokenizers and
/// the autoencoder, for one of pixels nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineParts {
    path: PathBuf,
    index: Index,
}

/// The folder of the autoencoder.
const VAE: &str = "vae";

/// What a folder has of its own.
const OWN: [&str; 2] = ["unet", "scheduler"];

impl PipelineParts {
    /// Looks at the index of a folder.
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

    /// Loads the parts of a text-to-image model.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a model of pixels, and for one that lacks a part; what a part refuses.
    pub fn text_to_image(&self, placement: Placement) -> Result<TextToImageComponents> {
        TextToImageComponents::read(&self.path, &self.index, placement)
    }

    /// Loads the autoencoder of a text-to-image model alone, which is all that latents need to be seen.
    ///
    /// # Errors
    ///
    /// What its files refuse.
    pub fn autoencoder(&self, placement: Placement) -> Result<AutoencoderKL> {
        let folder = self.path.join(VAE);
        let vae = AutoencoderKL::from_folder(folder, placement, UnknownKeys::Refuse, None)?;
        vae.parameters().set_trainable(false);
        Ok(vae)
    }

    /// Names of the folders that encoded texts and pictures depend on.
    pub fn text_parts(&self) -> Vec<String> {
        let of_text = |name: &str| {
            name == VAE || name.starts_with("text_encoder") || name.starts_with("tokenizer")
        };
        let parts = self.index.parts.iter().filter(|(name, part)| part.is_some() && of_text(name));
        parts.map(|(name, _)| name.clone()).collect()
    }

    /// The class and what else the index says beside the parts, in one line.
    pub fn settings(&self) -> String {
        format!("{} {:?}", self.index.class.as_str(), self.index.settings)
    }

    /// Copies the parts around a network and writes the index.
    pub(super) fn write(
        folder: &Path,
        network: &ModelConfig,
        scheduler: &SchedulerConfig,
        around: Option<&Self>,
    ) -> Result<()> {
        let class = match scheduler {
            SchedulerConfig::Ddim(_) => PipelineClass::Ddim,
            SchedulerConfig::Lcm(_) => PipelineClass::Ddpm,
        };
        let own = Index::of_pixels(class, network.class_name(), scheduler.class());
        let index = match around {
            Some(around) if around.class().is_text_to_image() => {
                around.copy_parts(folder)?;
                let mut index = around.index.clone();
                index.parts.extend(own.parts);
                if network.time_cond_proj_dim().is_some() {
                    index.tell_guidance();
                }
                index
            }
            _ => own,
        };
        index.write(folder)
    }

    fn copy_parts(&self, folder: &Path) -> Result<()> {
        let others = self.index.parts.iter().filter(|(name, _)| !OWN.contains(&name.as_str()));
        for (name, _) in others.filter(|(_, part)| part.is_some()) {
            copy_folder(&self.path.join(name), &folder.join(name))?;
        }
        Ok(())
    }
}

/// Copies a folder, file by file; a file that is there already is replaced. Folders behind a link are not gone into: it may
/// lead back, or to what nobody meant to copy.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io("create", to))?;
    for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
        let entry = entry.map_err(Error::io("list", from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().map_err(Error::io("look at", &source))?.is_dir() {
            copy_folder(&source, &target)?;
        } else if source.is_file() {
            fs::copy(&source, &target).map_err(Error::io("copy", &source))?;
        }
    }
    Ok(())
}
