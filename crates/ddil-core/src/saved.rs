//! What a part of a run is saved as.

use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::Tensor;

use crate::error::{Error, Result};

/// Named tensors and what else there is to know, to be written to a safetensors file with JSON beside it.
///
/// Restoring takes tensors where they are: put them on the device that they shall live on.
#[derive(Debug, Default)]
pub struct SavedState {
    /// Tensors with names that are unique, copies of what was saved.
    pub tensors: Vec<(String, Tensor)>,
    /// Everything else.
    pub metadata: serde_json::Value,
    /// What lies in files already; none but of a buffer that has spilled.
    pub files: Vec<SavedFile>,
}

/// A file that what was saved refers to, rather than a copy of what is in it.
///
/// It is the very file that is in use: its first `bytes` bytes will not change, but more may come behind them, and its
/// name is removed once its states are not wanted any more. Who wants to restore later gives it another name before the
/// next state is put into the buffer: a hard link is enough and takes no time, and a copy does as well. With links, what
/// a saved state costs on disk is what the buffer has let go since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedFile {
    /// What it is called in what was saved, a plain file name.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// How many of its bytes belong to what was saved.
    pub bytes: u64,
    /// Their CRC-32, as zlib computes it.
    pub crc32: u32,
}

impl SavedState {
    pub(crate) fn new(
        what: &'static str,
        tensors: Vec<(String, Tensor)>,
        metadata: &impl Serialize,
    ) -> Result<Self> {
        let metadata = serde_json::to_value(metadata)
            .map_err(|e| Error::Restore { what, problem: e.to_string() })?;
        Ok(Self { tensors, metadata, files: vec![] })
    }

    /// The same with files.
    pub(crate) fn with_files(self, files: Vec<SavedFile>) -> Self {
        Self { files, ..self }
    }

    /// Reads the metadata as what wrote them.
    pub(crate) fn metadata<M: DeserializeOwned>(&self, what: &'static str) -> Result<M> {
        M::deserialize(&self.metadata)
            .map_err(|e| Error::Restore { what, problem: format!("metadata: {e}") })
    }

    /// The tensors as they are called under a prefix.
    pub(crate) fn prefixed(self, prefix: &str) -> impl Iterator<Item = (String, Tensor)> {
        let prefix = prefix.to_owned();
        self.tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
    }

    /// The files as they are called under a prefix.
    pub(crate) fn prefixed_files(&self, prefix: &str) -> impl Iterator<Item = SavedFile> {
        let files = self.files.iter();
        files.map(move |f| SavedFile { name: format!("{prefix}.{}", f.name), ..f.clone() })
    }

    /// The part of tensors and files whose names begin with a prefix, without it, and a part of the metadata.
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
