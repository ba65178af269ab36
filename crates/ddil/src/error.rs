//! Errors of the program's parts.

use std::path::{Path, PathBuf};

use ddil_files::Invalid;

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](ddil_files::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A comparison cannot start as configured.
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
        /// What failed.
        reason: String,
    },
    /// A report could not be written.
    #[error("could not write the report {}: {reason}", path.display())]
    Report {
        /// The file.
        path: PathBuf,
        /// What failed.
        reason: String,
    },
    /// A folder is neither a run nor a comparison.
    #[error("{} is neither a run (no {}) nor a comparison (no cells/ with plan.json or results.json); give a folder that ddil \
             train, distill or compare wrote",
        path.display(),
        missing)]
    NothingToReport {
        /// The folder.
        path: PathBuf,
        /// The file that a run has.
        missing: &'static str,
    },
    /// A file of samples does not contain samples.
    #[error("could not read the tensors of {}: {reason}", path.display())]
    Samples {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A process could not be started or observed.
    #[error("could not {action}: {reason}")]
    Process {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// An operation of libtorch failed.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// The message of libtorch, without its backtrace.
        message: String,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    Files(#[from] ddil_files::Error),
    /// An error of a run.
    #[error(transparent)]
    Trainer(#[from] ddil_trainer::Error),
    /// An error of a model folder, guidance or sampling.
    #[error(transparent)]
    Pipelines(#[from] ddil_pipelines::Error),
    /// An error of a network or its files.
    #[error(transparent)]
    Models(#[from] ddil_models::Error),
    /// An error of a data set.
    #[error(transparent)]
    Data(#[from] ddil_data::Error),
    /// An error of a measurement.
    #[error(transparent)]
    Evaluate(#[from] ddil_evaluate::Error),
    /// An error of a metric.
    #[error(transparent)]
    Metrics(#[from] ddil_metrics::Error),
    /// An error of a rollout or of the measure of shift.
    #[error(transparent)]
    Core(#[from] ddil_core::Error),
    /// An error of a schedule, grid, sampler or threshold.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// An error of `ddil-libtorch`.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
}

impl Error {
    /// The invalid setting, if that is the cause.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Trainer(error) => error.invalid(),
            Self::Pipelines(error) => error.invalid(),
            Self::Models(error) => error.invalid(),
            Self::Data(error) => error.invalid(),
            Self::Evaluate(error) => error.invalid(),
            Self::Metrics(error) => error.invalid(),
            Self::Core(error) => error.invalid(),
            Self::Scheduler(error) => error.invalid(),
            _ => None,
        }
    }

    /// Adds the action and the path to the error of a file system call; for `map_err`.
    pub(crate) fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(std::io::Error) -> Self + use<'a> {
        move |source| Self::Files(ddil_files::Error::io(action, path)(source))
    }

    /// Adds the name of the function to an error of libtorch; for `map_err`.
    pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Self {
        // A C++ backtrace follows the first line.
        move |error| {
            let message = error.to_string().lines().next().unwrap_or_default().to_owned();
            Self::Torch { op, message }
        }
    }

    /// Whether samples or an update contained NaN or infinite values.
    pub(crate) fn is_not_finite(&self) -> bool {
        match self {
            Self::Trainer(error) => is_not_finite(error),
            Self::Pipelines(error) => matches!(error, ddil_pipelines::Error::Image { .. }),
            _ => false,
        }
    }
}

/// Whether samples or an update of a run contained NaN or infinite values; such samples cannot be written as images.
pub(crate) fn is_not_finite(error: &ddil_trainer::Error) -> bool {
    use ddil_trainer::Error::{NonFinite, Pipelines};
    matches!(error, NonFinite { .. } | Pipelines(ddil_pipelines::Error::Image { .. }))
}

fn listed(problems: &[String]) -> String {
    problems.iter().fold(String::new(), |text, problem| text + "\n  " + problem)
}
