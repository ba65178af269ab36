//! Errors of schedules, timesteps and steps.

use std::path::PathBuf;

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
        /// The smallest allowed timestep.
        lowest: i64,
        /// The largest allowed timestep.
        highest: i64,
    },
    /// A noise level is not one of the training grid, and the denoiser is defined on the grid only.
    #[error(
        "the noise level at timestep {timestep} lies between training timesteps, where this denoiser is not defined"
    )]
    BetweenTimesteps {
        /// The timestep of the level.
        timestep: f64,
    },
    /// A stochastic sampler was called without noise.
    #[error("{op}: this sampler adds noise and requires `{argument}`, which is missing")]
    NoiseMissing {
        /// The function that was called.
        op: &'static str,
        /// The missing argument: `noise` of a step, `generator` of a rollout.
        argument: &'static str,
    },
    /// A prediction type is not defined on this schedule.
    #[error("`{prediction_type}` is not defined on this schedule: {reason}")]
    PredictionType {
        /// The requested type.
        prediction_type: &'static str,
        /// Why it is not defined.
        reason: String,
    },
    /// A scheduler config has keys that its class does not have.
    #[error("{class} has no key {}; its keys are {}", list(unknown), list(known))]
    UnknownKeys {
        /// The class in the file.
        class: &'static str,
        /// All unknown keys.
        unknown: Vec<String>,
        /// The known keys.
        known: Vec<String>,
    },
    /// A text is not JSON, or not an object.
    #[error("a scheduler config must be a JSON object")]
    Parse {
        /// The position and reason.
        source: serde_json::Error,
    },
    /// A file does not contain a valid scheduler config.
    #[error("{} is not a valid scheduler config", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// A file could not be read or written.
    #[error("could not {action} {}", path.display())]
    Io {
        /// The failed operation.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// Settings that a scheduler config of diffusers cannot represent.
    #[error("`{field}` cannot be represented in a {class} config: {reason}")]
    NotRepresentable {
        /// The class to write.
        class: &'static str,
        /// The setting.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// An error of `ddil-libtorch` in the arithmetic of a step.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// An operation of libtorch failed.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// The message of libtorch, without its backtrace.
        message: String,
    },
}

fn list(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The invalid setting, if that is the cause.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::File { source, .. } => source.invalid(),
            _ => None,
        }
    }

    /// Wraps the first line of libtorch's message with the name of the operation.
    pub(crate) fn torch(op: &'static str) -> impl FnOnce(tch::TchError) -> Self {
        move |source| {
            let message = source.to_string();
            let message = message.lines().next().unwrap_or("libtorch gave no reason").to_owned();
            Self::Torch { op, message }
        }
    }
}
