//! The config file of a run, table by table.
//!
//! Each field documents its default; `ddil init` writes the same texts as a commented file.

mod evaluate;
mod lora;
mod mixing;
mod prompts;

use std::path::PathBuf;

use ddil_data::SampleChoice;
use ddil_files::Invalid;
use ddil_losses::{ObjectiveConfig, TeacherGuidance};
pub use ddil_models::Precision;
use ddil_models::UNet2DConfig;
use ddil_schedulers::{NoiseScheduleConfig, PredictionType, Thresholding};
use serde::{Deserialize, Serialize};
use tch::Device;

pub use self::evaluate::EvaluateSection;
pub use self::lora::{LoraExport, LoraSection, LoraTargets};
pub use self::mixing::MixingSection;
pub use self::prompts::{PromptSource, PromptsSection};
use crate::checkpoint::Retention;
use crate::ema::EmaConfig;
use crate::error::{Error, Result};
use crate::lr_schedule::LrSchedule;
use crate::optimizer::AdamWConfig;

/// The common settings of a run: its name, its seed and its device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunSection {
    /// The run's folder is `<folder>/<name>`; default `run`.
    pub name: String,
    /// Folder that contains the run folders; default `runs`.
    pub folder: PathBuf,
    /// Seed of all random numbers of the run; default 0.
    pub seed: u64,
    /// `cpu`, `cuda` or `cuda:1`; default `cpu`.
    pub device: String,
    /// Precision of convolutions and matrix products; weights stay `float32`. Default `float32`.
    pub precision: Precision,
    /// Whether images are stored channels last, the faster layout for most convolutions; default true. On a CPU it
    /// speeds up group norms too.
    pub channels_last: bool,
    /// Activation checkpointing: whether the backward pass recomputes the intermediate results of the U-Net blocks
    /// instead of storing them. Saves memory for about one more forward pass of the trained networks; default false.
    pub activation_checkpointing: bool,
    /// Number of libtorch's threads; 0, the default, is one per core.
    pub threads: u32,
    /// Whether libtorch uses only deterministic operations and refuses others; default false. On the CPU all operations
    /// of this project are deterministic. On CUDA it costs time and requires `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the
    /// environment.
    pub deterministic: bool,
}

/// The data and the batch size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// Where the samples come from; default `fashion_mnist`.
    pub kind: DataKind,
    /// The folder, or the file of prompts; the default is the user's cache for Fashion-MNIST. Other kinds have no
    /// default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Height and width in pixels to which captioned images, folders of images and Fashion-MNIST are scaled: each covers the
    /// square, and its centre is cropped. For prompts alone, the size of the sampled images. Default: the teacher's size;
    /// images of a folder without captions are not scaled and must have one size, and Fashion-MNIST has 32x32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<u32>,
    /// Folder for encoded captions or prompts; default a folder in the user's cache. A cache of other data in it is
    /// replaced. Other kinds ignore it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// What the data's classes are for the teacher: the names of its classes, in the order of the data's; numbers if it
    /// has no names. Default: a class of the data is the teacher's class of the same name. For `ddil distill` only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// Names of classes of the data whose samples are left out; default none. For images with classes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_classes: Vec<String>,
    /// Number of samples that are used, of those that `exclude_classes` leaves; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<u32>,
    /// Which samples `max_samples` uses: `first` or `random`; default `random`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_samples_choice: Option<SampleChoice>,
    /// Seed of that random choice, which does not depend on `run.seed`; default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_samples_seed: Option<u64>,
    /// Samples per update; default 64.
    pub batch_size: u32,
    /// Whether samples are mirrored at random; default false. Must be false for text-to-image data, whose mirrored
    /// latents are not those of the mirrored image.
    pub horizontal_flip: bool,
}

