//! What can go wrong between a model folder and its images.

use std::io;
use std::path::{Path, PathBuf};

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

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
    /// A file could not be read or written.
    #[error(transparent)]
    Files(#[from] ddil_files::Error),
    /// A folder contains no model.
    #[error("{}", no_model(path, missing))]
    NotAModel {
        /// The folder.
        path: PathBuf,
        /// The file that every model folder has.
        missing: &'static str,
    },
    /// A model would be written into a folder that is not empty.
    #[error("{} already exists and is not empty: choose another folder", path.display())]
    FolderNotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// Parts of a model are unusable; nothing was written.
    #[error("the model of {} cannot be taken over:{}", path.display(), listed(problems))]
    Parts {
        /// The folder of its network.
        path: PathBuf,
        /// Every problem, part by part.
        problems: Vec<String>,
    },
    /// Images cannot be written as PNG.
    #[error("cannot make a picture of {found}: {expected}")]
    Picture {
        /// What was given.
        found: String,
        /// What is expected.
        expected: &'static str,
    },
    /// libtorch refused an operation of ours.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// libtorch refused an operation of tch's.
    #[error("{op}: {reason}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// The first line of libtorch's message, which continues with a C++ backtrace.
        reason: String,
    },
    /// A schedule, grid, sampler or threshold refused.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// A denoiser or rollout refused.
    #[error(transparent)]
    Core(#[from] ddil_core::Error),
    /// A network or its files refused.
    #[error(transparent)]
    Models(#[from] ddil_models::Error),
}

impl Error {
    /// The setting that is not allowed, where that is what went wrong.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Scheduler(error) => error.invalid(),
            Self::Core(error) => error.invalid(),
            Self::Models(error) => error.invalid(),
            _ => None,
        }
    }

    /// Names path and action of a refused file system call; for `map_err`.
    pub(crate) fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Files(ddil_files::Error::io(action, path)(source))
    }

    /// Names the function in which libtorch refused; for `map_err`.
    pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Self {
        move |error| Self::Torch { op, reason: first_line(&error) }
    }
}

fn no_model(path: &Path, missing: &str) -> String {
    let shown = path.display();
    if path.exists() {
        format!("{shown} holds no model: there is no {missing}, neither in it nor in its `export`")
    } else {
        format!(
            "{shown} holds no model: there is no such folder; expected one with a {missing} in it, or in its `export`"
        )
    }
}

fn listed(problems: &[String]) -> String {
    problems.iter().fold(String::new(), |text, problem| text + "\n  " + problem)
}

fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
