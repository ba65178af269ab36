//! What can go wrong while files and settings are read and written.

use std::{io, path::Path, path::PathBuf};

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused an operation.
    #[error("could not {action} {}", path.display())]
    Io {
        /// The action, as in "could not _write_ runs/demo/status.json".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A JSON file could not be read or written.
    #[error("could not {action} {} as JSON", path.display())]
    Json {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The message of the parser.
        source: serde_json::Error,
    },
    /// A file was written by another version of this program, in a format that this one does not know.
    #[error(
        "{} is of format version {found}, and this version of ddil reads {known}: use {} version of ddil for it",
        path.display(), if found > known { "a newer" } else { "an older" }
    )]
    FormatVersion {
        /// The file.
        path: PathBuf,
        /// The version of the file.
        found: u32,
        /// The version that is known.
        known: u32,
    },
    /// A config file is not TOML.
    #[cfg(feature = "settings")]
    #[error("{place}: {message}")]
    ConfigSyntax {
        /// File, line and column.
        place: String,
        /// The message of the parser.
        message: String,
    },
    /// A config has an unknown key.
    #[cfg(feature = "settings")]
    #[error("{place}: unknown key `{key}`{}", suggestion(nearest.as_deref(), known))]
    UnknownKey {
        /// File, line and column, or the `--set` that brought the key.
        place: String,
        /// The whole path of the key.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
        /// All keys that are known there.
        known: Vec<String>,
    },
    /// A config has a key with a value of the wrong type or range.
    #[cfg(feature = "settings")]
    #[error("{place}: `{key}`: {message}")]
    InvalidSetting {
        /// File, line and column, or the `--set` that brought the value.
        place: String,
        /// The whole path of the key.
        key: String,
        /// The value that was found and the values that are allowed.
        message: String,
    },
    /// An override on the command line cannot be read.
    #[cfg(feature = "settings")]
    #[error("--set {text}: {reason}")]
    InvalidOverride {
        /// What was given.
        text: String,
        /// Why it cannot be applied.
        reason: String,
    },
    /// A value has no form in TOML.
    #[cfg(feature = "settings")]
    #[error("could not write the settings as TOML")]
    WriteSettings {
        /// The error of the serialiser.
        source: toml::ser::Error,
    },
}

impl Error {
    /// Names path and action of a refused file system call; for `map_err`.
    pub fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// Names path and action of what a JSON parser or writer refused; for `map_err`.
    pub fn json<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(serde_json::Error) -> Self + use<'a> {
        move |source| Self::Json { action, path: path.to_owned(), source }
    }
}

/// An error and its causes, in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(feature = "settings")]
fn suggestion(nearest: Option<&str>, known: &[String]) -> String {
    match (nearest, known) {
        (Some(nearest), _) => format!("; did you mean `{nearest}`?"),
        (None, []) => "; no key may stand there".to_owned(),
        (None, known) => format!("; known are {}", known.join(", ")),
    }
}
