//! JSON files, with a version if the format may change.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Error, Result, parse_json, read_bounded, write_atomic};

/// Writes a value as indented JSON, atomically; see [`write_atomic`].
///
/// # Errors
///
/// [`Error::Json`] if JSON cannot represent the value, [`Error::Io`] if the file cannot be written.
///
/// # Example
///
/// ```
/// use ddil_files::{read_versioned, write_json};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct Card {
///     format_version: u32,
///     name: String,
/// }
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("card.json");
/// write_json(&path, &Card { format_version: 1, name: "demo".to_owned() })?;
/// let card: Card = read_versioned(&path, 1)?;
/// assert_eq!(card.name, "demo");
/// assert!(read_versioned::<Card>(&path, 2).is_err(), "another version");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(Error::json("write", path))?;
    text.push(b'\n');
    write_atomic(path, &text)
}

/// Reads a JSON file of any size.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read, [`Error::Json`] if its content cannot be parsed as a `T`.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    parse_json(&text).map_err(Error::json("read", path))
}

/// Size limit of files that are usually small: an index, a card, a manifest, a status.
const MAX_SMALL_BYTES: u64 = 16 << 20;

/// Reads a regular JSON file of at most 16 MiB.
///
/// # Errors
///
/// As [`read_json`], and [`Error::Io`] for a larger file or one that is not a regular file.
pub fn read_small_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read_bounded(path, MAX_SMALL_BYTES).map_err(Error::io("read", path))?;
    parse_json(&text).map_err(Error::json("read", path))
}

/// The first version of every format; files without `format_version` have it.
pub fn first_version() -> u32 {
    1
}

/// The version of a file; its other keys are ignored.
#[derive(Deserialize)]
struct Versioned {
    #[serde(default = "first_version")]
    format_version: u32,
}

/// Reads a small JSON file of the version `known`. The version is checked before the rest is parsed.
///
/// # Errors
///
/// As [`read_small_json`], and [`Error::FormatVersion`] for another version.
pub fn read_versioned<T: DeserializeOwned>(path: &Path, known: u32) -> Result<T> {
    let Versioned { format_version: found } = read_small_json(path)?;
    ensure_version(path, found, known)?;
    read_small_json(path)
}

/// Checks that the version `found` of a file is `known`.
///
/// # Errors
///
/// [`Error::FormatVersion`].
pub fn ensure_version(path: &Path, found: u32, known: u32) -> Result<()> {
    if found == known {
        return Ok(());
    }
    Err(Error::FormatVersion { path: path.to_owned(), found, known })
}
