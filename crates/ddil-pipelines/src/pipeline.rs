//! A model folder as diffusers reads and writes it, with a card for what diffusers has no place for.

mod adapter;
mod card;
mod index;
mod model_files;
mod pipeline_parts;
mod scheduler;
mod text_to_image;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::{Invalid, write_json};
use ddil_models::Precision;
use ddil_models::weights::{self, WeightFiles};
use ddil_models::{Model, ModelConfig, NetworkDenoiser, Placement, UnknownKeys};
use ddil_schedulers::{SamplerConfig, SchedulerConfig, Thresholding};

pub use self::card::{AdapterCard, Card};
pub use self::index::PipelineClass;
pub use self::model_files::{PartSummary, Parts, WeightForm};
pub use self::pipeline_parts::PipelineParts;
pub use self::scheduler::Scheduler;
pub use self::text_to_image::{EncodedPrompts, TextToImageComponents};
use crate::error::{Error, Result};

/// A model read from its folder.
#[derive(Debug)]
pub struct Pipeline {
    /// The network.
    pub network: NetworkDenoiser,
    /// How it steps when it is sampled.
    pub sampler: SamplerConfig,
    /// What is done with clean data beyond their range when it is sampled.
    pub thresholding: Thresholding,
    /// The timesteps that a student was trained at; none for a teacher.
    pub timesteps: Option<Vec<i64>>,
    /// How it is sampled, as its folder has it.
    pub scheduler: SchedulerConfig,
    /// What else is known of it.
    pub card: Card,
    /// The folder, and what stands in it around the network.
    pub parts: PipelineParts,
}

const UNET: &str = "unet";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

impl Pipeline {
    /// Reads a model folder, or the export of a run folder; of an adapter, the base and the adapter in its weights.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`] if the folder holds no model; what its files refuse: unknown keys, other blocks,
    /// missing, unexpected or misshapen weights.
    pub fn read(path: &Path, placement: Placement, precision: Precision) -> Result<Self> {
        Self::read_with(path, precision, |folder, _| {
            Ok(Model::from_folder(folder, placement, UnknownKeys::Refuse)?)
        })
    }

    /// As [`read`](Self::read), with a network whose weights are zeros that take no memory: for everything that is known of
    /// a model beside them. The files of the weights need not be there.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), save for weights.
    pub fn read_without_values(path: &Path) -> Result<Self> {
        let folder = Self::find(path)?;
        let base = Self::base_of(&folder)?;
        let scheduler = Self::read_scheduler(&folder)?;
        let without_values = |_: &Path, config: &ModelConfig| Ok(config.without_values()?);
        let (unet, parts) = Self::read_base(&base, without_values)?;
        Self::assemble(&folder, scheduler, unet, parts, Precision::Float32)
    }

