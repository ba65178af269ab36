//! Model folders in the layout of diffusers, with a card for information that diffusers has no file for.

mod adapter;
mod card;
mod index;
mod model_files;
mod pipeline_parts;
mod published;
mod scheduler;
mod text_to_image;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::{Invalid, write_json};
use ddil_models::{
    Model, ModelConfig, NetworkDenoiser, Placement, Precision, UnknownKeys,
    weights::{self, WeightFiles},
};
use ddil_schedulers::{SamplerConfig, SchedulerConfig, SolverConfig, Thresholding};

pub use self::card::{AdapterCard, Card};
use self::index::Index;
pub use self::index::PipelineClass;
pub use self::model_files::{ModelFiles, PartSummary, WeightForm};
pub use self::pipeline_parts::PipelineParts;
use self::published::PublishedScheduler;
pub use self::scheduler::Scheduler;
pub use self::text_to_image::{EncodedPrompts, TextToImageComponents};
use crate::error::{Error, Result};
use crate::notes::note_once;

/// A model read from its folder.
///
/// # Example
///
/// ```
/// use ddil_models::Placement;
/// use ddil_pipelines::{Pipeline, PipelineClass, Precision};
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher"));
/// assert_eq!(Pipeline::class_at(path)?, PipelineClass::Ddim);
/// let model = Pipeline::open(path, Placement::default(), Precision::Float32)?;
/// assert_eq!(model.card.image_shape, [1, 32, 32]);
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
#[derive(Debug)]
pub struct Pipeline {
    /// The network.
    pub network: NetworkDenoiser,
    /// The sampler.
    pub sampler: SamplerConfig,
    /// Thresholding of predicted clean data during sampling.
    pub thresholding: Thresholding,
    /// The timesteps that a student was trained at; `None` for a teacher.
    pub timesteps: Option<Vec<i64>>,
    /// The content of `scheduler_config.json`.
    pub scheduler: SchedulerConfig,
    /// The content of `ddil.json`.
    pub card: Card,
    /// The folder and its other parts, such as text encoders.
    pub parts: PipelineParts,
    /// The solver of `scheduler_config.json`, or what prevents its use: distillation does not need it.
    solver: PublishedSolver,
    /// The class of the solver that DDIM replaces.
    replaced: Option<&'static str>,
}

/// The scheduler of a folder.
struct FolderScheduler {
    config: SchedulerConfig,
    solver: PublishedSolver,
    replaced: Option<&'static str>,
}

/// The solver of a scheduler file, if its class is one of [`SolverConfig`]'s, or the setting that is not supported.
type PublishedSolver = std::result::Result<Option<SolverConfig>, Invalid>;

const UNET: &str = "unet";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

impl Pipeline {
    /// Reads a model folder, or the export of a run folder. The folder of an adapter is read as its base with the
    /// adapter merged into the weights.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`] if the folder contains no model; otherwise the error of its files: unknown keys,
    /// unsupported blocks, missing or unexpected weights, weights of the wrong shape.
    pub fn open(path: &Path, placement: Placement, precision: Precision) -> Result<Self> {
        Self::read_with(path, precision, |folder, _| {
            let (_, variant) = WeightFiles::DIFFUSION.find_any(folder)?;
            let (variant, keys) = (variant.as_deref(), UnknownKeys::IgnoreForeign);
            Ok(Model::from_folder_variant(folder, variant, placement, keys)?)
        })
    }

    /// As [`open`](Self::open), but without reading weights: the weights of the network are zeros that take no memory,
    /// and their files may be missing.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), except for weights.
    pub fn open_without_weights(path: &Path) -> Result<Self> {
        let folder = Self::find(path)?;
        let base = Self::base_of(&folder)?;
        let scheduler = Self::read_scheduler(&folder)?;
        let without_values = |_: &Path, config: &ModelConfig| Ok(config.without_values()?);
        let (unet, parts) = Self::read_base(&base, without_values)?;
        Self::assemble(&folder, scheduler, unet, parts, Precision::Float32)
    }

