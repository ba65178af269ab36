//! The saved state of a part of a run.

use std::fs;
use std::path::{Component, Path, PathBuf};

use ddil_files::{ensure_version, read_json, write_json};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result};

/// Named tensors and JSON: the state of a mixer, a source or a buffer.
///
/// Restoring leaves tensors on their device. [`write`](Self::write) and [`from_folder`](Self::from_folder) keep a state in a separate
/// folder; a training loop with its own checkpoints may store the parts in those.
///
/// # Example
///
/// ```
/// use ddil_core::{Mixer, MixerConfig, SavedState};
/// use ddil_schedulers::{Ddim, NoiseScheduleConfig, TimestepSpacing, Timesteps};
///
/// # let folder = std::env::temp_dir().join(format!("ddil-saved-{}", std::process::id()));
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// let mut mixer = Mixer::new(MixerConfig::default(), grid, Box::new(Ddim::new(schedule)))?;
/// mixer.save()?.write(&folder)?;
/// mixer.restore(&SavedState::from_folder(&folder)?)?;
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok::<(), ddil_core::Error>(())
/// ```
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct SavedState {
    /// Tensors with unique names, copied when the state was saved.
    pub tensors: Vec<(String, Tensor)>,
    /// Everything else.
    pub metadata: serde_json::Value,
    /// Files on disk; only a buffer that has spilled has any.
    pub files: Vec<SavedFile>,
}

/// A file that the saved state refers to, rather than a copy of its contents.
///
/// It is the file in use: its first `bytes` bytes will not change, but more may be appended, and its name is removed
/// once its states are no longer needed. To restore later, give it another name before the next insertion into the
/// buffer: a hard link is enough and takes no time; a copy works too. With links, a saved state takes only the disk
/// space of the files that the buffer has dropped since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedFile {
    /// Its name in the saved state, a plain file name.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
    /// Number of its bytes that belong to the saved state.
    pub bytes: u64,
    /// Their CRC-32, as zlib computes it.
    pub crc32: u32,
}

/// Version of the layout of the folder that [`SavedState::write`] creates.
const FORMAT_VERSION: u32 = 1;
const TENSORS: &str = "state.safetensors";
/// Written last: a folder without it is incomplete.
const STATE: &str = "state.json";

/// What `state.json` contains.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format_version: u32,
    metadata: serde_json::Value,
    /// The files in the folder.
    files: Vec<WrittenFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenFile {
    name: String,
    bytes: u64,
    crc32: u32,
}

impl SavedState {
    /// The parts of a state that was saved elsewhere, without files.
    pub fn new(tensors: Vec<(String, Tensor)>, metadata: serde_json::Value) -> Self {
        Self { tensors, metadata, files: Vec::new() }
    }

    /// Writes everything to a new folder: `state.safetensors`, `state.json` and, for a buffer that has spilled, links
    /// to its files, or copies on another file system.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the folder exists or cannot be written, [`Error::Torch`] for a tensor that cannot be written,
    /// [`Error::Files`] for JSON that cannot be written.
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir(folder).map_err(Error::io("create", folder))?;
        Tensor::write_safetensors(&self.tensors, folder.join(TENSORS))
            .map_err(Error::torch("SavedState::write"))?;
        for file in &self.files {
            file.link_to(&folder.join(&file.name))?;
        }
        let written = |file: &SavedFile| {
            let SavedFile { name, bytes, crc32, .. } = file.clone();
            WrittenFile { name, bytes, crc32 }
        };
        let state = Written {
            format_version: FORMAT_VERSION,
            metadata: self.metadata.clone(),
            files: self.files.iter().map(written).collect(),
        };
        Ok(write_json(&folder.join(STATE), &state)?)
    }

    /// Reads what [`write`](Self::write) wrote, tensors on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] for JSON that is missing, damaged or of a later version; [`Error::Torch`] for damaged tensors;
    /// [`Error::Restore`] for a file outside of the folder. Spilled files are checked when a buffer is restored.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(STATE);
        let Written { format_version, metadata, files } = read_json(&path)?;
        ensure_version(&path, format_version, FORMAT_VERSION)?;
        let tensors = Tensor::read_safetensors(folder.join(TENSORS))
            .map_err(Error::torch("SavedState::from_folder"))?;
        let file = |WrittenFile { name, bytes, crc32 }: WrittenFile| {
            let mut parts = Path::new(&name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                let problem =
                    format!("`{name}` in {STATE} is not the name of a file in its folder");
                return Err(Error::Restore { what: "state", problem });
            }
            Ok(SavedFile { path: folder.join(&name), name, bytes, crc32 })
        };
        Ok(Self { tensors, metadata, files: files.into_iter().map(file).collect::<Result<_>>()? })
    }

    pub(crate) fn serialized(
        what: &'static str,
        tensors: Vec<(String, Tensor)>,
        metadata: &impl Serialize,
    ) -> Result<Self> {
        let metadata = serde_json::to_value(metadata)
            .map_err(|e| Error::Restore { what, problem: e.to_string() })?;
        Ok(Self { tensors, metadata, files: vec![] })
    }

    /// The same with files, for a buffer that has spilled.
    #[must_use]
    pub fn with_files(self, files: Vec<SavedFile>) -> Self {
        Self { files, ..self }
    }

    /// Deserializes the metadata.
    pub(crate) fn metadata<M: DeserializeOwned>(&self, what: &'static str) -> Result<M> {
        M::deserialize(&self.metadata).map_err(|e| {
            let problem = format!("metadata: {}", ddil_files::in_json_terms(e));
            Error::Restore { what, problem }
        })
    }

    /// The tensors, with a prefix added to their names.
    pub(crate) fn prefixed(self, prefix: &str) -> impl Iterator<Item = (String, Tensor)> + use<> {
        let prefix = prefix.to_owned();
        self.tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
    }

    /// The files, with a prefix added to their names.
    pub(crate) fn prefixed_files(&self, prefix: &str) -> impl Iterator<Item = SavedFile> {
        let files = self.files.iter();
        files.map(move |f| SavedFile { name: format!("{prefix}.{}", f.name), ..f.clone() })
    }

    /// The tensors and files whose names begin with a prefix, without it, and a part of the metadata.
    pub(crate) fn part(&self, prefix: &str, metadata: &serde_json::Value) -> Self {
        let strip = |name: &str| Some(name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned());
        let tensors = self
            .tensors
            .iter()
            .filter_map(|(name, tensor)| Some((strip(name)?, tensor.shallow_clone())))
            .collect();
        let named = |file: &SavedFile| Some(SavedFile { name: strip(&file.name)?, ..file.clone() });
        let files = self.files.iter().filter_map(named).collect();
        Self { tensors, metadata: metadata.clone(), files }
    }
}