    /// Checks that a model's weights are there and are those of its network, by the headers of their files.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn ensure_weights(path: &Path) -> Result<()> {
        let folder = Self::base_of(&Self::find(path)?)?.join(UNET);
        let config = ModelConfig::from_file(folder.join("config.json"), UnknownKeys::Refuse)?;
        let network = config.without_values()?;
        let file = WeightFiles::DIFFUSION.find(&folder)?;
        Ok(weights::ensure_fits(&network.parameters().named(), file)?)
    }

    fn read_with(
        path: &Path,
        precision: Precision,
        network: impl FnOnce(&Path, &ModelConfig) -> Result<Model>,
    ) -> Result<Self> {
        let folder = Self::find(path)?;
        if !folder.join(index::FILE_NAME).is_file() {
            return Self::read_adapter(&folder, network, precision);
        }
        let scheduler = Self::read_scheduler(&folder)?;
        let (unet, parts) = Self::read_base(&folder, network)?;
        Self::assemble(&folder, scheduler, unet, parts, precision)
    }

    fn read_scheduler(path: &Path) -> Result<SchedulerConfig> {
        let (scheduler, solver) = SchedulerConfig::read_any(path.join(SCHEDULER))?;
        if let Some(solver) = solver {
            tracing::info!("{}: DDIM takes the place of {solver}", path.display());
        }
        Ok(scheduler)
    }

    /// The network of a whole model, frozen, and what stands around it.
    fn read_base(
        path: &Path,
        network: impl FnOnce(&Path, &ModelConfig) -> Result<Model>,
    ) -> Result<(Model, PipelineParts)> {
        let parts = PipelineParts::read(path)?;
        let config_file = path.join(UNET).join("config.json");
        let config = ModelConfig::from_file(&config_file, UnknownKeys::Refuse)?;
        if config.channels().is_none() {
            return Err(Error::Invalid(Invalid::new(
                format!("_class_name in {}", config_file.display()),
                config.class_name().to_owned(),
                "UNet2DModel or UNet2DConditionModel",
            )));
        }
        let unet = network(&path.join(UNET), &config)?;
        unet.parameters().set_trainable(false);
        Ok((unet, parts))
    }

    /// Puts a network together with the scheduler and the card of a folder.
    fn assemble(
        path: &Path,
        scheduler: SchedulerConfig,
        unet: Model,
        parts: PipelineParts,
        precision: Precision,
    ) -> Result<Self> {
        let schedule = scheduler.schedule()?;
        let network = NetworkDenoiser::new(unet, scheduler.prediction_type(), schedule)?
            .with_precision(precision);
        let card: Card = match path.join(card::FILE_NAME) {
            card if card.is_file() => Card::read(&card)?,
            _ => foreign_card(&network.config()),
        };
        let thresholding = card.thresholding.clone().unwrap_or_else(|| scheduler.thresholding());
        let timesteps = scheduler.common().ddil_timesteps.clone();
        let sampler = scheduler.sampler_config();
        Ok(Self { network, sampler, thresholding, timesteps, scheduler, card, parts })
    }

    /// The model folder at `path`: itself, or the export below it.
    fn find(path: &Path) -> Result<PathBuf> {
        [path.to_owned(), path.join("export")]
            .into_iter()
            .find(|folder| folder.join(index::FILE_NAME).is_file() || adapter::is_in(folder))
            .ok_or_else(|| Error::NotAModel { path: path.to_owned(), missing: index::FILE_NAME })
    }

    /// Whether a model can be read from `path`, by the look of it.
    pub fn is_at(path: &Path) -> bool {
        Self::find(path).is_ok()
    }

    /// The class of the pipeline at `path`; nothing but its index is read.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), as far as the index goes.
    pub fn class_at(path: &Path) -> Result<PipelineClass> {
        Ok(PipelineParts::read(&Self::base_of(&Self::find(path)?)?)?.class())
    }

    /// The scale of guidance that samples have unless somebody asks for another: that of the card, and for a teacher of
    /// text to image the one that diffusers' pipeline of its class has.
    pub fn default_guidance_scale(&self) -> f64 {
        let is_teacher = self.card.method.is_empty() || self.card.method == "teacher";
        match (self.parts.class(), self.sampler) {
            (PipelineClass::StableDiffusion, SamplerConfig::Ddim { .. }) if is_teacher => 7.5,
            (PipelineClass::StableDiffusionXl, SamplerConfig::Ddim { .. }) if is_teacher => 5.0,
            _ => self.card.default_guidance_scale(),
        }
    }

    /// Writes a model folder that diffusers' pipelines and [`read`](Self::read) read.
    ///
    /// Without `parts` it is a U-Net and a scheduler: `DDIMPipeline` for DDIM, `DDPMPipeline`, which takes any scheduler,
    /// for LCM. With that of a text-to-image model, what stands around its network is copied.
    ///
    /// The settings of the network say the size of the card, which is that of what it was trained on. A folder that is there
    /// already is written over file by file, each of them whole or not at all.
    ///
    /// # Errors
    ///
    /// What the file system refuses.
    pub fn write(
        folder: &Path,
        network: &NetworkDenoiser,
        scheduler: &Scheduler,
        card: &Card,
        parts: Option<&PipelineParts>,
    ) -> Result<()> {
        for sub in [folder.join(UNET), folder.join("scheduler")] {
            fs::create_dir_all(&sub).map_err(Error::io("create", &sub))?;
        }
        weights::save(&network.weights()?, folder.join(WEIGHTS), &BTreeMap::new())?;
        let config = sized(network.config(), card)?;
        let config_file = folder.join(UNET).join("config.json");
        ddil_files::write_atomic(&config_file, config.to_json().as_bytes())?;
        scheduler.config.write(folder.join(SCHEDULER))?;
        let thresholding = scheduler.unspoken.clone();
        write_json(&folder.join(card::FILE_NAME), &Card { thresholding, ..card.clone() })?;
        // Last: a folder with an index is a whole one.
        PipelineParts::write(folder, &config, &scheduler.config, parts)
    }
}

/// What is known of a folder that another program wrote: classes, if any, without a null class.
fn foreign_card(network: &ModelConfig) -> Card {
    // Published networks that are told their guidance learned it in 3..=15 (Luo et al. 2023, arXiv:2310.04378) or 6..=16
    // (diffusers' training script); the middle of this is the default of diffusers' pipeline.
    let guidance_range = network.time_cond_proj_dim().map(|_| [1.0, 16.0]);
    Card { image_shape: image_shape(network), guidance_range, ..Card::default() }
}

/// The settings of a network with the size of samples that its card says, by which diffusers and `ddil sample` choose the
/// size of a picture: a U-Net for latents may have been trained at another than that it was made for.
fn sized(config: ModelConfig, card: &Card) -> Result<ModelConfig> {
    let [_, height, width] = card.image_shape;
    let sides = [height, width].map(|side| u32::try_from(side).unwrap_or(0));
    if sides.contains(&0) || config.sample_size() == Some(sides) {
        return Ok(config);
    }
    Ok(config.with_sample_size(sides)?)
}

/// Channels, height and width by the network's own settings; 0 where they do not say.
fn image_shape(config: &ModelConfig) -> [i64; 3] {
    let [channels, _] = config.channels().unwrap_or_default();
    let [height, width] = config.sample_size().unwrap_or_default();
    [channels, height, width].map(i64::from)
}
