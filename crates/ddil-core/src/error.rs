//! Errors of this crate.

use std::path::{Path, PathBuf};

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](crate::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// An argument has a shape, kind, layout or value that the function does not accept.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// A schedule, prediction or sampler returned an error.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// A file of saved state could not be read or written.
    #[error(transparent)]
    Files(#[from] ddil_files::Error),
    /// `ddil-libtorch` returned an error: for a generator, a mapped file.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// A network failed.
    #[error("{network} could not be evaluated")]
    Network {
        /// The network.
        network: String,
        /// The network's own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The conditioning lacks a part that a network requires.
    #[error("{network} requires `{field}` in its conditioning, which has none")]
    ConditioningMissing {
        /// The network.
        network: String,
        /// The part that is missing.
        field: &'static str,
    },
    /// Conditionings that do not fit each other or their batch.
    #[error("{op}: conditioning `{field}` {problem}")]
    Conditioning {
        /// The function that was called.
        op: &'static str,
        /// The part that does not fit.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A source has no state to return.
    #[error("source `{source_name}` has no state: {reason}")]
    NoState {
        /// The source.
        source_name: &'static str,
        /// The reason.
        reason: String,
    },
    /// States were not inserted in the order of the student's updates.
    #[error(
        "{op}: a state of step {created_at_step} follows one of step {latest}; call `flush` before steps are counted from 0 again"
    )]
    OutOfOrder {
        /// The function that was called.
        op: &'static str,
        /// The step of the late state.
        created_at_step: u64,
        /// The latest step so far.
        latest: u64,
    },
    /// A saved buffer could not be read or written.
    #[error("could not {action} {}", path.display())]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// States could not be written to disk, because it is full or the folder belongs to another buffer, for example.
    #[error("could not spill states of the buffer to {}: it requires an empty folder on a disk with room for `buffer.spill.byte_budget`", folder.display())]
    Spill {
        /// The folder.
        folder: PathBuf,
        /// The file, and the error of the system.
        source: Box<ddil_libtorch::Error>,
    },
    /// A file of spilled states is not the one that was saved.
    #[error("{}: {problem}", path.display())]
    SavedFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Saved state does not fit what it is restored into.
    #[error("could not restore the {what}: {problem}")]
    Restore {
        /// What was restored.
        what: &'static str,
        /// What does not fit.
        problem: String,
    },
    /// libtorch returned an error.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// libtorch's message, without its backtrace.
        message: String,
    },
}

/// Result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The setting that is not allowed, if that is the error.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Scheduler(error) => error.invalid(),
            _ => None,
        }
    }

    /// Wraps a libtorch error with the name of the operation; keeps only its first line.
    pub fn torch(op: &'static str) -> impl FnOnce(tch::TchError) -> Self {
        move |source| {
            let message = source.to_string();
            let message = message.lines().next().unwrap_or("libtorch gave no reason").to_owned();
            Self::Torch { op, message }
        }
    }

    /// Wraps an error of the file system.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// Wraps a network's own error.
    pub fn network(
        network: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Network { network: network.into(), source: source.into() }
    }
}
