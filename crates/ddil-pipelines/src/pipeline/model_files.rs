//! Checking and converting the files of a model.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::{Invalid, temporary_sibling, with_causes, write_atomic};
use ddil_models::{
    AdditionEmbedType, AutoencoderKLConfig, ClipTextConfig, ClipTokenizer, Error as ModelsError,
    ModelConfig, NetworkConfig, UnknownKeys,
    weights::{self, WeightFiles},
};
use ddil_schedulers::{BetaSchedule, CommonConfig, SchedulerConfig};
use serde::Serialize;
use tch::{Kind, Tensor};

use super::index::{self, Index, PipelineClass};
use super::published::{PublishedScheduler, network_config};
use super::{Card, Pipeline, SCHEDULER, UNET, card};
use crate::error::{Error, Result};

/// The file format of written weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightForm {
    /// The kind that floating-point values are converted to; `None` keeps their kind.
    pub kind: Option<Kind>,
    /// The variant in file names, such as `fp16`.
    pub variant: Option<String>,
    /// Maximum number of bytes of values per file.
    pub max_shard_bytes: u64,
}

impl Default for WeightForm {
    /// The kinds of the source, no variant, and 10 GB per file, as diffusers.
    fn default() -> Self {
        Self { kind: None, variant: None, max_shard_bytes: 10_000_000_000 }
    }
}

/// Summary of a part of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PartSummary {
    /// The name of its folder.
    pub name: String,
    /// Its class in the index.
    pub class: String,
    /// Number of parameters; `None` for a part without weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<u64>,
    /// The kinds of its values, with libtorch's names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<String>,
    /// The variant of its weight files, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// The files of a model's parts, in one or several folders, to be checked or converted.
///
/// # Example
///
/// ```
/// use ddil_pipelines::{ModelFiles, WeightForm};
/// use tch::Kind;
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher"));
/// # let folder = tempfile::tempdir()?;
/// let files = ModelFiles::of_pipeline(path, None)?;
/// let half = WeightForm { kind: Some(Kind::Half), ..WeightForm::default() };
/// let parts = files.write(&folder.path().join("half"), &half, false)?;
/// assert!(parts.iter().any(|part| part.class == "UNet2DModel"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ModelFiles {
    index: Index,
    /// Parts that the index lists and this program does not use, whose folders do not exist.
    absent: Vec<String>,
    /// The folder of every part that is present.
    folders: BTreeMap<String, PathBuf>,
    scheduler: SchedulerSource,
    card: Option<PathBuf>,
    variant: Option<String>,
}

/// The source of the scheduler.
#[derive(Clone, Debug)]
enum SchedulerSource {
    File(PathBuf),
    /// The scheduler of Stable Diffusion, for a network without one.
    StableDiffusion,
}

/// The kind of a part, which determines its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PartKind {
    Network,
    Autoencoder,
    TextEncoder,
    Tokenizer,
    Scheduler,
    /// A part that this program does not use, such as a safety checker.
    Other,
}

impl PartKind {
    fn of(name: &str) -> Self {
        match name {
            UNET => Self::Network,
            "vae" => Self::Autoencoder,
            "text_encoder" | "text_encoder_2" => Self::TextEncoder,
            "tokenizer" | "tokenizer_2" => Self::Tokenizer,
            "scheduler" => Self::Scheduler,
            _ => Self::Other,
        }
    }

    fn stem(self) -> &'static str {
        match self {
            Self::Network | Self::Autoencoder => WeightFiles::DIFFUSION.stem,
            _ => WeightFiles::TRANSFORMERS.stem,
        }
    }
}

