//! What can go wrong when a sample is stepped.

use std::path::PathBuf;

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
    /// A timestep is not on the training grid.
    #[error("{op}: timestep {timestep} is not in {lowest}..={highest} (-1 is clean data)")]
    TimestepOutOfRange {
        /// The function that was called.
        op: &'static str,
        /// What was found.
        timestep: i64,
        /// The smallest that may stand there.
        lowest: i64,
        /// The largest that may stand there.
        highest: i64,
    },
    /// A stochastic sampler was called without noise.
    #[error("{op}: this sampler renews noise and needs `{argument}`, which is not given")]
    NoiseMissing {
        /// The function that was called.
        op: &'static str,
        /// The argument that it comes from: `noise` of a step, `generator` of a rollout.
        argument: &'static str,
    },
    /// A prediction type has no meaning on this schedule.
    #[error("`{prediction_type}` is not defined on this schedule: {reason}")]
    PredictionType {
        /// What was asked for.
        prediction_type: &'static str,
        /// Why it cannot be had.
        reason: String,
    },
    /// A scheduler config has keys that its class does not have.
    #[error("{class} has no key {}; its keys are {}", list(unknown), list(known))]
    UnknownKeys {
        /// The class that the file names.
        class: &'static str,
        /// All of the keys that it does not have.
        unknown: Vec<String>,
        /// The keys that it has.
        known: Vec<String>,
    },
    /// A text is not JSON, or not an object.
    #[error("a scheduler config must be a JSON object")]
    Parse {
        /// Where and why.
        source: serde_json::Error,
    },
    /// A file holds something else than a scheduler config that can be.
    #[error("{} is no scheduler config that can be used", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// A file could not be read or written.
    #[error("could not {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// Settings that a scheduler config of diffusers has no words for.
    #[error("`{field}` cannot be said in a {class} config: {reason}")]
    NotRepresentable {
        /// The class to be written.
        class: &'static str,
        /// The setting.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// The arithmetic of a step was refused.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// libtorch refused an operation.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// libtorch's own words, without its backtrace.
        message: String,
    },
}

fn list(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// This crate's results.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The setting that is not allowed, where that is what went wrong.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::File { source, .. } => source.invalid(),
            _ => None,
        }
    }

    /// Wraps what libtorch said in the name of the operation, first line only.
    pub(crate) fn torch(op: &'static str) -> impl FnOnce(tch::TchError) -> Self {
        move |source| {
            let message = source.to_string();
            let message = message.lines().next().unwrap_or("libtorch gave no reason").to_owned();
            Self::Torch { op, message }
        }
    }
}
