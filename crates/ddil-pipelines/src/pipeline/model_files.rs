//! The parts of a model folder, each checked, and written anew elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::{Invalid, temporary_sibling, with_causes, write_atomic};
use ddil_models::{
    AdditionEmbedType, AutoencoderKLConfig, ClipTextConfig, ClipTokenizer, Error as ModelsError,
    ModelConfig, UnknownKeys,
    weights::{self, WeightFiles},
};
use ddil_schedulers::{BetaSchedule, CommonConfig, SchedulerConfig};
use serde::Serialize;
use tch::{Kind, Tensor};

use super::index::{self, Index, PipelineClass};
use super::{Pipeline, SCHEDULER, UNET, card};
use crate::error::{Error, Result};

/// How weights are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightForm {
    /// What floating-point values are cast to; none leaves them as they are.
    pub kind: Option<Kind>,
    /// The variant that stands in the names of files, such as `fp16`.
    pub variant: Option<String>,
    /// What one file holds at most, as a number of bytes of values.
    pub max_shard_bytes: u64,
}

impl Default for WeightForm {
    /// The kinds of the source, no variant, and diffusers' 10 GB a file.
    fn default() -> Self {
        Self { kind: None, variant: None, max_shard_bytes: 10_000_000_000 }
    }
}

/// What a part of a model is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PartSummary {
    /// Its folder.
    pub name: String,
    /// Its class, as the index has it.
    pub class: String,
    /// How many values it has; none for a part without weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<u64>,
    /// The kinds of its values, as libtorch calls them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<String>,
    /// The variant of its files, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// The parts of a model, wherever they lie.
#[derive(Clone, Debug)]
pub struct Parts {
    index: Index,
    /// The folder of every part that there is.
    folders: BTreeMap<String, PathBuf>,
    scheduler: Schedule,
    card: Option<PathBuf>,
    variant: Option<String>,
}

/// Where the scheduler comes from.
#[derive(Clone, Debug)]
enum Schedule {
    File(PathBuf),
    /// That of Stable Diffusion, for a network that came without one.
    StableDiffusion,
}

/// Which files a part has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Network,
    Autoencoder,
    TextEncoder,
    Tokenizer,
    Scheduler,
    /// Something this program makes no use of, such as a safety checker.
    Other,
}

impl Role {
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

impl Parts {
    /// Those of a pipeline's folder, or of the export of a run.
    ///
    /// Weights of the given variant are taken; without one the plain files, and where a part has no others those of the
    /// only variant it has.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`]; [`Error::Invalid`] for a pipeline that this program does not know.
    pub fn of_pipeline(path: &Path, variant: Option<&str>) -> Result<Self> {
        let folder = Pipeline::find(path)?;
        let index = Index::read(&folder)?;
        let there = index.parts.iter().filter(|(_, class)| class.is_some());
        let folders = there.map(|(name, _)| (name.clone(), folder.join(name))).collect();
        let card = Some(folder.join(card::FILE_NAME)).filter(|card| card.is_file());
        let scheduler = Schedule::File(folder.join(SCHEDULER));
        Ok(Self { index, folders, scheduler, card, variant: variant.map(str::to_owned) })
    }

    /// A network's folder alone: with the other parts of a pipeline if one is given, and with the scheduler in a file, a
    /// folder or a pipeline; the default is that of Stable Diffusion for a network that is told a text.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`], [`Error::Invalid`] for a network of pixels without a scheduler; what the network's
    /// settings refuse.
    pub fn of_network(
        path: &Path,
        others: Option<&Path>,
        scheduler: Option<&Path>,
        variant: Option<&str>,
    ) -> Result<Self> {
        let folder = Self::network_at(path)
            .ok_or_else(|| Error::NotAModel { path: path.to_owned(), missing: "config.json" })?;
        let config = ModelConfig::from_file(folder.join("config.json"), UnknownKeys::Refuse)?;
        let mut parts = match others {
            Some(others) => Self::of_pipeline(others, variant)?,
            None => Self::alone(&config, variant),
        };
        let told = config.time_cond_proj_dim().is_some();
        told.then(|| parts.index.tell_guidance());
        parts.folders.insert(UNET.to_owned(), folder);
        // What was known of the other network does not hold for this one.
        parts.card = None;
        match scheduler {
            Some(path) => parts.scheduler = Schedule::File(scheduler_at(path)?),
            None if others.is_none() && !parts.index.class.is_text_to_image() => {
                return Err(Error::Invalid(Invalid::new(
                    "scheduler",
                    "not given",
                    "a scheduler_config.json: a network of pixels has no usual one",
                )));
            }
            None => {}
        }
        Ok(parts)
    }

    /// Whether `path` is the folder of a network, or has one for its `unet`.
    pub fn is_network_at(path: &Path) -> bool {
        Self::network_at(path).is_some()
    }

    fn network_at(path: &Path) -> Option<PathBuf> {
        let mut folders = [path.to_owned(), path.join(UNET)].into_iter();
        folders.find(|folder| folder.join("config.json").is_file())
    }