impl ModelFiles {
    /// The files of a pipeline folder, or of the export of a run.
    ///
    /// With `variant`, weights of that variant are used. Without it, those without a variant, or of a part's only
    /// variant.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`]; [`Error::Invalid`] for an unsupported pipeline.
    pub fn of_pipeline(path: &Path, variant: Option<&str>) -> Result<Self> {
        let folder = Pipeline::find(path)?;
        let mut index = Index::read(&folder)?;
        let absent = pass_over_absent(&mut index, &folder);
        let present = index.parts.iter().filter(|(_, class)| class.is_some());
        let folders = present.map(|(name, _)| (name.clone(), folder.join(name))).collect();
        let card = Some(folder.join(card::FILE_NAME)).filter(|card| card.is_file());
        let scheduler = SchedulerSource::File(folder.join(SCHEDULER));
        let variant = variant.map(str::to_owned);
        let mut parts = Self { index, absent, folders, scheduler, card, variant };
        // As version 0.1 wrote students of DDIM with a guidance embedding; diffusers cannot call that.
        let is_lcm = parts.index.class == PipelineClass::LatentConsistency;
        if is_lcm && parts.scheduler_class().is_ok_and(|class| class != "LCMScheduler") {
            parts.index.class = PipelineClass::StableDiffusion;
        }
        Ok(parts)
    }

    /// The files of a network folder.
    ///
    /// `others` is a pipeline whose other parts are included. `scheduler` is a file, a folder or a pipeline; the
    /// default for a text-to-image network is the scheduler of Stable Diffusion.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`]; [`Error::Invalid`] for a pixel-space network without a scheduler; [`Error::Models`] for an
    /// invalid config of the network.
    pub fn of_network(
        path: &Path,
        others: Option<&Path>,
        scheduler: Option<&Path>,
        variant: Option<&str>,
    ) -> Result<Self> {
        let folder = Self::network_at(path)
            .ok_or_else(|| Error::NotAModel { path: path.to_owned(), missing: "config.json" })?;
        let config_file = folder.join("config.json");
        let config = ModelConfig::from_file(config_file, UnknownKeys::IgnoreForeign)?;
        let mut parts = match others {
            Some(others) => Self::of_pipeline(others, variant)?,
            None => Self::without_others(&config, variant),
        };
        parts.folders.insert(UNET.to_owned(), folder);
        // The card describes the network of the other pipeline.
        parts.card = None;
        match scheduler {
            Some(path) => parts.scheduler = SchedulerSource::File(scheduler_at(path)?),
            None if others.is_none() && !parts.index.class.is_text_to_image() => {
                return Err(Error::Invalid(Invalid::new(
                    "scheduler",
                    "not set",
                    "a scheduler_config.json: a pixel-space network has no default scheduler",
                )));
            }
            None => {}
        }
        let class = parts.scheduler_class().unwrap_or_else(|_| "DDIMScheduler".to_owned());
        parts.index.select_class(config.time_cond_proj_dim().is_some(), &class);
        let part = ["diffusers".to_owned(), class];
        parts.index.parts.insert("scheduler".to_owned(), Some(part));
        Ok(parts)
    }

    /// The class in the scheduler's file. A file that cannot be read is reported with the other parts.
    fn scheduler_class(&self) -> Result<String> {
        match &self.scheduler {
            SchedulerSource::File(path) => Ok(self.published_scheduler(path)?.class()),
            SchedulerSource::StableDiffusion => Ok(stable_diffusion_scheduler().class().to_owned()),
        }
    }

    /// Whether `path` is the folder of a network or contains one named `unet`.
    pub fn is_network_at(path: &Path) -> bool {
        Self::network_at(path).is_some()
    }

    fn network_at(path: &Path) -> Option<PathBuf> {
        let mut folders = [path.to_owned(), path.join(UNET)].into_iter();
        folders.find(|folder| folder.join("config.json").is_file())
    }

    /// A pipeline of a network and a scheduler, of the class that matches the network's config.
    fn without_others(config: &ModelConfig, variant: Option<&str>) -> Self {
        let class = match config {
            ModelConfig::UNet2DCondition(unet) => match unet.addition_embed_type {
                Some(AdditionEmbedType::TextTime) => PipelineClass::StableDiffusionXl,
                _ => PipelineClass::StableDiffusion,
            },
            _ => PipelineClass::Ddim,
        };
        let index = Index::of_unet(class, config.class_name(), "DDIMScheduler");
        Self {
            index,
            absent: Vec::new(),
            folders: BTreeMap::new(),
            scheduler: SchedulerSource::StableDiffusion,
            card: None,
            variant: variant.map(str::to_owned),
        }
    }

