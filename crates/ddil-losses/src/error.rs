//! Errors of the distillation objectives.

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

use crate::phase::Phase;

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
    /// An error of a denoiser or its conditioning.
    #[error(transparent)]
    Core(#[from] ddil_core::Error),
    /// An error of a schedule, a prediction or a shape.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// States are at timesteps for which the student is not trained.
    #[error("{op}: the timestep of a state is not on the student's grid {grid:?} ({message})")]
    OffGrid {
        /// The function that was called.
        op: &'static str,
        /// The allowed timesteps.
        grid: Vec<i64>,
        /// What was found.
        message: String,
    },
    /// A network follows another noise schedule than the objective.
    #[error("the {network} has another noise schedule than the objective: {found}, not {expected}")]
    SchedulesDiffer {
        /// Which network.
        network: &'static str,
        /// The settings of its schedule.
        found: String,
        /// The settings of the objective's schedule.
        expected: String,
    },
    /// A loss was requested for a phase that the method does not have.
    #[error("{method} has no {phase:?} phase")]
    Phase {
        /// The method.
        method: &'static str,
        /// The requested phase.
        phase: Phase,
    },
    /// A request lacks what the method requires.
    #[error("{method} requires {what}")]
    Missing {
        /// The method.
        method: &'static str,
        /// What is missing.
        what: &'static str,
    },
    /// An operation of libtorch failed.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// The message of libtorch, without its backtrace.
        message: String,
    },
}

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The first line of libtorch's message; the rest is a backtrace.
pub(crate) fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or("libtorch gave no reason").to_owned()
}

impl Error {
    /// The invalid setting, if that is the cause.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Core(error) => error.invalid(),
            Self::Scheduler(error) => error.invalid(),
            _ => None,
        }
    }

    /// Wraps the first line of libtorch's message with the name of the operation.
    pub(crate) fn torch(op: &'static str) -> impl FnOnce(tch::TchError) -> Self {
        move |source| Self::Torch { op, message: first_line(&source) }
    }
}
