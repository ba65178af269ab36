//! Folders with an adapter instead of a complete model, readable by diffusers' `load_lora_weights`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::{Invalid, write_atomic, write_json};
use ddil_models::{Lora, LoraFormat, Model, ModelConfig, NetworkDenoiser, Precision};

use super::{AdapterCard, Card, Pipeline, PipelineParts, SCHEDULER, Scheduler, card, index};
use crate::error::{Error, Result};

/// The file name in diffusers.
const WEIGHTS: &str = "pytorch_lora_weights.safetensors";
const MODEL_CARD: &str = "README.md";

/// Whether a folder contains an adapter with its card.
pub(super) fn is_in(folder: &Path) -> bool {
    [WEIGHTS, card::FILE_NAME].iter().all(|file| folder.join(file).is_file())
}

impl Pipeline {
    /// Writes a folder with an adapter: `pytorch_lora_weights.safetensors` with diffusers' tensor names and with ranks
    /// and alphas in its metadata; `scheduler/`; `README.md` with instructions; and the card, which names the base for
    /// [`open`](Self::open).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a network without an adapter; [`Error::Files`] if a file cannot be written.
    pub fn write_adapter(
        folder: &Path,
        network: &NetworkDenoiser,
        scheduler: &Scheduler,
        card: Card,
        base: &PipelineParts,
    ) -> Result<()> {
        let Some(lora) = network.adapter() else {
            return Err(Error::Invalid(Invalid::new(
                "network",
                "without an adapter",
                "with an adapter",
            )));
        };
        let scheduler_folder = folder.join("scheduler");
        fs::create_dir_all(&scheduler_folder).map_err(Error::io("create", &scheduler_folder))?;
        lora.save(folder.join(WEIGHTS), LoraFormat::Diffusers)?;
        scheduler.config.write(folder.join(SCHEDULER))?;
        let is_text_to_image = base.class().is_text_to_image();
        let base = fs::canonicalize(base.path()).map_err(Error::io("find", base.path()))?;
        let layer = lora.layers().into_iter().next();
        let (rank, alpha) = layer.map_or((0, 0.0), |layer| (layer.rank, layer.alpha));
        let thresholding = scheduler.card_thresholding.clone();
        let adapter = Some(AdapterCard { base, rank, alpha });
        let card = Card { thresholding, adapter, ..card };
        let text = model_card(&card, scheduler, is_text_to_image);
        write_atomic(&folder.join(MODEL_CARD), text.as_bytes())?;
        // Written last: a folder with a card is complete.
        Ok(write_json(&folder.join(card::FILE_NAME), &card)?)
    }

    /// Reads the base of an adapter and merges the adapter into its weights.
    pub(super) fn read_adapter(
        folder: &Path,
        network: impl FnOnce(&Path, &ModelConfig) -> Result<Model>,
        precision: Precision,
    ) -> Result<Self> {
        let base = Self::base_of(folder)?;
        let scheduler = Self::read_scheduler(folder)?;
        let (unet, parts) = Self::read_base(&base, network)?;
        Lora::from_file(unet.parameters(), folder.join(WEIGHTS))?.fuse()?;
        Self::assemble(folder, scheduler, unet, parts, precision)
    }

    /// The adapter file and the folder of its base model; `None` if `path` does not contain an adapter.
    ///
    /// `path` is a model folder or a run folder with an export.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] for a card that cannot be read, [`Error::Invalid`] if it does not name a base.
    pub fn adapter_at(path: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
        let Ok(folder) = Self::find(path) else { return Ok(None) };
        if folder.join(index::FILE_NAME).is_file() {
            return Ok(None);
        }
        Ok(Some((folder.join(WEIGHTS), Self::base_of(&folder)?)))
    }

    /// The folder of the complete model: the folder itself, or the base of its adapter.
    pub(super) fn base_of(folder: &Path) -> Result<PathBuf> {
        if folder.join(index::FILE_NAME).is_file() {
            return Ok(folder.to_owned());
        }
        let path = folder.join(card::FILE_NAME);
        let card = Card::from_file(&path)?;
        let Some(AdapterCard { base, .. }) = card.adapter else {
            return Err(Error::Invalid(Invalid::new(
                format!("adapter in {}", path.display()),
                "not set",
                format!("the base model of {WEIGHTS}"),
            )));
        };
        // Complete models only: adapters of adapters could form a cycle.
        if !base.join(index::FILE_NAME).is_file() {
            return Err(Error::Invalid(Invalid::new(
                format!("adapter.base in {}", path.display()),
                base.display(),
                "the folder of the complete model that the adapter was trained on",
            )));
        }
        Ok(base)
    }
}

/// The model card of an adapter, for users and model hubs.
fn model_card(card: &Card, scheduler: &Scheduler, is_text_to_image: bool) -> String {
    let Some(AdapterCard { base, rank, alpha }) = &card.adapter else { return String::new() };
    let base = base.file_name().unwrap_or_default().to_string_lossy();
    let (class, method) = (scheduler.config.class(), &card.method);
    let mut text = format!(
        "---\nbase_model: {base:?}\nlibrary_name: diffusers\ntags: [lora, {method}]\n---\n\n\
         # Adapter of `{base}` for a few steps\n\n\
         Distilled with `ddil` (method `{method}`, {} updates). Rank {rank}, alpha {alpha}.\n\n",
        card.updates
    );
    if let Some(scale) = card.guidance_scale {
        let _ = writeln!(text, "Guidance of scale {scale} is part of it: sample with none.\n");
    }
    if !is_text_to_image {
        text += "diffusers loads no adapters into pipelines of pixels: `ddil sample` does.\n";
        return text;
    }
    let steps = scheduler.config.common().ddil_timesteps.as_ref().map_or(4, Vec::len);
    let _ = write!(
        text,
        "```python\nfrom diffusers import DiffusionPipeline, {class}\n\n\
         pipe = DiffusionPipeline.from_pretrained({base:?})\n\
         pipe.load_lora_weights(\".\")  # this folder\n\
         pipe.scheduler = {class}.from_pretrained(\".\", subfolder=\"scheduler\")\n\
         pipe(\"a prompt\", num_inference_steps={steps}, guidance_scale=1.0)\n```\n"
    );
    text
}