    /// Optional parts, such as a safety checker, that the pipeline's index lists but whose folders do not exist. They
    /// are passed over, and written as absent.
    pub fn absent_parts(&self) -> &[String] {
        &self.absent
    }

    /// The class of the pipeline.
    pub fn class(&self) -> PipelineClass {
        self.index.class
    }

    /// Whether the scheduler is not read from a file but is the default, that of Stable Diffusion.
    pub fn has_default_scheduler(&self) -> bool {
        matches!(self.scheduler, SchedulerSource::StableDiffusion)
    }

    /// The config of the network.
    ///
    /// # Errors
    ///
    /// [`Error::Models`] for an invalid config.
    pub fn network(&self) -> Result<ModelConfig> {
        network_config(&self.folder(UNET).join("config.json"), self.index.class)
    }

    /// The scheduler, and the class of the solver that it replaces, if any.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] for an invalid config.
    pub fn scheduler(&self) -> Result<(SchedulerConfig, Option<String>)> {
        match &self.scheduler {
            SchedulerSource::File(path) => {
                let published = self.published_scheduler(path)?;
                Ok((published.config()?, published.replaced_solver().map(str::to_owned)))
            }
            SchedulerSource::StableDiffusion => Ok((stable_diffusion_scheduler(), None)),
        }
    }

    fn published_scheduler(&self, path: &Path) -> Result<PublishedScheduler> {
        let card = self.card.as_deref().map(Card::from_file).transpose()?;
        let named = self.index.class_of("scheduler");
        PublishedScheduler::read(path, Some(self.index.class), named, card.as_ref())
    }

    /// A summary of each part. Only headers are read, no values.
    ///
    /// # Errors
    ///
    /// [`Error::Parts`] with every part that cannot be read.
    pub fn summaries(&self) -> Result<Vec<PartSummary>> {
        self.map_parts(|name, class| self.summary(name, class))
    }

    /// Checks every part: configs, names, shapes and kinds of all tensors, vocabularies, schedule. Values are not read.
    ///
    /// # Errors
    ///
    /// [`Error::Parts`] with the problems of all parts.
    pub fn check(&self) -> Result<Vec<PartSummary>> {
        self.map_parts(|name, class| {
            self.check_part(name)?;
            self.summary(name, class)
        })
    }

    /// Checks every part and writes all parts to a new folder, which appears only once it is complete.
    ///
    /// Tensors are converted and written one at a time from memory-mapped files, so memory is needed only for the
    /// largest one. Configs and vocabularies are copied; other files are not.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check); [`Error::FolderNotEmpty`] unless `replace` is set; [`Error::NotAModel`] if the folder
    /// to replace is not a model.
    pub fn write(
        &self,
        folder: &Path,
        form: &WeightForm,
        replace: bool,
    ) -> Result<Vec<PartSummary>> {
        self.ensure_writable(folder, replace)?;
        let summaries = self.check()?;
        let temporary = temporary_sibling(folder);
        let written =
            self.write_all(&temporary, form).and_then(|()| move_into_place(&temporary, folder));
        if written.is_err() {
            // Only the first error is reported.
            let _ = fs::remove_dir_all(&temporary);
        }
        written.map(|()| summaries)
    }

    /// Writes the network's tensors to one safetensors file.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check) for the network; [`Error::Models`] if the file cannot be written.
    pub fn write_network(&self, path: &Path, kind: Option<Kind>) -> Result<()> {
        let tensors = self.read(UNET)?;
        Ok(weights::save_as(&tensors, path, &BTreeMap::new(), kind)?)
    }

    fn folder<'a>(&'a self, name: &'a str) -> &'a Path {
        self.folders.get(name).map_or(Path::new(name), PathBuf::as_path)
    }

    /// Applies `f` to the name and class of every part, and collects all errors.
    fn map_parts<T>(&self, f: impl Fn(&str, &str) -> Result<T>) -> Result<Vec<T>> {
        let (mut results, mut problems) = (Vec::new(), Vec::new());
        for (name, class) in &self.index.parts {
            let Some([_, class]) = class else { continue };
            match f(name, class) {
                Ok(result) => results.push(result),
                Err(error) => problems.push(format!("{name}: {}", describe(&error))),
            }
        }
        if problems.is_empty() {
            return Ok(results);
        }
        Err(Error::Parts { path: self.folder(UNET).to_owned(), problems })
    }