    /// Checks that the weight files of a model exist and match its network. Only headers are read.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn ensure_weights(path: &Path) -> Result<()> {
        let folder = Self::base_of(&Self::find(path)?)?.join(UNET);
        let config =
            ModelConfig::from_file(folder.join("config.json"), UnknownKeys::IgnoreForeign)?;
        let (file, _) = WeightFiles::DIFFUSION.find_any(&folder)?;
        Ok(config.read_weights(file).map(drop)?)
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

    /// The scheduler of a folder, and its solver or the setting of it that is not supported.
    fn read_scheduler(path: &Path) -> Result<FolderScheduler> {
        let index = path.join(index::FILE_NAME).is_file().then(|| Index::read(path)).transpose()?;
        let class = match &index {
            Some(index) => index.class,
            None => Self::class_at(path)?,
        };
        let named = index.as_ref().and_then(|index| index.class_of("scheduler"));
        let card = Card::in_folder(path)?;
        let published =
            PublishedScheduler::read(&path.join(SCHEDULER), Some(class), named, card.as_ref())?;
        let own = published.solver().map(Ok).or_else(|error| match error.invalid() {
            Some(invalid) => {
                let field = format!("{} in {}", invalid.field, path.join(SCHEDULER).display());
                Ok(Err(Invalid::new(field, &invalid.value, &invalid.expected)))
            }
            None => Err(Error::from(error)),
        })?;
        let replaced = published.replaced_solver();
        if let Some(solver) = replaced.filter(|_| matches!(own, Ok(None))) {
            note_once(&format!("{}: DDIM is used instead of {solver}", path.display()));
        }
        Ok(FolderScheduler { config: published.config()?, solver: own, replaced })
    }

    /// The frozen network of a complete model, and its other parts.
    fn read_base(
        path: &Path,
        network: impl FnOnce(&Path, &ModelConfig) -> Result<Model>,
    ) -> Result<(Model, PipelineParts)> {
        let parts = PipelineParts::read(path)?;
        let config_file = path.join(UNET).join("config.json");
        let config = published::network_config(&config_file, parts.class())?;
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

    /// Combines a network with the scheduler and the card of a folder.
    fn assemble(
        path: &Path,
        scheduler: FolderScheduler,
        unet: Model,
        parts: PipelineParts,
        precision: Precision,
    ) -> Result<Self> {
        let FolderScheduler { config: scheduler, solver, replaced } = scheduler;
        let schedule = scheduler.schedule()?;
        let network = NetworkDenoiser::new(unet, scheduler.prediction_type(), schedule)?
            .with_precision(precision);
        let card = if let Some(card) = Card::in_folder(path)? {
            card
        } else {
            let config = parts.path().join(UNET).join("config.json");
            card_without_file(&published::network_config(&config, parts.class())?)
        };
        let thresholding = card.thresholding.clone().unwrap_or_else(|| scheduler.thresholding());
        let timesteps = scheduler.common().ddil_timesteps.clone();
        let sampler = scheduler.sampler_config();
        Ok(Self {
            network,
            sampler,
            thresholding,
            timesteps,
            scheduler,
            card,
            parts,
            solver,
            replaced,
        })
    }

    /// The same model with other sampling settings: sampler, timesteps and thresholding, as if [`write`](Self::write) had
    /// written them into its folder.
    #[must_use]
    pub fn with_scheduler(self, scheduler: &Scheduler) -> Self {
        let Scheduler { config, card_thresholding } = scheduler.clone();
        let card = Card { thresholding: card_thresholding, ..self.card };
        Self {
            sampler: config.sampler_config(),
            thresholding: card.thresholding.clone().unwrap_or_else(|| config.thresholding()),
            timesteps: config.common().ddil_timesteps.clone(),
            // A scheduler of DDIM or LCM.
            solver: Ok(None),
            replaced: None,
            scheduler: config,
            card,
            ..self
        }
    }

    /// The multistep solver in the scheduler file, if its class is one of [`SolverConfig`]'s.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the key, its value and what is supported, for a setting that is not. The model can still be
    /// distilled, and sampled with DDIM.
    pub fn published_solver(&self) -> Result<Option<SolverConfig>> {
        Ok(self.solver.clone()?)
    }

    /// The class of the solver in the scheduler file, if DDIM replaces it wherever no [`SolverConfig`] is set.
    pub fn replaced_solver(&self) -> Option<&'static str> {
        self.replaced
    }

