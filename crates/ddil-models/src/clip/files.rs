//! Folders of transformers networks: which file holds the weights, and the names found in it.

use std::fs;
use std::path::{Path, PathBuf};

use tch::Tensor;

use crate::error::{Error, Result};
use crate::weights::{self, write_error, write_whole};

pub(super) const CONFIG_FILE: &str = "config.json";
/// Where transformers keeps weights, the first that is there counts. The last two are found to be refused with a reason.
const WEIGHT_FILES: [&str; 6] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "pytorch_model.fp16.bin",
];

/// Constants that older releases saved: the numbers 0, 1, 2 and so on.
const POSITION_IDS: [&str; 3] = [
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "embeddings.position_ids",
];

pub(super) fn weights_in(folder: &Path) -> Result<PathBuf> {
    let mut files = WEIGHT_FILES.iter().map(|file| folder.join(file));
    files
        .find(|path| path.exists())
        .ok_or_else(|| Error::NoWeights { path: folder.into(), expected: &WEIGHT_FILES[..4] })
}

/// Fills `parameters`, which have the names of published files, from a file that has those or shorter ones.
///
/// transformers 5 writes a tower that stands alone without the prefix it has beside a projection; everything else is as
/// [`weights::load_into`].
pub(super) fn load(parameters: Vec<(String, Tensor)>, path: &Path) -> Result<()> {
    // The tensors lie in the mapped file: this reads no more than its header.
    let held = weights::read_all(path)?;
    let mut targets = parameters;
    for prefix in ["text_model.", "vision_model."] {
        let alone = targets.iter().all(|(name, _)| name.starts_with(prefix));
        if alone && !held.keys().any(|name| name.starts_with(prefix)) {
            for (name, _) in &mut targets {
                name.drain(..prefix.len());
            }
        }
    }
    for name in POSITION_IDS {
        if let Some(ids) = held.get(name) {
            let unused = ids.f_empty_like().map_err(Error::torch("weights::load_into"))?;
            targets.push((name.to_owned(), unused));
        }
    }
    weights::load_into(&targets, path)
}

/// Writes weights and settings to a folder, which is made if it is not there.
pub(super) fn save(folder: &Path, parameters: &[(String, Tensor)], config: &str) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| write_error(folder, e))?;
    weights::save(parameters, folder.join(WEIGHT_FILES[0]), &std::collections::BTreeMap::new())?;
    let path = folder.join(CONFIG_FILE);
    write_whole(&path, |file| {
        use std::io::Write as _;
        file.write_all(config.as_bytes()).map_err(|e| write_error(&path, e))
    })
}