    fn summary(&self, name: &str, class: &str) -> Result<PartSummary> {
        let class = class.to_owned();
        let summary = PartSummary {
            name: name.to_owned(),
            class,
            parameters: None,
            kinds: Vec::new(),
            variant: None,
        };
        if matches!(PartKind::of(name), PartKind::Tokenizer | PartKind::Scheduler) {
            return Ok(summary);
        }
        let (file, variant) = match self.weights(name) {
            Err(_) if PartKind::of(name) == PartKind::Other => return Ok(summary),
            found => found?,
        };
        let tensors = weights::read_all(file)?;
        let parameters = tensors.values().map(|tensor| tensor.numel() as u64).sum();
        let mut kinds: Vec<_> = tensors.values().map(|t| format!("{:?}", t.kind())).collect();
        kinds.sort();
        kinds.dedup();
        Ok(PartSummary { parameters: Some(parameters), kinds, variant, ..summary })
    }

    fn check_part(&self, name: &str) -> Result<()> {
        let folder = self.folder(name);
        match PartKind::of(name) {
            PartKind::Network | PartKind::Autoencoder | PartKind::TextEncoder => {
                self.read(name).map(drop)
            }
            PartKind::Tokenizer => Ok(ClipTokenizer::from_folder(folder).map(drop)?),
            PartKind::Scheduler => Ok(self.scheduler()?.0.schedule().map(drop)?),
            PartKind::Other => Ok(()),
        }
    }

    /// The memory-mapped tensors of a part, with the names to be written, checked against its config.
    fn read(&self, name: &str) -> Result<Vec<(String, Tensor)>> {
        let config = self.folder(name).join("config.json");
        let (file, _) = self.weights(name)?;
        Ok(match PartKind::of(name) {
            PartKind::Network => self.network()?.read_weights(file)?,
            PartKind::Autoencoder => {
                AutoencoderKLConfig::from_file(config, UnknownKeys::IgnoreForeign)?
                    .read_weights(file)?
            }
            PartKind::TextEncoder => {
                ClipTextConfig::from_file(config, UnknownKeys::Refuse)?.read_weights(file)?
            }
            _ => weights::read_all(&file)?.into_iter().collect(),
        })
    }

    /// The file or index of a part's weights, and its variant.
    fn weights(&self, name: &str) -> Result<(PathBuf, Option<String>)> {
        let variant = self.variant.as_deref();
        let files = WeightFiles { stem: PartKind::of(name).stem(), variant };
        Ok(files.find_any(self.folder(name))?)
    }

    fn ensure_writable(&self, folder: &Path, replace: bool) -> Result<()> {
        match fs::read_dir(folder).map(|mut entries| entries.next().is_none()) {
            Err(_) if !folder.exists() => return Ok(()),
            Ok(true) => return Ok(()),
            _ if !replace => return Err(Error::FolderNotEmpty { path: folder.to_owned() }),
            _ => {}
        }
        let missing = index::FILE_NAME;
        if !folder.join(missing).is_file() {
            return Err(Error::NotAModel { path: folder.to_owned(), missing });
        }
        let contains = |other: &PathBuf| match (fs::canonicalize(other), fs::canonicalize(folder)) {
            (Ok(other), Ok(folder)) => other.starts_with(folder),
            _ => false,
        };
        if self.folders.values().any(contains) {
            return Err(Error::Invalid(Invalid::new(
                "output",
                folder.display(),
                "another folder than the source",
            )));
        }
        Ok(())
    }

