//! Where a run's buffer spills to.

use std::fs::{self, File};
use std::path::Path;

use ddil_core::{MixerConfig, SpillConfig, StudentPolicy};

use crate::config::DistillConfig;
use crate::error::{Error, Result};
use crate::run_folder::lock;

/// Where it is unless the config says otherwise, in the run's folder.
const FOLDER: &str = "buffer";

/// The settings of the mixer, with a folder for what its buffer spills.
pub(super) fn mixing(config: &DistillConfig, run: &Path) -> MixerConfig {
    let mut mixing = config.mixing.mixer();
    if let Some(spill) = spill(&mut mixing)
        && spill.folder.as_os_str().is_empty()
    {
        spill.folder = run.join(FOLDER);
    }
    mixing
}

/// Takes the folder for this process, as long as what is returned is kept, and clears away what a killed one left there.
pub(super) fn take_folder(config: &DistillConfig, run: &Path) -> Result<Option<File>> {
    let mut mixing = mixing(config, run);
    let Some(spill) = spill(&mut mixing) else { return Ok(None) };
    fs::create_dir_all(&spill.folder).map_err(Error::io("create", &spill.folder))?;
    let lock = lock(&spill.folder)?;
    spill.clear()?;
    Ok(Some(lock))
}

fn spill(mixing: &mut MixerConfig) -> Option<&mut SpillConfig> {
    match &mut mixing.student.policy {
        StudentPolicy::Buffer { buffer, .. } => buffer.spill.as_mut(),
        _ => None,
    }
}
