//! A model folder as diffusers reads and writes it, with a card for what diffusers has no place for.

mod adapter;
mod card;
mod frame;
mod index;
mod scheduler;
mod text_to_image;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_models::{Model, ModelConfig, Placement, UnknownKeys, weights};
use ddil_schedulers::{SchedulerConfig, Thresholding};

pub use self::card::{AdapterCard, Card};
pub use self::frame::Frame;
pub use self::index::PipelineClass;
pub use self::scheduler::Scheduler;
pub use self::text_to_image::{EncodedPrompts, TextToImage};
use crate::config::Precision;
use crate::error::{Error, Result};
use crate::files::{read_json, write_json};
use crate::network::Network;
use crate::sampler::SamplerKind;

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
    /// The folder, and what stands in it around the network.
    pub frame: Frame,
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
        let folder = Self::find(path)?;
        if !folder.join(index::FILE_NAME).is_file() {
            return Self::read_adapter(&folder, placement, precision);
        }
        let scheduler = Self::read_scheduler(&folder)?;
        let (unet, frame) = Self::read_base(&folder, placement)?;
        Self::assemble(&folder, &scheduler, unet, frame, precision)
    }

    fn read_scheduler(path: &Path) -> Result<SchedulerConfig> {
        let (scheduler, solver) = SchedulerConfig::read_any(path.join(SCHEDULER))?;
        if let Some(solver) = solver {
            tracing::info!("{}: DDIM takes the place of {solver}", path.display());
        }
        Ok(scheduler)
    }

    /// The network of a whole model, frozen, and what stands around it.
    fn read_base(path: &Path, placement: Placement) -> Result<(Model, Frame)> {
        let frame = Frame::read(path)?;
        let config_file = path.join(UNET).join("config.json");
        let config = ModelConfig::from_file(&config_file, UnknownKeys::Refuse)?;
        if config.channels().is_none() {
            return Err(Error::InvalidConfig {
                field: format!("_class_name in {}", config_file.display()),
                value: config.class_name().to_owned(),
                expected: "UNet2DModel or UNet2DConditionModel".to_owned(),
            });
        }
        let unet = Model::from_folder(path.join(UNET), placement, UnknownKeys::Refuse)?;
        unet.parameters().set_trainable(false);
        Ok((unet, frame))
    }

    /// Puts a network together with the scheduler and the card of a folder.
    fn assemble(
        path: &Path,
        scheduler: &SchedulerConfig,
        unet: Model,
        frame: Frame,
        precision: Precision,
    ) -> Result<Self> {
        let schedule = scheduler.schedule()?;
        let network = Network::new(unet, scheduler.prediction_type(), schedule, precision);
        let card: Card = match path.join(card::FILE_NAME) {
            card if card.is_file() => read_json(&card)?,
            // A folder that diffusers wrote: classes, if any, without a null class.
            _ => Card { image_shape: image_shape(&network.config()), ..Card::default() },
        };
        let thresholding = card.thresholding.clone().unwrap_or_else(|| scheduler.thresholding());
        let timesteps = scheduler.common().ddil_timesteps.clone();
        let sampler = match (scheduler, scheduler.boundary()) {
            (SchedulerConfig::Lcm(lcm), Some(boundary)) => {
                SamplerKind::Lcm { original_steps: lcm.original_inference_steps, boundary }
            }
            _ => SamplerKind::Ddim { eta: 0.0 },
        };
        Ok(Self { network, sampler, thresholding, timesteps, card, frame })
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

    /// Writes a model folder that diffusers' pipelines and [`read`](Self::read) read.
    ///
    /// Without a frame it is a U-Net and a scheduler: `DDIMPipeline` for DDIM, `DDPMPipeline`, which takes any scheduler,
    /// for LCM. With that of a text-to-image model, what stands around its network is copied.
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
        frame: Option<&Frame>,
    ) -> Result<()> {
        for sub in [folder.join(UNET), folder.join("scheduler")] {
            fs::create_dir_all(&sub).map_err(Error::io("create", &sub))?;
        }
        weights::save(&network.weights()?, folder.join(WEIGHTS), &BTreeMap::new())?;
        let config = folder.join(UNET).join("config.json");
        crate::files::write_atomic(&config, network.config().to_json().as_bytes())?;
        scheduler.config.write(folder.join(SCHEDULER))?;
        let thresholding = scheduler.unspoken.clone();
        write_json(&folder.join(card::FILE_NAME), &Card { thresholding, ..card.clone() })?;
        // Last: a folder with an index is a whole one.
        Frame::write(folder, &network.config(), &scheduler.config, frame)
    }
}

/// Channels, height and width by the network's own settings; 0 where they do not say.
fn image_shape(config: &ModelConfig) -> [i64; 3] {
    let [channels, _] = config.channels().unwrap_or_default();
    let [height, width] = config.sample_size().unwrap_or_default();
    [channels, height, width].map(i64::from)
}