/// A kind of dataset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataKind {
    /// The four IDX files of Fashion-MNIST, padded to 32x32, then scaled if there is a resolution.
    #[default]
    FashionMnist,
    /// A folder of PNG or JPEG files of one size; names of sub-folders are the classes.
    ImageFolder,
    /// A folder of PNG or JPEG files with captions, which the teacher's own encoders encode once.
    Captions,
    /// A folder of encoded latents and prompts in the format of `docs/TEXT_DATA.md`.
    Latents,
    /// A text file with one prompt per line and no images: for backward sources only.
    Prompts,
}

impl DataKind {
    /// The name used in config files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FashionMnist => "fashion_mnist",
            Self::ImageFolder => "image_folder",
            Self::Captions => "captions",
            Self::Latents => "latents",
            Self::Prompts => "prompts",
        }
    }

    /// Whether these data are for text-to-image teachers, and for no other.
    pub fn is_text(self) -> bool {
        !matches!(self, Self::FashionMnist | Self::ImageFolder)
    }
}

/// What a run writes, and how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OutputSection {
    /// Updates between two lines of metrics; default 10.
    pub log_interval: u64,
    /// Updates between two sample grids; 0 writes only the last. Default 1000. A distillation with a number above 0 also
    /// draws a grid of its teacher, once.
    pub sample_interval: u64,
    /// Updates between two checkpoints; default 500.
    pub checkpoint_interval: u64,
    /// Which checkpoints are kept; default the newest two.
    pub checkpoints: Retention,
    /// Samples of a grid per class or prompt, or in all if there are neither; default 8.
    pub samples_per_class: u32,
    /// Prompts of the grids of a text-to-image student; default the first of the data.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<String>,
}

/// The config of `ddil train`: a diffusion model from data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Name, seed and device.
    pub run: RunSection,
    /// Data.
    pub data: DataSection,
    /// The network; keys are those of diffusers' `UNet2DModel`.
    pub model: UNet2DConfig,
    /// The noise schedule.
    pub schedule: NoiseScheduleConfig,
    /// The training objective.
    pub train: TrainSection,
    /// The optimizer.
    pub optimizer: AdamWConfig,
    /// The learning rate, over the run or over each stage.
    pub learning_rate: LrSchedule,
    /// The moving average, which is exported.
    pub ema: EmaConfig,
    /// The evaluation of the moving average during the run; default none.
    #[serde(skip_serializing_if = "EvaluateSection::is_default")]
    pub evaluate: EvaluateSection,
    /// Logs, grids, checkpoints.
    pub output: OutputSection,
}

/// The objective of `ddil train`, its duration, and how its grids are sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// Updates in all; default 10000.
    pub updates: u64,
    /// What the network is trained to output; default `v_prediction`.
    pub prediction_type: PredictionType,
    /// Probability of replacing a label with the null class, which guidance requires; default 0.1.
    pub label_dropout: f64,
    /// DDIM steps of the sample grids; default 50.
    pub sample_steps: u32,
    /// Guidance of the sample grids; default 2. Ignored without a null class: without labels, or with a `label_dropout`
    /// of 0.
    pub sample_guidance_scale: f64,
}

/// The config of `ddil distill`: a few-step student from a teacher.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// Name, seed and device.
    pub run: RunSection,
    /// Data.
    pub data: DataSection,
    /// What backward trajectories are conditioned on.
    pub prompts: PromptsSection,
    /// The teacher.
    pub teacher: TeacherSection,
    /// The student.
    pub student: StudentSection,
    /// The method.
    pub objective: ObjectiveConfig,
    /// Thresholding of clean data.
    pub thresholding: Thresholding,
    /// Which clean data are thresholded.
    pub thresholding_places: ThresholdingPlaces,
    /// The sources of training states.
    pub mixing: MixingSection,
    /// The optimizer.
    pub optimizer: AdamWConfig,
    /// The learning rate, over the run or over each stage.
    pub learning_rate: LrSchedule,
    /// The critic, for a method that has one.
    pub critic: CriticSection,
    /// The moving average, which is exported.
    pub ema: EmaConfig,
    /// The evaluation of the moving average during the run; default none.
    #[serde(skip_serializing_if = "EvaluateSection::is_default")]
    pub evaluate: EvaluateSection,
    /// Logs, grids, checkpoints.
    pub output: OutputSection,
}

