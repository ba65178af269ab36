//! `ddil.json`: what a model is, beyond its weights and its scheduler.

use std::path::{Path, PathBuf};

use ddil_core::Priors;
use ddil_files::read_versioned;
use ddil_schedulers::Thresholding;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The file's name.
pub(super) const FILE_NAME: &str = "ddil.json";

/// The only version of the file so far.
const FORMAT_VERSION: u32 = 1;

/// What a model is, beyond its weights and its scheduler: `ddil.json` in its folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// Version of this file.
    pub format_version: u32,
    /// `teacher`, or the method that made the student.
    pub method: String,
    /// Names of the classes; none for a model without.
    pub class_names: Vec<String>,
    /// The class that stands for "no condition"; none for a model that cannot be guided.
    pub null_class: Option<i64>,
    /// Channels, height, width.
    pub image_shape: [i64; 3],
    /// The scale of the guidance that is baked in; none for a plain teacher.
    pub guidance_scale: Option<f64>,
    /// The least and the greatest scale of guidance that the network may be told; none for one that is told none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance_range: Option<[f64; 2]>,
    /// What is done with clean data beyond their range, where diffusers' scheduler has no word for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thresholding: Option<Thresholding>,
    /// The base of a model that is an adapter; none for a whole one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterCard>,
    /// Priors of the sources at the end of a student's training; none for a teacher.
    pub priors: Option<Priors>,
    /// Updates of its training.
    pub updates: u64,
    /// Seconds of its training; not part of what is compared.
    pub seconds: f64,
    /// Seed of its training.
    pub seed: u64,
}

/// What an adapter stands on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterCard {
    /// The folder of the whole model whose network it was trained on.
    pub base: PathBuf,
    /// How many numbers lie between the two factors of an adapter.
    pub rank: i64,
    /// What an adapter adds is multiplied by `alpha / rank`.
    pub alpha: f64,
}

impl Default for Card {
    fn default() -> Self {
        Self {
            format_version: FORMAT_VERSION,
            method: String::new(),
            class_names: Vec::new(),
            null_class: None,
            image_shape: [0; 3],
            guidance_scale: None,
            guidance_range: None,
            thresholding: None,
            adapter: None,
            priors: None,
            updates: 0,
            seconds: 0.0,
            seed: 0,
        }
    }
}

impl Card {
    /// The card in a file.
    ///
    /// # Errors
    ///
    /// [`Error::Files`](crate::Error::Files), also if another version wrote it.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(read_versioned(path, FORMAT_VERSION)?)
    }

    /// What a sampler is told unless somebody asks for another scale: the middle of the range for a network that is
    /// told its guidance, none for every other.
    pub fn default_guidance_scale(&self) -> f64 {
        self.guidance_range.map_or(1.0, |[min, max]| f64::midpoint(min, max))
    }
}
