//! Errors of setting up, training, saving and resuming a run.

use std::{io, path::Path, path::PathBuf};

use ddil_files::Invalid;
pub(crate) use ddil_files::with_causes;

use ddil_files::settings::Difference;

use crate::{checkpoint::Damage, holder::Holder};

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](crate::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written, or settings could not be read.
    #[error(transparent)]
    Files(#[from] ddil_files::Error),
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A run is resumed with other settings than it was started with.
    #[error("{} contains a run with other settings:{}", path.display(), listed(differences))]
    OtherConfig {
        /// The run folder.
        path: PathBuf,
        /// Every setting that differs.
        differences: Vec<Difference>,
    },
    /// A checkpoint differs from what was written.
    #[error("the checkpoint {} is damaged", path.display())]
    DamagedCheckpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What is wrong with it.
        source: Damage,
    },
    /// A run has checkpoints, all of which are damaged.
    #[error(
        "all {count} checkpoints in {} are damaged; move them away to start the run over (the newest: {newest})",
        path.display()
    )]
    NoIntactCheckpoint {
        /// The folder of the checkpoints.
        path: PathBuf,
        /// The number of checkpoints.
        count: usize,
        /// What is wrong with the newest.
        newest: Damage,
    },
    /// A checkpoint is sound, but was written by another kind of run.
    #[error("{} is a checkpoint of `{found}`, not of `{expected}`", path.display())]
    OtherCheckpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The kind in its manifest.
        found: String,
        /// The kind that was requested.
        expected: String,
    },
    /// A run has no checkpoint of that name.
    #[error(
        "{} does not exist; the run has {} (`best` requires `output.checkpoints.keep_best`)",
        path.display(),
        ddil_files::listed(known)
    )]
    NoSuchCheckpoint {
        /// The path that was given.
        path: PathBuf,
        /// The names of the checkpoints that exist; at least one.
        known: Vec<String>,
    },
    /// A checkpoint is not in the folder of a run.
    #[error(
        "{} is a checkpoint outside of the folder of its run, whose `config.toml` and `export` its model requires; expected \
         RUN/checkpoints/step_..",
        path.display()
    )]
    OutsideOfRun {
        /// The checkpoint's folder.
        path: PathBuf,
    },
    /// A run has checkpoints, but no exported model.
    #[error(
        "{} has no exported model (`export`), whose settings a model of a checkpoint requires; resuming the run writes it",
        path.display()
    )]
    NoExport {
        /// The run folder.
        path: PathBuf,
    },
    /// The checkpoint does not contain the requested file.
    #[error("the checkpoint {} does not contain `{name}`, only {}", path.display(), known.join(", "))]
    NoSuchMember {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The requested file.
        name: String,
        /// The files that it contains.
        known: Vec<String>,
    },
    /// A name is not allowed for a file of a checkpoint.
    #[error("`{name}` is not a valid name for a file of a checkpoint: {reason}")]
    InvalidMember {
        /// The name.
        name: String,
        /// Why it is not allowed.
        reason: &'static str,
    },
    /// A safetensors file could not be written or read.
    #[error("could not {action} the tensors of {}: {reason}", path.display())]
    Tensors {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The folder for a new run is not empty.
    #[error(
        "{} already exists and is not empty; choose another folder, or resume the run in it",
        path.display()
    )]
    FolderNotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// A folder does not contain a run.
    #[error("{} is not a run folder: it has no {missing}", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// The missing file, which every run has.
        missing: &'static str,
    },
    /// Another process is using the run folder.
    #[error("{} is in use by another process{}", path.display(), in_brackets(holder.as_ref().map(ToString::to_string).as_deref()))]
    FolderInUse {
        /// The folder.
        path: PathBuf,
        /// That process, if known.
        holder: Option<Holder>,
    },
    /// A record does not match the position in the checkpoint.
    #[error(
        "{} was changed after the checkpoint, which recorded its first {expected_bytes} bytes: {reason}",
        path.display()
    )]
    DamagedRecord {
        /// The record.
        path: PathBuf,
        /// Its length when the checkpoint was written.
        expected_bytes: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// Saved state does not fit its destination.
    #[error("{what}: the saved state does not fit:{}", listed(problems))]
    StateMismatch {
        /// What was being loaded.
        what: &'static str,
        /// Every missing, unexpected and misshapen entry.
        problems: Vec<String>,
    },
    /// A parameter to be updated has no gradient.
    #[error("{} of {total} parameters have no gradient (the first: `{}`)", names.len(), names[0])]
    MissingGradient {
        /// Their names; at least one.
        names: Vec<String>,
        /// The number of parameters.
        total: usize,
    },
    /// A number is NaN or infinite.
    #[error("step {step}: {name} is {value}{}{}", in_brackets(detail.as_deref()), saved_in(saved.as_deref()))]
    NonFinite {
        /// The step, counted from 1.
        step: u64,
        /// What it is: the loss, the gradient norm, ...
        name: String,
        /// NaN or an infinity.
        value: f64,
        /// Further findings, such as the network whose output it was, or the first parameter with such a gradient.
        detail: Option<String>,
        /// Where the batch was saved for inspection; see [`Evidence`](crate::Evidence).
        saved: Option<PathBuf>,
    },
    /// The terminal, the logger or signal handling failed.
    #[error("could not {action}: {reason}")]
    Setup {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// A data set is missing or damaged.
    #[error(transparent)]
    Dataset(#[from] ddil_data::Error),
    /// Cached encoded data differ from what was written.
    #[error("the cache of encoded data {} is damaged; remove it to rebuild it", path.display())]
    DamagedCache {
        /// The cache's folder.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ddil_data::Error>,
    },
    /// A stop was requested before the first update.
    #[error("stopped while {action}: {done} of {total} were done; nothing was kept")]
    Interrupted {
        /// The work in progress.
        action: &'static str,
        /// How much of it was done.
        done: usize,
        /// How much there was in all.
        total: usize,
    },
    /// libtorch rejected an operation of this project.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// libtorch rejected an operation of tch.
    #[error("{op}: {}", first_line(source))]
    Torch {
        /// The function that failed.
        op: &'static str,
        /// libtorch's message.
        source: tch::TchError,
    },
    /// An error of a schedule, grid, sampler or threshold.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// An error of a rollout, source or buffer.
    #[error(transparent)]
    Core(#[from] ddil_core::Error),
    /// An error of an objective.
    #[error(transparent)]
    Losses(#[from] ddil_losses::Error),
    /// An error of a model folder, guidance or sampling.
    #[error(transparent)]
    Pipelines(#[from] ddil_pipelines::Error),
    /// An error of a network or its files.
    #[error(transparent)]
    Models(#[from] ddil_models::Error),
    /// An error of the evaluation.
    #[error(transparent)]
    Evaluate(#[from] ddil_evaluate::Error),
    /// An error of a metric.
    #[error(transparent)]
    Metrics(#[from] ddil_metrics::Error),
}

impl Error {
    /// The invalid setting, if that is the cause.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Scheduler(error) => error.invalid(),
            Self::Core(error) => error.invalid(),
            Self::Losses(error) => error.invalid(),
            Self::Models(error) => error.invalid(),
            Self::Evaluate(error) => error.invalid(),
            Self::Metrics(error) => error.invalid(),
            Self::Dataset(error) => error.invalid(),
            Self::Pipelines(error) => error.invalid(),
            _ => None,
        }
    }

    /// Adds path and action to a file system error; for `map_err`.
    pub(crate) fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Files(ddil_files::Error::io(action, path)(source))
    }

    /// Adds path and action to an error of a JSON parser or writer; for `map_err`.
    pub(crate) fn json<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(serde_json::Error) -> Self + use<'a> {
        move |source| Self::Files(ddil_files::Error::json(action, path)(source))
    }

    /// Adds the name of the function in which libtorch failed; for `map_err`.
    pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Self {
        move |source| Self::Torch { op, source }
    }
}

fn listed<T: std::fmt::Display>(items: &[T]) -> String {
    items.iter().fold(String::new(), |text, item| text + &format!("\n  {item}"))
}

fn in_brackets(text: Option<&str>) -> String {
    text.map_or(String::new(), |text| format!(" ({text})"))
}

fn saved_in(folder: Option<&Path>) -> String {
    folder.map_or(String::new(), |folder| format!("; the batch was saved to {}", folder.display()))
}

/// libtorch's messages end with a C++ backtrace, which does not help the user.
fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