    /// A pipeline of a network and a scheduler, of the class that the network's settings speak of.
    fn alone(config: &ModelConfig, variant: Option<&str>) -> Self {
        let class = match config {
            ModelConfig::UNet2DCondition(unet) => match unet.addition_embed_type {
                Some(AdditionEmbedType::TextTime) => PipelineClass::StableDiffusionXl,
                _ => PipelineClass::StableDiffusion,
            },
            _ => PipelineClass::Ddim,
        };
        let index = Index::of_pixels(class, config.class_name(), "DDIMScheduler");
        Self {
            index,
            folders: BTreeMap::new(),
            scheduler: Schedule::StableDiffusion,
            card: None,
            variant: variant.map(str::to_owned),
        }
    }

    /// The class of the pipeline.
    pub fn class(&self) -> PipelineClass {
        self.index.class
    }

    /// Whether the scheduler is no file's but the usual one of Stable Diffusion.
    pub fn has_usual_scheduler(&self) -> bool {
        matches!(self.scheduler, Schedule::StableDiffusion)
    }

    /// The settings of the network.
    ///
    /// # Errors
    ///
    /// [`Error::Models`] for what no network has.
    pub fn network(&self) -> Result<ModelConfig> {
        let file = self.folder(UNET).join("config.json");
        Ok(ModelConfig::from_file(file, UnknownKeys::Refuse)?)
    }

    /// The scheduler, and the class of another solver whose place it takes.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] for what no scheduler has.
    pub fn scheduler(&self) -> Result<(SchedulerConfig, Option<String>)> {
        match &self.scheduler {
            Schedule::File(path) => Ok(SchedulerConfig::read_any(path)?),
            Schedule::StableDiffusion => Ok((usual_scheduler(), None)),
        }
    }

    /// What the parts are, by the headers of their files; no values are read.
    ///
    /// # Errors
    ///
    /// [`Error::Parts`] with all that cannot be read.
    pub fn summaries(&self) -> Result<Vec<PartSummary>> {
        self.each(|name, class| self.summary(name, class))
    }

    /// Checks every part: settings, names, shapes and kinds of all tensors, vocabularies, schedule. Values are not read.
    ///
    /// # Errors
    ///
    /// [`Error::Parts`] with all that is wrong with any of them.
    pub fn check(&self) -> Result<Vec<PartSummary>> {
        self.each(|name, class| {
            self.check_part(name)?;
            self.summary(name, class)
        })
    }

    /// Checks every part and writes them to a new folder, which is whole once it is there.
    ///
    /// Tensors are cast and written one by one from where they lie in their files: no memory is needed for more than one of
    /// them. Of other files, settings and vocabularies are copied, and nothing else.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check); [`Error::FolderNotEmpty`] unless `replace` allows that a model be replaced, and
    /// [`Error::NotAModel`] if something else is there.
    pub fn write(
        &self,
        folder: &Path,
        form: &WeightForm,
        replace: bool,
    ) -> Result<Vec<PartSummary>> {
        self.ensure_place(folder, replace)?;
        let summaries = self.check()?;
        let aside = temporary_sibling(folder);
        let written = self.write_all(&aside, form).and_then(|()| put(&aside, folder));
        if written.is_err() {
            // The first error is the one to tell.
            let _ = fs::remove_dir_all(&aside);
        }
        written.map(|()| summaries)
    }

    /// Writes the network's tensors to one safetensors file.
    ///
    /// # Errors
    ///
    /// What the network's folder or the file system refuse.
    pub fn write_network(&self, path: &Path, kind: Option<Kind>) -> Result<()> {
        self.check_part(UNET)?;
        let (file, _) = self.weights(UNET)?;
        let tensors: Vec<_> = weights::read_all(file)?.into_iter().collect();
        Ok(weights::save_as(&tensors, path, &BTreeMap::new(), kind)?)
    }

    fn folder<'a>(&'a self, name: &'a str) -> &'a Path {
        self.folders.get(name).map_or(Path::new(name), PathBuf::as_path)
    }

