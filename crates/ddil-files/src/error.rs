//! Errors of reading and writing files and settings.

use std::{io, path::Path, path::PathBuf};

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](crate::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file system operation failed.
    #[error("could not {action} {}", path.display())]
    Io {
        /// The action, as in "could not *write* runs/demo/status.json".
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
    /// A file has a format version that this version of the program cannot read.
    #[error(
        "{} has format version {found}, but this version of ddil reads {known}: use {} version of ddil",
        path.display(), if found > known { "a newer" } else { "an older" }
    )]
    FormatVersion {
        /// The file.
        path: PathBuf,
        /// The version of the file.
        found: u32,
        /// The version that can be read.
        known: u32,
    },
    /// A config file is not valid TOML.
    #[cfg(feature = "settings")]
    #[error("{place}: {message}")]
    ConfigSyntax {
        /// File, line and column.
        place: String,
        /// The message of the parser.
        message: String,
    },
    /// A config contains an unknown key.
    #[cfg(feature = "settings")]
    #[error("{place}: unknown key `{key}`{}", suggestion(nearest.as_deref(), known))]
    UnknownKey {
        /// File, line and column, or the `--set` override that contains the key.
        place: String,
        /// The full path of the key.
        key: String,
        /// The most similar known key.
        nearest: Option<String>,
        /// All known keys at this place.
        known: Vec<String>,
    },
    /// A value in a config has the wrong type or is out of range.
    #[cfg(feature = "settings")]
    #[error("{place}: {message}")]
    InvalidSetting {
        /// File, line and column, or the `--set` override that contains the value.
        place: String,
        /// The full path of the key; empty for the whole file.
        key: String,
        /// The key, the value found and the values allowed.
        message: String,
    },
    /// A `--set` override cannot be parsed or applied.
    #[cfg(feature = "settings")]
    #[error("--set {text}: {reason}")]
    InvalidOverride {
        /// The text of the override.
        text: String,
        /// Why it cannot be applied.
        reason: String,
    },
    /// TOML cannot represent a value.
    #[cfg(feature = "settings")]
    #[error("could not write the settings as TOML")]
    WriteSettings {
        /// The error of the serializer.
        source: toml::ser::Error,
    },
}

impl Error {
    /// Adds the action and the path to the error of a file system call; for `map_err`.
    pub fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// Adds the action and the path to the error of a JSON parser or writer; for `map_err`.
    pub fn json<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(serde_json::Error) -> Self + use<'a> {
        move |source| Self::Json { action, path: path.to_owned(), source }
    }
}

#[cfg(feature = "settings")]
fn suggestion(nearest: Option<&str>, known: &[String]) -> String {
    match (nearest, known) {
        (Some(nearest), _) => format!("; did you mean `{nearest}`?"),
        (None, []) => "; no keys are allowed here".to_owned(),
        (None, known) => format!("; known keys: {}", known.join(", ")),
    }
}
