//! What can go wrong while states are collected.

use std::path::{Path, PathBuf};

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// An argument has a shape, kind, layout or value that the function cannot take.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// A schedule, prediction or sampler refused.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// A file of saved state could not be read or written.
    #[error(transparent)]
    Files(#[from] ddil_files::Error),
    /// The floor refused: a generator, a mapped file.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// A network could not answer.
    #[error("{network} could not answer")]
    Network {
        /// Which network.
        network: String,
        /// Its own words.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A network needs to be told something that the conditioning does not hold.
    #[error("{network} needs `{field}` in its conditioning and got none")]
    ConditioningMissing {
        /// Which network.
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
    /// A source has no state to give.
    #[error("source `{source_name}` has no state to give: {reason}")]
    NoState {
        /// Which source.
        source_name: &'static str,
        /// Why.
        reason: String,
    },
    /// States came in another order than that of the student's updates.
    #[error(
        "{op}: a state of step {birth} came after one of step {latest}; flush when counting begins anew"
    )]
    OutOfOrder {
        /// The function that was called.
        op: &'static str,
        /// The step of the late state.
        birth: u64,
        /// The newest step so far.
        latest: u64,
    },
    /// A saved buffer could not be read or written.
    #[error("could not {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// States could not be put on disk: it is full, say, or the folder is another buffer's.
    #[error("could not spill states of the buffer to {}: it needs a folder of its own, with room for `buffer.spill.byte_budget`", folder.display())]
    Spill {
        /// The folder.
        folder: PathBuf,
        /// Which file, and what the system said.
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
    #[error("saved {what} does not fit: {problem}")]
    Restore {
        /// What was restored.
        what: &'static str,
        /// What does not fit.
        problem: String,
    },
    /// libtorch refused an operation.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// libtorch's own words, without its backtrace.
        message: String,
    },
}

/// This crate's results.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The setting that is not allowed, where that is what went wrong.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Scheduler(error) => error.invalid(),
            _ => None,
        }
    }

    /// Wraps what libtorch said in the name of the operation, first line only.
    pub fn torch(op: &'static str) -> impl FnOnce(tch::TchError) -> Self {
        move |source| {
            let message = source.to_string();
            let message = message.lines().next().unwrap_or("libtorch gave no reason").to_owned();
            Self::Torch { op, message }
        }
    }

    /// Wraps what the file system said.
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
