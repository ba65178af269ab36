//! Files of a model as diffusers' pipelines read them: with the corrections that a pipeline makes to old ones.

use std::path::Path;

use ddil_files::JsonSettings;
use ddil_models::weights::WeightFiles;
use ddil_models::{
    AutoencoderKL, AutoencoderKLConfig, ModelConfig, NetworkConfig, Placement, UnknownKeys,
};
use ddil_schedulers::{SchedulerConfig, SchedulerFile, SolverConfig, TimestepSpacing};
use serde_json::{Value, json};

use super::card::Card;
use super::index::PipelineClass;
use crate::error::Result;
use crate::notes::warn_once;

/// The folder of the autoencoder.
pub(super) const VAE: &str = "vae";

/// The release of diffusers that wrote the right `sample_size` of Stable Diffusion.
const FIXED_IN: [u32; 2] = [0, 9];
/// The right one.
const SAMPLE_SIZE: u32 = 64;

/// The scheduler of a model.
#[derive(Clone, Debug)]
pub(super) struct PublishedScheduler {
    file: SchedulerFile,
    /// The corrections, each as a sentence without a subject.
    corrections: Vec<String>,
}

impl PublishedScheduler {
    /// Reads a file for a pipeline of `class`, whose index names the scheduler's class `named`.
    ///
    /// As diffusers' `StableDiffusionPipeline` does in its constructor, the settings `clip_sample` and `steps_offset` of
    /// files of 2022 are corrected: latents have no range, and its timesteps of leading spacing begin at 1. The settings
    /// of a student stay: it was trained with them.
    pub(super) fn read(
        path: &Path,
        class: Option<PipelineClass>,
        named: Option<&str>,
        card: Option<&Card>,
    ) -> Result<Self> {
        let mut file = SchedulerFile::from_file(path)?;
        let keys = file.settings_mut().object_mut();
        if let Some(named) = named {
            keys.entry(JsonSettings::CLASS).or_insert_with(|| named.into());
        }
        let unknown = backquoted(&file.unknown_keys());
        let mut published = Self { file, corrections: Vec::new() };
        let is_student = card.is_some_and(|card| card.is_student() || card.thresholding.is_some());
        if class == Some(PipelineClass::StableDiffusion) && !is_student {
            published.correct()?;
        }
        if !unknown.is_empty() {
            let (path, class) = (path.display(), published.class());
            warn_once(&format!("{path}: {class} has no {unknown}; ignored, as in diffusers"));
        }
        for correction in &published.corrections {
            let class = PipelineClass::StableDiffusion.as_str();
            warn_once(&format!("{}: {correction}, as in diffusers' {class}", path.display()));
        }
        Ok(published)
    }

    fn correct(&mut self) -> Result<()> {
        let config = self.file.config()?;
        let common = config.common();
        if common.ddil_timesteps.is_some() {
            return Ok(());
        }
        let keys = self.file.settings_mut().object_mut();
        if common.clip_sample {
            let found = if keys.contains_key("clip_sample") { "true" } else { "absent" };
            self.corrections.push(format!("`clip_sample` is {found}; false is used"));
            keys.insert("clip_sample".to_owned(), json!(false));
        }
        if common.steps_offset != 1 {
            let found = keys.get("steps_offset").map_or("absent".to_owned(), Value::to_string);
            // The other spacings do not use it.
            if common.timestep_spacing == TimestepSpacing::Leading {
                self.corrections.push(format!("`steps_offset` is {found}; 1 is used"));
            }
            keys.insert("steps_offset".to_owned(), json!(1));
        }
        Ok(())
    }

    /// The class in the file; empty if it has none.
    pub(super) fn class(&self) -> String {
        let class = self.file.settings().object().get(JsonSettings::CLASS);
        class.and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// The scheduler, with DDIM in place of another solver.
    pub(super) fn config(&self) -> Result<SchedulerConfig> {
        Ok(self.file.config()?)
    }

    /// The class of a solver that DDIM replaces.
    pub(super) fn replaced_solver(&self) -> Option<&'static str> {
        self.file.replaced_solver()
    }

    /// The solver, if its class is one of [`SolverConfig`]'s.
    pub(super) fn solver(&self) -> ddil_schedulers::Result<Option<SolverConfig>> {
        self.file.solver()
    }

