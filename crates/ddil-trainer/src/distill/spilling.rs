//! The spill folder of a run's buffer.

use std::fs::{self, File};
use std::path::Path;

use ddil_core::{MixerConfig, SpillConfig, StudentPolicy};

use crate::config::DistillConfig;
use crate::error::{Error, Result};
use crate::run_folder::lock;

/// Default name, in the run's folder.
const FOLDER: &str = "buffer";

/// The mixer's settings, with a folder for spilled rows.
pub(super) fn mixing(config: &DistillConfig, run: &Path) -> MixerConfig {
    let mut mixing = config.mixing.mixer();
    if let Some(spill) = spill(&mut mixing)
        && spill.folder.as_os_str().is_empty()
    {
        spill.folder = run.join(FOLDER);
    }
    mixing
}

/// Locks the folder for this process while the returned file is open, and removes what a killed process left there.
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