    /// Asks about every part, and lists all that went wrong.
    fn each<T>(&self, ask: impl Fn(&str, &str) -> Result<T>) -> Result<Vec<T>> {
        let (mut answers, mut problems) = (Vec::new(), Vec::new());
        for (name, class) in &self.index.parts {
            let Some([_, class]) = class else { continue };
            match ask(name, class) {
                Ok(answer) => answers.push(answer),
                Err(error) => problems.push(format!("{name}: {}", advice(&error))),
            }
        }
        if problems.is_empty() {
            return Ok(answers);
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
        if matches!(Role::of(name), Role::Tokenizer | Role::Scheduler) {
            return Ok(summary);
        }
        let (file, variant) = match self.weights(name) {
            Err(_) if Role::of(name) == Role::Other => return Ok(summary),
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
        match Role::of(name) {
            Role::Network => {
                let config = self.network()?;
                let without_values = config.without_values()?;
                let (file, _) = self.weights(name)?;
                Ok(weights::ensure_fits(&without_values.parameters().named(), file)?)
            }
            Role::Autoencoder | Role::TextEncoder => self.read(name).map(drop),
            Role::Tokenizer => Ok(ClipTokenizer::from_folder(folder).map(drop)?),
            Role::Scheduler => Ok(self.scheduler()?.0.schedule().map(drop)?),
            Role::Other => Ok(()),
        }
    }

    /// The tensors of a part where they lie in its files, under the names that they are to have; those of encoders and
    /// autoencoder checked against their settings.
    fn read(&self, name: &str) -> Result<Vec<(String, Tensor)>> {
        let config = self.folder(name).join("config.json");
        let (file, _) = self.weights(name)?;
        Ok(match Role::of(name) {
            Role::Autoencoder => {
                AutoencoderKLConfig::from_file(config, UnknownKeys::Refuse)?.read_weights(file)?
            }
            Role::TextEncoder => {
                ClipTextConfig::from_file(config, UnknownKeys::Refuse)?.read_weights(file)?
            }
            _ => weights::read_all(&file)?.into_iter().collect(),
        })
    }

    /// The file or index of a part's weights, and its variant.
    fn weights(&self, name: &str) -> Result<(PathBuf, Option<String>)> {
        let folder = self.folder(name);
        let of = |variant| WeightFiles { stem: Role::of(name).stem(), variant }.find(folder);
        if let Some(variant) = &self.variant {
            return Ok((of(Some(variant))?, Some(variant.clone())));
        }
        match of(None) {
            Err(ModelsError::NoWeights { others, path, expected }) => {
                let mut variants: Vec<_> = others.iter().filter_map(|(_, v)| v.clone()).collect();
                variants.dedup();
                match variants.as_slice() {
                    [only] => Ok((of(Some(only))?, Some(only.clone()))),
                    _ => Err(ModelsError::NoWeights { others, path, expected }.into()),
                }
            }
            found => Ok((found?, None)),
        }
    }

    fn ensure_place(&self, folder: &Path, replace: bool) -> Result<()> {
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
        let same = |other: &PathBuf| match (fs::canonicalize(other), fs::canonicalize(folder)) {
            (Ok(other), Ok(folder)) => other.starts_with(folder),
            _ => false,
        };
        if self.folders.values().any(same) {
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
            match Role::of(name) {
                Role::Scheduler => self.write_scheduler(folder)?,
                Role::Tokenizer => copy_settings(self.folder(name), &to)?,
                Role::Other if self.weights(name).is_err() => {
                    copy_settings(self.folder(name), &to)?;
                }
                role => {
                    copy_settings(self.folder(name), &to)?;
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
        // Last: a folder with an index is a whole one.
        self.index.write(folder)
    }

    fn write_scheduler(&self, folder: &Path) -> Result<()> {
        match &self.scheduler {
            Schedule::File(path) => copy(path, &folder.join(SCHEDULER)),
            Schedule::StableDiffusion => Ok(usual_scheduler().write(folder.join(SCHEDULER))?),
        }
    }
}

/// The scheduler of Stable Diffusion 1 and XL (section B of
/// [Rombach et al. 2022](https://arxiv.org/abs/2112.10752), in the words of its published file).
fn usual_scheduler() -> SchedulerConfig {
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

/// `scheduler_config.json` at a path: itself, in a folder, or in the pipeline there.
fn scheduler_at(path: &Path) -> Result<PathBuf> {
    let places = [path.to_owned(), path.join("scheduler_config.json"), path.join(SCHEDULER)];
    places.into_iter().find(|place| place.is_file()).ok_or_else(|| {
        Error::Invalid(Invalid::new(
            "scheduler",
            path.display(),
            "a scheduler_config.json, or a folder or pipeline that has one",
        ))
    })
}

/// What went wrong, and for a pickle what to do.
fn advice(error: &Error) -> String {
    match error {
        Error::Models(ModelsError::Pickle { path }) => format!(
            "{} is a pickle, which can run code when it is read; convert the model once with diffusers, \
             `pipeline.save_pretrained(folder, safe_serialization=True)`, and import that folder",
            path.display()
        ),
        error => with_causes(error),
    }
}

/// Copies settings and vocabularies: small files of text, and no lists of weights.
fn copy_settings(from: &Path, to: &Path) -> Result<()> {
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

/// Puts a whole folder in its place, where nothing or an older model is.
fn put(aside: &Path, folder: &Path) -> Result<()> {
    let mut old = temporary_sibling(folder).into_os_string();
    old.push("-old");
    let old = PathBuf::from(old);
    if folder.exists() {
        fs::rename(folder, &old).map_err(Error::io("rename", folder))?;
    }
    fs::rename(aside, folder).map_err(Error::io("rename", aside))?;
    match fs::remove_dir_all(&old) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", &old)(error))
        }
        _ => Ok(()),
    }
}
