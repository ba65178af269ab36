//! What can go wrong when a student is compared.

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

use crate::phase::Phase;

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
    /// A denoiser or its conditioning refused.
    #[error(transparent)]
    Core(#[from] ddil_core::Error),
    /// A schedule, a prediction or a shape refused.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// States stand at timesteps that the student is not trained for.
    #[error("{op}: a state is at a timestep off the student's grid {grid:?} ({message})")]
    OffGrid {
        /// The function that was called.
        op: &'static str,
        /// The timesteps that may stand there.
        grid: Vec<i64>,
        /// What was found.
        message: String,
    },
    /// A network follows another noise schedule than the objective.
    #[error(
        "the {network} follows another noise schedule than the objective: {found}, not {expected}"
    )]
    SchedulesDiffer {
        /// Which network.
        network: &'static str,
        /// The settings of its schedule.
        found: String,
        /// The settings of the objective's schedule.
        expected: String,
    },
    /// A method was asked for the loss of a phase that it does not have.
    #[error("{method} has no {phase:?} phase")]
    Phase {
        /// The method.
        method: &'static str,
        /// The phase that was asked for.
        phase: Phase,
    },
    /// A request lacks what the method requires.
    #[error("{method} needs {what}")]
    Missing {
        /// The method.
        method: &'static str,
        /// What is not there.
        what: &'static str,
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

/// The first line of what libtorch said; the rest is a backtrace.
pub(crate) fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or("libtorch gave no reason").to_owned()
}

impl Error {
    /// The setting that is not allowed, where that is what went wrong.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Core(error) => error.invalid(),
            Self::Scheduler(error) => error.invalid(),
            _ => None,
        }
    }

    /// Wraps what libtorch said in the name of the operation, first line only.
    pub(crate) fn torch(op: &'static str) -> impl FnOnce(tch::TchError) -> Self {
        move |source| Self::Torch { op, message: first_line(&source) }
    }
}
