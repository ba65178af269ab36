//! Folders of transformers networks: settings and weights.

use std::path::Path;

use crate::config::{FILE_NAME, NetworkConfig, UnknownKeys};
use crate::error::Result;
use crate::parameters::{Parameters, Placement};
use crate::weights::{self, WeightFiles};

/// Builds the network of a folder.
pub(crate) fn open<C: NetworkConfig>(
    folder: &Path,
    placement: Placement,
    unknown_keys: UnknownKeys,
) -> Result<C::Network> {
    let config = C::from_file(folder.join(FILE_NAME), unknown_keys)?;
    config.build_from(placement, WeightFiles::of_transformers(folder)?)
}

/// Writes weights and settings to a folder, creating it if needed.
pub(crate) fn save(
    folder: &Path,
    parameters: &Parameters,
    config: &impl NetworkConfig,
) -> Result<()> {
    WeightFiles::TRANSFORMERS.save(&parameters.named(), folder)?;
    weights::write_text(&folder.join(FILE_NAME), &config.to_json())
}
