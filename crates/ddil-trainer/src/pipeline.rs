//! A model folder as diffusers reads and writes it, with a card for what diffusers has no place for.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_core::{Conditioning, Denoiser, Priors};
use ddil_models::{Model, ModelConfig, Placement, UnknownKeys, weights};
use ddil_schedulers::{CommonConfig, LcmConfig, SchedulerConfig, Thresholding, Timesteps};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::config::Precision;
use crate::error::{Error, Result};
use crate::files::{read_json, write_json};
use crate::network::Network;
use crate::sampler::SamplerKind;

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
    /// Priors of the sources at the end of a student's training; none for a teacher.
    pub priors: Option<Priors>,
    /// Updates of its training.
    pub updates: u64,
    /// Seconds of its training; not part of what is compared.
    pub seconds: f64,
    /// Seed of its training.
    pub seed: u64,
}

impl Default for Card {
    fn default() -> Self {
        Self {
            format_version: 1,
            method: String::new(),
            class_names: Vec::new(),
            null_class: None,
            image_shape: [0; 3],
            guidance_scale: None,
            guidance_range: None,
            thresholding: None,
            priors: None,
            updates: 0,
            seconds: 0.0,
            seed: 0,
        }
    }
}

impl Card {
    /// What a sampler is told unless somebody asks for another scale: the middle of the range for a network that is
    /// told its guidance, none for every other.
    pub fn default_guidance_scale(&self) -> f64 {
        self.guidance_range.map_or(1.0, |[min, max]| f64::midpoint(min, max))
    }

    /// What the network is told for "no condition", one row.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] for a model without a null class, which cannot be guided.
    pub fn null_conditioning(&self) -> Result<Conditioning> {
        match self.null_class {
            Some(class) => Ok(Conditioning::class_labels(Tensor::from_slice(&[class]))),
            None => Err(Error::InvalidConfig {
                field: "guidance_scale".to_owned(),
                value: "other than 1".to_owned(),
                expected: "1: the model was trained without a null class and cannot be guided"
                    .to_owned(),
            }),
        }
    }
}

/// A model read from its folder.
#[derive(Debug)]
pub struct Pipeline {
    /// The network.
    pub network: Network,
    /// How it steps when it is sampled.
    pub sampler: SamplerKind,
    /// What is done with clean data beyond their range when it is sampled.
    pub thresholding: Thresholding,
    /// The timesteps that a student was trained at; none for a teacher.
    pub timesteps: Option<Vec<i64>>,
    /// What else is known of it.
    pub card: Card,
    /// The folder.
    pub path: PathBuf,
}

const INDEX: &str = "model_index.json";
const CARD: &str = "ddil.json";
const UNET: &str = "unet";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

/// `model_index.json`: which class each sub-folder holds.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    #[serde(rename = "_class_name")]
    class_name: String,
    #[serde(rename = "_diffusers_version")]
    diffusers_version: String,
    scheduler: [String; 2],
    unet: [String; 2],
}

impl Pipeline {
    /// Reads a model folder, or the export of a run folder.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`] if the folder holds no model; what its files refuse: unknown keys, other blocks,
    /// missing, unexpected or misshapen weights.
    pub fn read(path: &Path, placement: Placement, precision: Precision) -> Result<Self> {
        let path = Self::find(path)?;
        let scheduler = SchedulerConfig::read(path.join(SCHEDULER))?;
        let config = path.join(UNET).join("config.json");
        // Nothing here tells a network a text yet, so one that has to be told would fail at its first pass.
        let unet = match ModelConfig::from_file(&config, UnknownKeys::Refuse)? {
            ModelConfig::UNet2D(unet) => unet,
            other => {
                return Err(Error::InvalidConfig {
                    field: format!("_class_name in {}", config.display()),
                    value: other.class_name().to_owned(),
                    expected: "UNet2DModel, a network of pixels and classes".to_owned(),
                });
            }
        };
        let weights = weights::WeightFiles::DIFFUSION.find(path.join(UNET))?;
        let unet = Model::UNet2D(unet.build_from(placement, weights)?);
        unet.parameters().set_trainable(false);
        let schedule = scheduler.schedule()?;
        let network = Network::new(unet, scheduler.prediction_type(), schedule, precision);
        let card: Card = match path.join(CARD) {
            card if card.is_file() => read_json(&card)?,
            // A folder that diffusers wrote: classes, if any, without a null class.
            _ => Card { image_shape: image_shape(&network.config()), ..Card::default() },
        };
        let thresholding = card.thresholding.clone().unwrap_or_else(|| scheduler.thresholding());
        let timesteps = scheduler.common().ddil_timesteps.clone();
        let sampler = match (&scheduler, scheduler.boundary()) {
            (SchedulerConfig::Lcm(lcm), Some(boundary)) => {
                SamplerKind::Lcm { original_steps: lcm.original_inference_steps, boundary }
            }
            _ => SamplerKind::Ddim { eta: 0.0 },
        };
        Ok(Self { network, sampler, thresholding, timesteps, card, path })
    }

