//! What can go wrong while a run is set up, trained, saved and resumed.

use std::{io, path::Path, path::PathBuf};

use ddil_files::Invalid;
pub(crate) use ddil_files::with_causes;

use ddil_files::settings::Difference;

use crate::{checkpoint::Damage, holder::Holder};

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written, or settings could not be read.
    #[error(transparent)]
    Files(#[from] ddil_files::Error),
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A run is resumed with settings that are not its own.
    #[error("{} belongs to a run with other settings:{}", path.display(), listed(differences))]
    OtherConfig {
        /// The run folder.
        path: PathBuf,
        /// Every setting that differs.
        differences: Vec<Difference>,
    },
    /// A checkpoint is not what was written.
    #[error("the checkpoint {} is damaged", path.display())]
    DamagedCheckpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What is wrong with it.
        source: Damage,
    },
    /// A run has checkpoints, and none of them is what was written.
    #[error(
        "none of the {count} checkpoints in {} is sound; move them away to start the run over (the newest: {newest})",
        path.display()
    )]
    NoSoundCheckpoint {
        /// The folder of the checkpoints.
        path: PathBuf,
        /// How many there are.
        count: usize,
        /// What is wrong with the newest.
        newest: Damage,
    },
    /// A checkpoint is sound, but was written by another kind of run.
    #[error("{} is a checkpoint of `{found}`, not of `{expected}`", path.display())]
    OtherCheckpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The kind that its manifest names.
        found: String,
        /// The kind that was asked for.
        expected: String,
    },
    /// A file was asked for that the checkpoint does not have.
    #[error("the checkpoint {} has no `{name}`, only {}", path.display(), known.join(", "))]
    NoSuchMember {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The file asked for.
        name: String,
        /// The files it has.
        known: Vec<String>,
    },
    /// A name cannot be that of a file in a checkpoint.
    #[error("`{name}` cannot name a file in a checkpoint: {reason}")]
    InvalidMember {
        /// The name.
        name: String,
        /// Why not.
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
    /// A new run was given a folder that already holds something.
    #[error(
        "{} already exists and is not empty: choose another folder, or resume the run in it",
        path.display()
    )]
    FolderNotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// A folder that should hold a run does not.
    #[error("{} holds no run: it has no {missing}", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// The file that every run has.
        missing: &'static str,
    },
    /// Another process is at work in the run folder.
    #[error("{} is in use by another process{}", path.display(), in_brackets(holder.as_ref().map(ToString::to_string).as_deref()))]
    FolderInUse {
        /// The folder.
        path: PathBuf,
        /// That process, where known.
        holder: Option<Holder>,
    },
    /// A record is not the one that the checkpoint knew.
    #[error(
        "{} does not start with the {expected_bytes} bytes that the checkpoint knows: {reason}",
        path.display()
    )]
    DamagedRecord {
        /// The record.
        path: PathBuf,
        /// How long it was when the checkpoint was written.
        expected_bytes: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// Saved state does not fit what it is loaded into.
    #[error("{what}: the saved state does not fit:{}", listed(problems))]
    StateMismatch {
        /// What was being loaded.
        what: &'static str,
        /// Every missing, unexpected and misshapen entry.
        problems: Vec<String>,
    },
    /// A parameter that is to be updated has no gradient.
    #[error("{} of {total} parameters have no gradient, `{}` first", names.len(), names[0])]
    MissingGradient {
        /// Their names; at least one.
        names: Vec<String>,
        /// How many parameters there are.
        total: usize,
    },
    /// A number that must be finite is not.
    #[error("step {step}: {name} is {value}{}{}", in_brackets(detail.as_deref()), saved_in(saved.as_deref()))]
    NonFinite {
        /// The step, counted from 1.
        step: u64,
        /// The loss, the gradient norm, ...
        name: String,
        /// NaN or an infinity.
        value: f64,
        /// What else was seen, such as whose answer it was, or the first parameter with such a gradient.
        detail: Option<String>,
        /// Where the batch was saved, to be looked at; see [`evidence`](crate::evidence).
        saved: Option<PathBuf>,
    },
    /// A comparison cannot be begun as it is written down.
    #[error("{place} cannot be compared:{}", listed(problems))]
    Comparison {
        /// The file, or the comparison's folder.
        place: String,
        /// Everything that is wrong with it.
        problems: Vec<String>,
    },
    /// A plot could not be drawn.
    #[error("could not draw {}: {reason}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// What was refused.
        reason: String,
    },
    /// Something outside refused a service: the terminal, the logger, signals.
    #[error("could not {action}: {reason}")]
    Setup {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// A data set is missing or damaged.
    #[error(transparent)]
    Dataset(#[from] ddil_data::Error),
    /// What was kept of encoded data is not what was written.
    #[error("the cache of encoded data {} is damaged; remove it to rebuild it", path.display())]
    DamagedCache {
        /// The cache's folder.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ddil_data::Error>,
    },
    /// Somebody asked for a stop before the first update.
    #[error("stopped while {action}: {done} of {total} were done, and none of it is kept")]
    Interrupted {
        /// What went on.
        action: &'static str,
        /// How far it was.
        done: usize,
        /// How far it had to go.
        total: usize,
    },
    /// libtorch refused an operation of ours.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// libtorch refused an operation of tch's.
    #[error("{op}: {}", first_line(source))]
    Torch {
        /// The function that was at work.
        op: &'static str,
        /// What libtorch said.
        source: tch::TchError,
    },
    /// A schedule, grid, sampler or threshold refused.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// A rollout, source or buffer refused.
    #[error(transparent)]
    Core(#[from] ddil_core::Error),
    /// An objective refused.
    #[error(transparent)]
    Losses(#[from] ddil_losses::Error),
    /// A model folder, guidance or sampling refused.
    #[error(transparent)]
    Pipelines(#[from] ddil_pipelines::Error),
    /// A network or its files refused.
    #[error(transparent)]
    Models(#[from] ddil_models::Error),
    /// A metric refused.
    #[error(transparent)]
    Metrics(#[from] ddil_metrics::Error),
}

impl Error {
    /// The setting that is not allowed, where that is what went wrong.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Scheduler(error) => error.invalid(),
            Self::Core(error) => error.invalid(),
            Self::Losses(error) => error.invalid(),
            Self::Models(error) => error.invalid(),
            Self::Metrics(error) => error.invalid(),
            Self::Dataset(error) => error.invalid(),
            Self::Pipelines(error) => error.invalid(),
            _ => None,
        }
    }

    /// Names path and action of a refused file system call; for `map_err`.
    pub fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Files(ddil_files::Error::io(action, path)(source))
    }

    /// Names path and action of what a JSON parser or writer refused; for `map_err`.
    pub fn json<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(serde_json::Error) -> Self + use<'a> {
        move |source| Self::Files(ddil_files::Error::json(action, path)(source))
    }

    /// Names the function in which libtorch refused; for `map_err`.
    pub fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Self {
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
    folder.map_or(String::new(), |folder| format!("; the batch is in {}", folder.display()))
}

/// What libtorch says goes on with a C++ backtrace that helps nobody here.
fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
