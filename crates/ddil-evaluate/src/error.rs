//! Errors of measuring.

use std::path::PathBuf;

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

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
    /// A [`Monitor`](crate::Monitor) stopped the work.
    #[error("{what}: stopped after {done} of {total} images{}", if *is_kept { "; the same command continues" } else { "" })]
    Stopped {
        /// The set of images.
        what: String,
        /// The number of images whose features were computed.
        done: u64,
        /// The number of images in all.
        total: u64,
        /// Whether the features are kept, so that another process can continue.
        is_kept: bool,
    },
    /// Samples of a model are NaN or infinite.
    #[error("{what}: samples are NaN or infinite")]
    NotFinite {
        /// The samples.
        what: String,
    },
    /// Another process computes the same features.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The folder of the features.
        path: PathBuf,
    },
    /// An argument has an unsupported shape, kind, layout or value.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// An operation of libtorch failed.
    #[error("{op}: libtorch failed: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// The message of libtorch, without its backtrace.
        message: String,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    Files(#[from] ddil_files::Error),
    /// An error of a model folder, guidance or sampling.
    #[error(transparent)]
    Pipelines(#[from] ddil_pipelines::Error),
    /// An error of a network or its files.
    #[error(transparent)]
    Models(#[from] ddil_models::Error),
    /// An error of a data set.
    #[error(transparent)]
    Data(#[from] ddil_data::Error),
    /// An error of a metric or an extractor.
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
            Self::Pipelines(error) => error.invalid(),
            Self::Models(error) => error.invalid(),
            Self::Data(error) => error.invalid(),
            Self::Metrics(error) => error.invalid(),
            Self::Core(error) => error.invalid(),
            Self::Scheduler(error) => error.invalid(),
            _ => None,
        }
    }

    /// The same error with the settings of this crate renamed, as those of a config's table or of a command line.
    #[must_use]
    pub fn with_settings_named(self, name: impl Fn(&str) -> String) -> Self {
        match self {
            Self::Invalid(invalid) => {
                let field = name(&invalid.field);
                Self::Invalid(Invalid::new(field, invalid.value, invalid.expected))
            }
            other => other,
        }
    }

    /// Adds the name of the function to an error of libtorch; for `map_err`.
    pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Self {
        // A C++ backtrace follows the first line.
        move |error| {
            let message = error.to_string().lines().next().unwrap_or_default().to_owned();
            Self::Torch { op, message }
        }
    }
}