    fn write_all(&self, folder: &Path, form: &WeightForm) -> Result<()> {
        for (name, _) in self.index.parts.iter().filter(|(_, class)| class.is_some()) {
            let to = folder.join(name);
            fs::create_dir_all(&to).map_err(Error::io("create", &to))?;
            match PartKind::of(name) {
                PartKind::Scheduler => self.write_scheduler(folder)?,
                PartKind::Tokenizer => copy_configs(self.folder(name), &to)?,
                PartKind::Other if self.weights(name).is_err() => {
                    copy_configs(self.folder(name), &to)?;
                }
                role => {
                    copy_configs(self.folder(name), &to)?;
                    let tensors = self.read(name)?;
                    let variant = form.variant.as_deref();
                    let files = WeightFiles { stem: role.stem(), variant };
                    files.save_sharded_as(&tensors, &to, form.max_shard_bytes, form.kind)?;
                }
            }
        }
        let network = folder.join(UNET).join("config.json");
        write_atomic(&network, self.network()?.to_json().as_bytes())?;
        if let Some(card) = &self.card {
            copy(card, &folder.join(card::FILE_NAME))?;
        }
        // Written last: a folder with an index is complete.
        self.index.write(folder)
    }

    fn write_scheduler(&self, folder: &Path) -> Result<()> {
        match &self.scheduler {
            SchedulerSource::File(path) => match self.published_scheduler(path)?.corrected() {
                Some(text) => Ok(write_atomic(&folder.join(SCHEDULER), text.as_bytes())?),
                None => copy(path, &folder.join(SCHEDULER)),
            },
            SchedulerSource::StableDiffusion => {
                Ok(stable_diffusion_scheduler().write(folder.join(SCHEDULER))?)
            }
        }
    }
}

/// Marks parts of no use as absent if their folders do not exist, and returns their names.
fn pass_over_absent(index: &mut Index, folder: &Path) -> Vec<String> {
    let mut absent = Vec::new();
    for (name, class) in &mut index.parts {
        if PartKind::of(name) == PartKind::Other && class.is_some() && !folder.join(name).exists() {
            *class = None;
            absent.push(name.clone());
        }
    }
    absent
}

/// The scheduler of Stable Diffusion 1 and XL (section B of
/// [Rombach et al. 2022](https://arxiv.org/abs/2112.10752); values of the published `scheduler_config.json`).
fn stable_diffusion_scheduler() -> SchedulerConfig {
    SchedulerConfig::Ddim(CommonConfig {
        beta_start: 0.000_85,
        beta_end: 0.012,
        beta_schedule: BetaSchedule::ScaledLinear,
        clip_sample: false,
        set_alpha_to_one: false,
        steps_offset: 1,
        ..CommonConfig::default()
    })
}

/// The `scheduler_config.json` at a path: the file itself, in a folder, or in a pipeline.
fn scheduler_at(path: &Path) -> Result<PathBuf> {
    let places = [path.to_owned(), path.join("scheduler_config.json"), path.join(SCHEDULER)];
    places.into_iter().find(|place| place.is_file()).ok_or_else(|| {
        Error::Invalid(Invalid::new(
            "scheduler",
            path.display(),
            "a scheduler_config.json, or a folder or pipeline that contains one",
        ))
    })
}

/// The error with its causes; for a pickle, with instructions.
fn describe(error: &Error) -> String {
    match error {
        Error::Models(ModelsError::Pickle { path }) => format!(
            "{} is a pickle, and reading it can run code: convert the model once with diffusers, \
             `pipeline.save_pretrained(folder, safe_serialization=True)`, and import that folder",
            path.display()
        ),
        error => with_causes(error),
    }
}

/// Copies configs and vocabularies: text files, except indices of weights.
fn copy_configs(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
        let path = entry.map_err(Error::io("list", from))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let is_text = [".json", ".txt"].iter().any(|end| name.ends_with(end));
        let is_index = name.contains(".index.");
        if path.is_file() && is_text && !is_index {
            copy(&path, &to.join(name))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).map_err(Error::io("copy", from))
}

/// Renames a complete folder to its final name; replaces an existing model.
fn move_into_place(temporary: &Path, folder: &Path) -> Result<()> {
    let mut old = temporary_sibling(folder).into_os_string();
    old.push("-old");
    let old = PathBuf::from(old);
    if folder.exists() {
        fs::rename(folder, &old).map_err(Error::io("rename", folder))?;
    }
    fs::rename(temporary, folder).map_err(Error::io("rename", temporary))?;
    match fs::remove_dir_all(&old) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", &old)(error))
        }
        _ => Ok(()),
    }
}
