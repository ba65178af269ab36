//! `ddil.json`: properties of a model that diffusers has no file for.

use std::path::{Path, PathBuf};

use ddil_core::Priors;
use ddil_files::read_versioned;
use ddil_schedulers::Thresholding;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The name of the file.
pub(super) const FILE_NAME: &str = "ddil.json";

/// The current version of the file.
const FORMAT_VERSION: u32 = 1;

/// Properties of a model beyond its weights and scheduler: `ddil.json` in its folder.
///
/// # Example
///
/// ```
/// use ddil_pipelines::Card;
///
/// let card = Card { guidance_range: Some([1.0, 7.0]), ..Card::default() };
/// assert_eq!(card.default_guidance_scale(), 4.0);
/// assert_eq!(Card::default().default_guidance_scale(), 1.0);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// Format version of the file.
    pub format_version: u32,
    /// `teacher`, or the method that trained the student.
    pub method: String,
    /// Names of the classes; empty for a model without classes.
    pub class_names: Vec<String>,
    /// The label of the unconditional class; `None` for a model that cannot be guided.
    pub null_class: Option<i64>,
    /// Channels, height, width.
    pub image_shape: [i64; 3],
    /// The guidance scale distilled into the weights; `None` for a teacher.
    pub guidance_scale: Option<f64>,
    /// The smallest and largest guidance scale of a network with a guidance embedding; `None` without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance_range: Option<[f64; 2]>,
    /// Thresholding that diffusers' scheduler config cannot represent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thresholding: Option<Thresholding>,
    /// The base of an adapter; `None` for a complete model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterCard>,
    /// Priors of the sources at the end of a student's training; `None` for a teacher.
    pub priors: Option<Priors>,
    /// Number of training updates.
    pub updates: u64,
    /// Training time in seconds; ignored when models are compared.
    pub seconds: f64,
    /// Seed of the training run.
    pub seed: u64,
}

/// The base and size of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterCard {
    /// The folder of the complete model that it was trained on.
    pub base: PathBuf,
    /// Rank: the inner dimension of the two factors.
    pub rank: i64,
    /// The update of the weights is scaled by `alpha / rank`.
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
    /// Reads a card.
    ///
    /// # Errors
    ///
    /// [`Error::Files`](crate::Error::Files), also for another format version.
    pub fn from_file(path: &Path) -> Result<Self> {
        Ok(read_versioned(path, FORMAT_VERSION)?)
    }

    /// The card of a folder, if it has one.
    pub(super) fn in_folder(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE_NAME);
        path.is_file().then(|| Self::from_file(&path)).transpose()
    }

    /// Whether the model is a student, which was trained for its own sampling settings.
    pub(super) fn is_student(&self) -> bool {
        !["", "teacher"].contains(&self.method.as_str())
    }

    /// The default guidance scale: the midpoint of the range for a network with a guidance embedding, otherwise 1,
    /// which is no guidance.
    pub fn default_guidance_scale(&self) -> f64 {
        self.guidance_range.map_or(1.0, |[min, max]| f64::midpoint(min, max))
    }
}
