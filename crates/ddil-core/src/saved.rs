//! What a part of a run is saved as.

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
}

impl SavedState {
    pub(crate) fn new(
        what: &'static str,
        tensors: Vec<(String, Tensor)>,
        metadata: &impl Serialize,
    ) -> Result<Self> {
        let metadata = serde_json::to_value(metadata)
            .map_err(|e| Error::Restore { what, problem: e.to_string() })?;
        Ok(Self { tensors, metadata })
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

    /// The part of the tensors whose names begin with a prefix, without it, and a part of the metadata.
    pub(crate) fn part(&self, prefix: &str, metadata: &serde_json::Value) -> Self {
        let strip = |name: &str| Some(name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned());
        let tensors = self
            .tensors
            .iter()
            .filter_map(|(name, tensor)| Some((strip(name)?, tensor.shallow_clone())))
            .collect();
        Self { tensors, metadata: metadata.clone() }
    }
}