/// Which clean data are thresholded.
///
/// The critic's own loss is not included: the critic has to follow the student's samples even outside the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "one switch a place")]
pub struct ThresholdingPlaces {
    /// The teacher's, after guidance, in labels and in its rollouts; default true.
    pub teacher: bool,
    /// Those of the student's moving average when it computes the target; default true.
    pub target: bool,
    /// The critic's when it computes the student's gradient; default true.
    pub critic: bool,
    /// The student's in its rollouts; default true. Should equal `inference`.
    pub rollout: bool,
    /// The student's when it samples; default true.
    pub inference: bool,
    /// The student's inside its loss; default false: outside the range the gradient would be zero.
    pub student_loss: bool,
}

/// How a critic is trained; a table that is left out is the student's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CriticSection {
    /// Its optimizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<AdamWConfig>,
    /// Its learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<LrSchedule>,
}

/// The teacher and its guidance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TeacherSection {
    /// A model folder in diffusers' format.
    pub path: PathBuf,
    /// Source of its guidance; default `baked_in`, which is none for a plain teacher.
    pub guidance: TeacherGuidance,
}

/// The student: it starts from the teacher's weights and takes fewer steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StudentSection {
    /// Its numbers of steps, stage by stage; the student of a stage is the teacher of the next. Default `[4]`.
    pub stages: Vec<u32>,
    /// Updates of each stage; default 2000.
    pub updates_per_stage: u64,
    /// Width of the student's embedding of the guidance weight, if that is drawn per sample; default 256, as in
    /// diffusers. Ignored otherwise.
    pub time_cond_proj_dim: u32,
    /// A smaller network with fewer channels, layers or blocks than the teacher's, initialised from the teacher's
    /// weights that match; default the teacher's own network. Keys are those of diffusers' `UNet2DModel`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<UNet2DConfig>,
    /// A LoRA adapter instead of a whole network; default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSection>,
}

impl Default for RunSection {
    fn default() -> Self {
        Self {
            name: "run".to_owned(),
            folder: "runs".into(),
            seed: 0,
            device: "cpu".to_owned(),
            precision: Precision::Float32,
            channels_last: true,
            activation_checkpointing: false,
            threads: 0,
            deterministic: false,
        }
    }
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            kind: DataKind::FashionMnist,
            path: None,
            resolution: None,
            cache: None,
            classes: Vec::new(),
            exclude_classes: Vec::new(),
            max_samples: None,
            max_samples_choice: None,
            max_samples_seed: None,
            batch_size: 64,
            horizontal_flip: false,
        }
    }
}

impl Default for OutputSection {
    fn default() -> Self {
        Self {
            log_interval: 10,
            sample_interval: 1000,
            checkpoint_interval: 500,
            checkpoints: Retention::default(),
            samples_per_class: 8,
            prompts: Vec::new(),
        }
    }
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            updates: 10_000,
            prediction_type: PredictionType::VPrediction,
            label_dropout: 0.1,
            sample_steps: 50,
            sample_guidance_scale: 2.0,
        }
    }
}

impl Default for StudentSection {
    fn default() -> Self {
        Self {
            stages: vec![4],
            updates_per_stage: 2000,
            time_cond_proj_dim: 256,
            model: None,
            lora: None,
        }
    }
}

impl Default for ThresholdingPlaces {
    fn default() -> Self {
        Self {
            teacher: true,
            target: true,
            critic: true,
            rollout: true,
            inference: true,
            student_loss: false,
        }
    }
}

impl RunSection {
    /// The run's own folder.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// The device. If a requested GPU is not available, this is an error; the CPU is never used instead.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an invalid device name, and for a GPU that cannot be used, with the reason.
    pub fn device(&self) -> Result<Device> {
        parse_device(&self.device)
    }