    /// The corrected text of the file; `None` if it stays as it is.
    pub(super) fn corrected(&self) -> Option<String> {
        (!self.corrections.is_empty()).then(|| self.file.settings().to_string())
    }
}

/// The config of the network of a pipeline of `class`.
///
/// Keys of networks of other classes and of the moving average in diffusers' training scripts are ignored. As diffusers'
/// `StableDiffusionPipeline` does, a `sample_size` below 64 of a file before release 0.9 is corrected to 64.
pub(super) fn network_config(path: &Path, class: PipelineClass) -> Result<ModelConfig> {
    let config = ModelConfig::from_file(path, UnknownKeys::IgnoreForeign)?;
    let foreign = ModelConfig::foreign_keys(path)?;
    if !foreign.is_empty() {
        let (path, class, keys) = (path.display(), config.class_name(), backquoted(&foreign));
        warn_once(&format!("{path}: {class} has no {keys}; ignored, as in diffusers"));
    }
    if class != PipelineClass::StableDiffusion {
        return Ok(config);
    }
    let file = JsonSettings::from_file(path)?;
    let release = file.object().get("_diffusers_version").and_then(Value::as_str).and_then(release);
    match file.object().get("sample_size").and_then(Value::as_u64) {
        Some(side)
            if side < SAMPLE_SIZE.into() && release.is_some_and(|found| found < FIXED_IN) =>
        {
            warn_once(&format!(
                "{}: `sample_size` is {side}; {SAMPLE_SIZE} is used, as in diffusers' {}",
                path.display(),
                class.as_str()
            ));
            Ok(config.with_sample_size([SAMPLE_SIZE; 2])?)
        }
        _ => Ok(config),
    }
}

/// The autoencoder's config in the folder of a pipeline of `class`, with the settings that the pipeline applies.
///
/// diffusers' pipelines apply `scaling_factor` to latents; that of Stable Diffusion XL `latents_mean` and `latents_std`
/// too, and none of them `shift_factor`.
pub(super) fn autoencoder_config(
    folder: &Path,
    class: PipelineClass,
) -> Result<AutoencoderKLConfig> {
    let path = folder.join(VAE).join("config.json");
    let mut config = AutoencoderKLConfig::from_file(&path, UnknownKeys::IgnoreForeign)?;
    let is_xl = class == PipelineClass::StableDiffusionXl;
    let has_statistics = config.latents_mean.is_some() && !is_xl;
    let unused = [
        ("shift_factor", config.shift_factor.is_some()),
        ("latents_mean", has_statistics),
        ("latents_std", has_statistics),
    ];
    let unused: Vec<&str> =
        unused.into_iter().filter_map(|(key, set)| set.then_some(key)).collect();
    if !unused.is_empty() {
        let (path, keys) = (path.display(), backquoted(&unused));
        warn_once(&format!(
            "{path}: not applied to latents, as in diffusers' {}: {keys}",
            class.as_str()
        ));
    }
    config.shift_factor = None;
    if !is_xl {
        (config.latents_mean, config.latents_std) = (None, None);
    }
    Ok(config)
}

/// The frozen autoencoder of a pipeline of `class`.
pub(super) fn autoencoder(
    folder: &Path,
    class: PipelineClass,
    placement: Placement,
) -> Result<AutoencoderKL> {
    let config = autoencoder_config(folder, class)?;
    let (file, _) = WeightFiles::DIFFUSION.find_any(folder.join(VAE))?;
    let vae = config.build_from(placement, file)?;
    vae.parameters().set_trainable(false);
    Ok(vae)
}

/// The first two numbers of a version.
fn release(version: &str) -> Option<[u32; 2]> {
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some([numbers.next()??, numbers.next()??])
}

fn backquoted<T: AsRef<str>>(names: &[T]) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("`{}`", name.as_ref())).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let is_old = |version| release(version).is_some_and(|found| found < FIXED_IN);
        for version in ["0.6.0", "0.8.1", "0.7.0.dev0"] {
            assert!(is_old(version), "{version}");
        }
        for version in ["0.9.0.dev0", "0.10.2", "0.42.1", "1.0", "", "new"] {
            assert!(!is_old(version), "{version}");
        }
    }
}
