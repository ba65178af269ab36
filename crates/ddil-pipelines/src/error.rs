//! Errors of reading model folders and generating images.

use std::io;
use std::path::{Path, PathBuf};

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](crate::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// An argument has an unsupported shape, kind, layout or value.
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
        /// The file that every model folder contains.
        missing: &'static str,
    },
    /// The output folder is not empty.
    #[error("{} already exists and is not empty: choose another folder", path.display())]
    FolderNotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// Parts of a model are invalid; nothing was written.
    #[error("the model in {} cannot be converted:{}", path.display(), listed(problems))]
    Parts {
        /// The folder of its network.
        path: PathBuf,
        /// All problems, by part.
        problems: Vec<String>,
    },
    /// Images cannot be written as PNG.
    #[error("cannot write {found} as PNG: {expected}")]
    Image {
        /// The input.
        found: String,
        /// The expected input.
        expected: &'static str,
    },
    /// An operation of ddil-libtorch failed.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// An operation of tch failed.
    #[error("{op}: {reason}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// The first line of libtorch's message, which continues with a C++ backtrace.
        reason: String,
    },
    /// An error of a schedule, timestep grid, sampler or threshold.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// An error of a denoiser or rollout.
    #[error(transparent)]
    Core(#[from] ddil_core::Error),
    /// An error of a network or its files.
    #[error(transparent)]
    Models(#[from] ddil_models::Error),
}

impl Error {
    /// The invalid setting, if this error is about one.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            Self::Scheduler(error) => error.invalid(),
            Self::Core(error) => error.invalid(),
            Self::Models(error) => error.invalid(),
            _ => None,
        }
    }

    /// Adds the action and the path to the error of a file system call; for `map_err`.
    pub(crate) fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Files(ddil_files::Error::io(action, path)(source))
    }

    /// Adds the name of the function to an error of libtorch; for `map_err`.
    pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Self {
        move |error| Self::Torch { op, reason: first_line(&error) }
    }
}

fn no_model(path: &Path, missing: &str) -> String {
    let shown = path.display();
    if path.exists() {
        format!("{shown} contains no model: neither it nor its `export` contains a {missing}")
    } else {
        format!(
            "{shown} contains no model: the folder does not exist; expected a folder with a {missing} in it or in its \
             `export`"
        )
    }
}

fn listed(problems: &[String]) -> String {
    problems.iter().fold(String::new(), |text, problem| text + "\n  " + problem)
}

fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