    /// Checks what can be checked before the run starts.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the key.
    pub fn ensure(&self) -> Result<()> {
        let plain = !self.name.is_empty()
            && !self.name.starts_with('.')
            && !self.name.contains(['/', '\\', '\0']);
        ensure("run.name", &self.name, plain, "the name of a folder, without a path")?;
        let device = self.device()?;
        self.ensure_deterministic_on(
            device,
            std::env::var("CUBLAS_WORKSPACE_CONFIG").ok().as_deref(),
        )
    }

    /// cuBLAS reads its workspace sizes from the environment when it starts; without them it would fail in the middle
    /// of a run.
    fn ensure_deterministic_on(&self, device: Device, workspaces: Option<&str>) -> Result<()> {
        let fixed = matches!(workspaces, Some(":4096:8" | ":16:8"));
        let kept = !self.deterministic || device == Device::Cpu || fixed;
        let expected = "false, or CUBLAS_WORKSPACE_CONFIG=:4096:8 (or :16:8, which uses less memory) in the environment";
        ensure("run.deterministic", "true", kept, expected)
    }

    /// Enables libtorch's deterministic operations for the whole process if [`deterministic`](Self::deterministic) is
    /// set.
    ///
    /// # Errors
    ///
    /// Errors of libtorch.
    pub fn apply_determinism(&self) -> Result<()> {
        if self.deterministic {
            ddil_libtorch::deterministic(true)?;
        }
        Ok(())
    }
}

/// The device of that name, if it is usable.
///
/// # Errors
///
/// [`Error::Invalid`] for an invalid device name, and for a GPU that cannot be used, with the reason.
pub fn parse_device(name: &str) -> Result<Device> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        _ => name.strip_prefix("cuda:").and_then(|index| index.parse::<usize>().ok()),
    };
    let Some(index) = index else {
        ensure("run.device", name, false, "`cpu`, `cuda` or `cuda:<index>`")?;
        return Ok(Device::Cpu);
    };
    let found = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    if index >= found {
        let expected = match ddil_libtorch::why_no_cuda() {
            Some(reason) => format!("a usable device: {reason}"),
            None => format!("an index below {found}, the number of GPUs"),
        };
        ensure("run.device", name, false, &expected)?;
    }
    Ok(Device::Cuda(index))
}

impl OutputSection {
    fn ensure(&self) -> Result<()> {
        ensure("output.log_interval", self.log_interval, self.log_interval > 0, "at least 1")?;
        let interval = self.checkpoint_interval;
        ensure("output.checkpoint_interval", interval, interval > 0, "at least 1")
    }
}

impl DataSection {
    /// Height and width of images that are scaled to a square; none for those of their own size.
    pub fn size(&self) -> Option<[i64; 2]> {
        self.resolution.map(|side| [side.into(); 2])
    }

    fn ensure(&self) -> Result<()> {
        ensure("data.batch_size", self.batch_size, self.batch_size > 0, "at least 1")?;
        let has_path = self.kind == DataKind::FashionMnist || self.path.is_some();
        let expected = match self.kind {
            DataKind::Prompts => "a file of prompts",
            DataKind::Latents => "a folder of encoded data",
            _ => "a folder of images",
        };
        ensure("data.path", "not set", has_path, expected)?;
        let (kind, is_text) = (self.kind.as_str(), self.kind.is_text());
        let is_encoded = matches!(self.kind, DataKind::Captions | DataKind::Prompts);
        let flips = !(self.horizontal_flip && is_text);
        let expected = format!("false with data.kind = {kind:?}: latents cannot be mirrored");
        ensure("data.horizontal_flip", "true", flips, &expected)?;
        let expected = format!("no value with data.kind = {kind:?}, whose samples are not scaled");
        let is_scaled = self.kind != DataKind::Latents;
        let sized = self.resolution.is_none() || is_scaled;
        ensure("data.resolution", "set", sized, &expected)?;
        let expected = format!("no value with data.kind = {kind:?}, which encodes nothing");
        let cached = self.cache.is_none() || is_encoded;
        ensure("data.cache", "set", cached, &expected)?;
        let named = self.cache.as_ref().is_none_or(|path| path.file_name().is_some());
        ensure("data.cache", "a path without a folder name", named, "the path of a folder")?;
        self.ensure_part()
    }

