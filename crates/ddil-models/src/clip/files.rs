//! Folders of transformers networks: which file holds the weights, and the names found in it.

use std::path::{Path, PathBuf};

use tch::Tensor;

use crate::config;
use crate::error::{Error, Result};
use crate::weights::{self, WeightFiles};

pub(super) use crate::config::FILE_NAME as CONFIG_FILE;

/// Constants that older releases saved: the numbers 0, 1, 2 and so on.
const POSITION_IDS: [&str; 3] = [
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "embeddings.position_ids",
];

/// The weights of a folder, of the variant `fp16` where there are no others.
pub(super) fn weights_in(folder: &Path) -> Result<PathBuf> {
    let files = WeightFiles::TRANSFORMERS;
    let half = Some("fp16");
    match files.find(folder) {
        Err(Error::NoWeights { others, .. })
            if others.iter().any(|(_, variant)| variant.as_deref() == half) =>
        {
            WeightFiles { variant: half, ..files }.find(folder)
        }
        found => found,
    }
}

/// Fills `parameters`, which have the names of published files, from a file that has those or shorter ones.
///
/// transformers 5 writes a tower that stands alone without the prefix it has beside a projection; everything else is as
/// [`weights::load_into`].
pub(super) fn load(parameters: Vec<(String, Tensor)>, path: &Path) -> Result<()> {
    weights::load_into(&as_in_file(parameters, path)?.targets, path)
}

/// The tensors of such a file that would fill `parameters`, under the names of these, where they lie in the file.
pub(super) fn read(
    parameters: Vec<(String, Tensor)>,
    path: &Path,
) -> Result<Vec<(String, Tensor)>> {
    let InFile { targets, prefix } = as_in_file(parameters, path)?;
    let read = weights::read_renamed(&targets, path, |_| None)?.into_iter();
    let parameters = read.filter(|(name, _)| !POSITION_IDS.contains(&name.as_str()));
    Ok(parameters.map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect())
}

/// Parameters by the names that a file has for them.
struct InFile {
    /// With constants of the file that are no parameters.
    targets: Vec<(String, Tensor)>,
    /// What the file leaves away.
    prefix: &'static str,
}

fn as_in_file(parameters: Vec<(String, Tensor)>, path: &Path) -> Result<InFile> {
    // The tensors lie in the mapped file: this reads no more than its header.
    let held = weights::read_all(path)?;
    let (mut targets, mut left_away) = (parameters, "");
    for prefix in ["text_model.", "vision_model."] {
        let alone = targets.iter().all(|(name, _)| name.starts_with(prefix));
        if alone && !held.keys().any(|name| name.starts_with(prefix)) {
            for (name, _) in &mut targets {
                name.drain(..prefix.len());
            }
            left_away = prefix;
        }
    }
    for name in POSITION_IDS {
        if let Some(ids) = held.get(name) {
            let unused = ids.f_empty_like().map_err(Error::torch("weights::load_into"))?;
            targets.push((name.to_owned(), unused));
        }
    }
    Ok(InFile { targets, prefix: left_away })
}

/// Writes weights and settings to a folder, which is made if it is not there.
pub(super) fn save(folder: &Path, parameters: &[(String, Tensor)], json: &str) -> Result<()> {
    WeightFiles::TRANSFORMERS.save(parameters, folder)?;
    config::write(&folder.join(CONFIG_FILE), json)
}