    /// The model folder at `path`: the folder itself or its `export`.
    fn find(path: &Path) -> Result<PathBuf> {
        [path.to_owned(), path.join("export")]
            .into_iter()
            .find(|folder| folder.join(index::FILE_NAME).is_file() || adapter::is_in(folder))
            .ok_or_else(|| Error::NotAModel { path: path.to_owned(), missing: index::FILE_NAME })
    }

    /// Whether `path` is a model folder or a run folder with an export; only the existence of files is checked.
    pub fn is_at(path: &Path) -> bool {
        Self::find(path).is_ok()
    }

    /// The class of the pipeline at `path`; only its index is read.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open) for the index.
    pub fn class_at(path: &Path) -> Result<PipelineClass> {
        Ok(PipelineParts::read(&Self::base_of(&Self::find(path)?)?)?.class())
    }

    /// The default guidance scale: that of diffusers' pipeline class for a text-to-image teacher, otherwise that of the
    /// card.
    pub fn default_guidance_scale(&self) -> f64 {
        let is_teacher = self.card.method.is_empty() || self.card.method == "teacher";
        match (self.parts.class(), self.sampler) {
            (PipelineClass::StableDiffusion, SamplerConfig::Ddim { .. }) if is_teacher => 7.5,
            (PipelineClass::StableDiffusionXl, SamplerConfig::Ddim { .. }) if is_teacher => 5.0,
            _ => self.card.default_guidance_scale(),
        }
    }

    /// Writes a model folder that diffusers' pipelines and [`open`](Self::open) can read.
    ///
    /// Without `parts`, the folder contains a U-Net and a scheduler: a `DDIMPipeline` for DDIM, a `DDPMPipeline`, which
    /// supports any scheduler, for LCM. With the `parts` of a text-to-image model, these are copied.
    ///
    /// `sample_size` in the network's config is set to the size in the card, the size it was trained at. An existing
    /// folder is overwritten file by file, each file atomically.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if a file cannot be written.
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
        let config = with_trained_size(network.config(), card)?;
        let config_file = folder.join(UNET).join("config.json");
        ddil_files::write_atomic(&config_file, config.to_json().as_bytes())?;
        scheduler.config.write(folder.join(SCHEDULER))?;
        let thresholding = scheduler.card_thresholding.clone();
        write_json(&folder.join(card::FILE_NAME), &Card { thresholding, ..card.clone() })?;
        // Written last: a folder with an index is complete.
        PipelineParts::write(folder, &config, &scheduler.config, parts)
    }
}

/// The card of a folder without one, which another program wrote. A null class is unknown.
fn card_without_file(network: &ModelConfig) -> Card {
    // Published networks with a guidance embedding were trained with scales in 3..=15 (Luo et al. 2023,
    // arXiv:2310.04378) or 6..=16 (diffusers' training script). The midpoint of 1..=16 is the default of diffusers'
    // pipeline.
    let guidance_range = network.time_cond_proj_dim().map(|_| [1.0, 16.0]);
    Card { image_shape: image_shape(network), guidance_range, ..Card::default() }
}

/// The config of a network with the sample size in the card, which is the default image size of diffusers and
/// `ddil sample`. A latent U-Net may have been trained at another size than its original config states.
fn with_trained_size(config: ModelConfig, card: &Card) -> Result<ModelConfig> {
    let [_, height, width] = card.image_shape;
    let sides = [height, width].map(|side| u32::try_from(side).unwrap_or(0));
    if sides.contains(&0) || config.sample_size() == Some(sides) {
        return Ok(config);
    }
    Ok(config.with_sample_size(sides)?)
}

/// Channels, height and width in the network's config; 0 if unspecified.
fn image_shape(config: &ModelConfig) -> [i64; 3] {
    let [channels, _] = config.channels().unwrap_or_default();
    let [height, width] = config.sample_size().unwrap_or_default();
    [channels, height, width].map(i64::from)
}