    /// Checks the settings of a part of the samples.
    fn ensure_part(&self) -> Result<()> {
        let (kind, is_text) = (self.kind.as_str(), self.kind.is_text());
        let expected = format!("no value with data.kind = {kind:?}, which has no classes");
        for (key, names) in
            [("data.classes", &self.classes), ("data.exclude_classes", &self.exclude_classes)]
        {
            ensure(key, "set", names.is_empty() || !is_text, &expected)?;
        }
        ensure("data.max_samples", 0, self.max_samples != Some(0), "at least 1")?;
        let random = self.max_samples_choice != Some(SampleChoice::First);
        let limited = self.max_samples.is_some();
        let expected = "no value without data.max_samples, which it belongs to";
        let choice = limited || self.max_samples_choice.is_none();
        ensure("data.max_samples_choice", "set", choice, expected)?;
        let seed = self.max_samples_seed.is_none() || (limited && random);
        let expected = "no value without a random choice of data.max_samples";
        ensure("data.max_samples_seed", "set", seed, expected)
    }
}

impl TrainConfig {
    /// Checks every table before the run starts.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] or the table's own error, with the key.
    pub fn ensure(&self) -> Result<()> {
        self.run.ensure()?;
        self.data.ensure()?;
        let expected =
            "fashion_mnist or image_folder: only models without text can be trained from data";
        ensure("data.kind", self.data.kind.as_str(), !self.data.kind.is_text(), expected)?;
        let expected =
            "no value: only a teacher gives classes names; those of `ddil train` are the data's";
        ensure("data.classes", "set", self.data.classes.is_empty(), expected)?;
        let expected = "no value: only models without text can be trained from data";
        ensure("output.prompts", "set", self.output.prompts.is_empty(), expected)?;
        ensure_updates(&self.optimizer, &self.learning_rate, &self.ema)?;
        self.output.ensure()?;
        self.evaluate.ensure(&self.data, &self.output)?;
        let schedule = self.schedule.build()?;
        self.train.prediction_type.ensure_defined_on(&schedule)?;
        let TrainSection { updates, label_dropout, sample_steps, .. } = self.train;
        ensure("train.updates", updates, updates > 0, "at least 1")?;
        let dropout = (0.0..=1.0).contains(&label_dropout);
        ensure("train.label_dropout", label_dropout, dropout, "in 0..=1")?;
        let most = self.schedule.num_train_timesteps();
        let on_grid = (1..=most).contains(&sample_steps);
        ensure("train.sample_steps", sample_steps, on_grid, &format!("in 1..={most}"))?;
        let scale = self.train.sample_guidance_scale;
        let possible = scale.is_finite() && scale >= 0.0;
        ensure(
            "train.sample_guidance_scale",
            scale,
            possible,
            "finite and at least 0; 1 is no guidance",
        )
    }
}

impl DistillConfig {
    /// Checks every table that can be checked without the teacher, before the run starts.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] or the table's own error, with the key.
    pub fn ensure(&self) -> Result<()> {
        self.run.ensure()?;
        self.data.ensure()?;
        self.prompts.ensure(&self.data)?;
        ensure_updates(&self.optimizer, &self.learning_rate, &self.ema)?;
        self.output.ensure()?;
        self.evaluate.ensure(&self.data, &self.output)?;
        self.thresholding.ensure()?;
        self.teacher.guidance.ensure()?;
        let path = &self.teacher.path;
        ensure("teacher.path", "not set", !path.as_os_str().is_empty(), "the teacher's folder")?;
        self.mixing.ensure()?;
        ensure_critic(&self.critic)?;
        self.ensure_stages()?;
        self.ensure_lora()
    }

