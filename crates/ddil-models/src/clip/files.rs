//! The names in the files of CLIP's weights.

use std::path::Path;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::parameters::Parameters;
use crate::weights;

/// Constants saved by older releases: the numbers 0, 1, 2 and so on.
const POSITION_IDS: [&str; 3] = [
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "embeddings.position_ids",
];

/// Fills `parameters`, which have the names of published files, from a file with these names or shorter ones.
///
/// transformers 5 writes a tower without a projection under names without a prefix. Otherwise as
/// [`weights::load_into`].
pub(super) fn load(parameters: &Parameters, path: &Path) -> Result<()> {
    weights::load_into(&as_in_file(parameters, path)?.targets, path)
}

/// The memory-mapped tensors of such a file that would fill `parameters`, under the names of `parameters`.
pub(super) fn read(parameters: &Parameters, path: &Path) -> Result<Vec<(String, Tensor)>> {
    let InFile { targets, prefix } = as_in_file(parameters, path)?;
    let read = weights::read_renamed(&targets, path, |_| None)?.into_iter();
    let parameters = read.filter(|(name, _)| !POSITION_IDS.contains(&name.as_str()));
    Ok(parameters.map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect())
}

/// Parameters by their names in a file.
struct InFile {
    /// Includes constants of the file that are not parameters.
    targets: Vec<(String, Tensor)>,
    /// The prefix that the file omits.
    prefix: &'static str,
}

fn as_in_file(parameters: &Parameters, path: &Path) -> Result<InFile> {
    // The tensors are memory-mapped: this reads only the header of the file.
    let held = weights::read_all(path)?;
    let (mut targets, mut left_away) = (parameters.named(), "");
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