    /// The model folder at `path`: itself, or the export below it.
    fn find(path: &Path) -> Result<PathBuf> {
        [path.to_owned(), path.join("export")]
            .into_iter()
            .find(|folder| folder.join(INDEX).is_file())
            .ok_or_else(|| Error::NotAModel { path: path.to_owned(), missing: INDEX })
    }

    /// Whether a model can be read from `path`, by the look of it.
    pub fn is_at(path: &Path) -> bool {
        Self::find(path).is_ok()
    }

    /// Writes a model folder that diffusers' pipelines and [`read`](Self::read) read: `DDIMPipeline` for DDIM,
    /// `DDPMPipeline`, which takes any scheduler, for LCM.
    ///
    /// A folder that is there already is written over file by file, each of them whole or not at all.
    ///
    /// # Errors
    ///
    /// What the file system refuses.
    pub fn write(
        folder: &Path,
        network: &Network,
        scheduler: &Scheduler,
        card: &Card,
    ) -> Result<()> {
        for sub in [folder.join(UNET), folder.join("scheduler")] {
            fs::create_dir_all(&sub).map_err(Error::io("create", &sub))?;
        }
        weights::save(&network.parameters().named(), folder.join(WEIGHTS), &BTreeMap::new())?;
        let config = folder.join(UNET).join("config.json");
        crate::files::write_atomic(&config, network.config().to_json().as_bytes())?;
        scheduler.config.write(folder.join(SCHEDULER))?;
        let thresholding = scheduler.unspoken.clone();
        write_json(&folder.join(CARD), &Card { thresholding, ..card.clone() })?;
        let pipeline = match scheduler.config {
            SchedulerConfig::Ddim(_) => "DDIMPipeline",
            SchedulerConfig::Lcm(_) => "DDPMPipeline",
        };
        // Last: a folder with an index is a whole one.
        let class = |name: &str| ["diffusers".to_owned(), name.to_owned()];
        write_json(
            &folder.join(INDEX),
            &Index {
                class_name: pipeline.to_owned(),
                diffusers_version: "0.38.0".to_owned(),
                scheduler: class(scheduler.config.class()),
                unet: class("UNet2DModel"),
            },
        )
    }
}

/// How a model is sampled, in diffusers' words as far as they go.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheduler {
    /// `scheduler_config.json`.
    config: SchedulerConfig,
    /// A treatment of clean data that the file has no words for, which the card keeps.
    unspoken: Option<Thresholding>,
}

impl Scheduler {
    /// Puts a model's way of sampling into diffusers' words. Asked before a run begins, so that none ends without its
    /// model.
    ///
    /// A treatment of clean data that diffusers does not know (a range that is not symmetric or differs by channel,
    /// reflection) goes to the card, where only this program looks for it.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] for what diffusers' schedulers do not know: other families of schedules, flow prediction.
    pub fn new(
        network: &Network,
        sampler: SamplerKind,
        thresholding: &Thresholding,
        timesteps: Option<&Timesteps>,
    ) -> Result<Self> {
        let (schedule, output) = (network.schedule().config(), network.prediction_type());
        let spoken = CommonConfig::new(schedule, output, thresholding);
        let (config, unspoken) = match spoken {
            Err(ddil_schedulers::Error::NotRepresentable { field: "thresholding", .. }) => {
                let config = CommonConfig::new(schedule, output, &Thresholding::None)?;
                (config, Some(thresholding.clone()))
            }
            spoken => (spoken?, None),
        };
        let common = match timesteps {
            Some(timesteps) => config.with_trained_timesteps(timesteps),
            None => config,
        };
        let config = match sampler {
            SamplerKind::Ddim { .. } => SchedulerConfig::Ddim(common),
            SamplerKind::Lcm { original_steps, boundary } => SchedulerConfig::Lcm(LcmConfig {
                common,
                original_inference_steps: original_steps,
                timestep_scaling: boundary.timestep_scaling,
            }),
        };
        Ok(Self { config, unspoken })
    }
}

/// Channels, height and width by the network's own settings; 0 where they do not say.
fn image_shape(config: &ModelConfig) -> [i64; 3] {
    let [channels, _] = config.channels().unwrap_or_default();
    let [height, width] = config.sample_size().unwrap_or_default();
    [channels, height, width].map(i64::from)
}