    /// An adapter is added to the teacher's own network, of which there is one copy.
    fn ensure_lora(&self) -> Result<()> {
        let StudentSection { lora: Some(lora), model, stages, .. } = &self.student else {
            return Ok(());
        };
        lora.ensure()?;
        let expected = "only one of them: an adapter is added to the teacher's own network";
        ensure("student.lora", "set together with student.model", model.is_none(), expected)?;
        let expected = "one number of steps with student.lora: the adapter of a later stage would only fit the base \
                        with the first adapter merged";
        ensure("student.stages", format!("{stages:?}"), stages.len() == 1, expected)
    }

    /// Total number of updates.
    pub fn total_updates(&self) -> u64 {
        self.student.updates_per_stage.saturating_mul(self.student.stages.len() as u64)
    }

    fn ensure_stages(&self) -> Result<()> {
        let StudentSection { stages, updates_per_stage, .. } = &self.student;
        let updates = *updates_per_stage;
        ensure("student.updates_per_stage", updates, updates > 0, "at least 1")?;
        let shown = format!("{stages:?}");
        let counted = !stages.is_empty() && stages.iter().all(|n| *n > 0);
        ensure("student.stages", &shown, counted, "at least one number of steps, each at least 1")?;
        let ObjectiveConfig::Progressive(progressive) = &self.objective else {
            let expected = "one number of steps: only progressive distillation has stages";
            return ensure("student.stages", &shown, stages.len() == 1, expected);
        };
        let substeps = progressive.substeps;
        let divide = stages.windows(2).all(|pair| pair[1].checked_mul(substeps) == Some(pair[0]));
        let expected = format!(
            "each to be the previous one divided by objective.substeps = {substeps}: a later stage's teacher is valid \
             only at the timesteps it was trained on"
        );
        ensure("student.stages", &shown, divide, &expected)
    }
}

/// Checks the settings of an update before a run folder is created.
fn ensure_updates(optimizer: &AdamWConfig, rate: &LrSchedule, ema: &EmaConfig) -> Result<()> {
    under("optimizer", optimizer.ensure_valid())?;
    under("learning_rate", rate.ensure_valid())?;
    under("ema", ema.ensure_valid())
}

/// The same for a critic, whose settings are optional.
fn ensure_critic(critic: &CriticSection) -> Result<()> {
    if let Some(optimizer) = &critic.optimizer {
        under("critic.optimizer", optimizer.ensure_valid())?;
    }
    match critic.learning_rate {
        Some(rate) => under("critic.learning_rate", rate.ensure_valid()),
        None => Ok(()),
    }
}

/// Prefixes the keys of an error with the table's name.
fn under(table: &str, result: Result<()>) -> Result<()> {
    result.map_err(|error| match error {
        Error::Invalid(invalid) => Error::Invalid(invalid.under(table)),
        error => error,
    })
}

fn ensure(key: &str, value: impl std::fmt::Display, holds: bool, expected: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Invalid(Invalid::new(key, value, expected)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_needs_its_environment_to_be_deterministic() {
        let run = RunSection { deterministic: true, ..RunSection::default() };
        let gpu = Device::Cuda(0);
        let refused =
            run.ensure_deterministic_on(gpu, None).expect_err("nothing is set").to_string();
        assert!(refused.contains("`run.deterministic` is true"), "{refused}");
        assert!(refused.contains("CUBLAS_WORKSPACE_CONFIG=:4096:8"), "{refused}");
        assert!(run.ensure_deterministic_on(gpu, Some(":4096:2")).is_err());
        assert!(run.ensure_deterministic_on(gpu, Some(":16:8")).is_ok());
        assert!(run.ensure_deterministic_on(Device::Cpu, None).is_ok());
        assert!(RunSection::default().ensure_deterministic_on(gpu, None).is_ok());
    }
}
