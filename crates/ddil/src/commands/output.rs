//! Files that a command writes: checked before any work, so that no result is lost at the end.

use std::path::Path;

use anyhow::ensure;
use ddil_files::{parent, replaceable};

/// File name extensions of weights.
pub(super) const WEIGHTS: [&str; 1] = ["safetensors"];
/// File name extensions of samples: a grid, or the samples as bytes.
pub(super) const SAMPLES: [&str; 2] = ["png", "safetensors"];

/// Checks that a file can be written: its extension is that of a format that is written, its folder exists, and nothing
/// is there but a regular file that may be overwritten. A link counts as the file that it leads to.
pub(super) fn ensure_writable(path: &Path, force: bool, extensions: &[&str]) -> anyhow::Result<()> {
    let shown = path.display();
    ensure!(!path.is_dir(), "the output {shown} is a folder; expected a file name");
    let target = replaceable(path)?;
    let extension = path.extension().and_then(|end| end.to_str()).unwrap_or_default();
    let expected = extensions.iter().map(|end| format!(".{end}")).collect::<Vec<_>>().join(" or ");
    ensure!(
        extensions.iter().any(|known| extension.eq_ignore_ascii_case(known)),
        "the output {shown} does not end in {expected}, the formats that are written; choose such a name"
    );
    ensure!(
        parent(&target).is_dir(),
        "the folder of the output {shown} does not exist; create it first"
    );
    ensure!(force || !target.exists(), "{shown} already exists; --force overwrites it");
    Ok(())
}
