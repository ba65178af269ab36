//! What a run is, from its config, and how that differs from the nearest preset.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ddil_core::{PriorSchedule, Priors};
use ddil_files::settings::Settings;
use ddil_losses::{ObjectiveConfig, TeacherGuidance};
use ddil_trainer::config::{DataSection, DistillConfig, TrainConfig};
use serde::Serialize;
use toml::Value;

use crate::error::Result;
use crate::presets::{PRESETS, verb_of};

/// The config of a run of either verb.
#[derive(Clone, Debug)]
pub(crate) enum RunConfig {
    /// Of `ddil train`.
    Train(Box<TrainConfig>),
    /// Of `ddil distill`.
    Distill(Box<DistillConfig>),
}

/// A config next to the preset that it differs least from.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct BesidePreset {
    /// The preset's name; none if no preset is for the verb.
    preset: Option<&'static str>,
    /// Number of settings that differ.
    num_differences: usize,
    /// Every setting, in order of the keys.
    settings: Vec<Setting>,
}

/// A setting in two configs.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Setting {
    key: String,
    /// As TOML; none if it is not set.
    here: Option<String>,
    preset: Option<String>,
    differs: bool,
}

/// Keys that every run sets itself, which are no differences.
const OWN: [&str; 2] = ["run.name", "run.folder"];

impl RunConfig {
    /// Reads a run's `config.toml`.
    ///
    /// # Errors
    ///
    /// Errors of the file system; settings that this version does not know.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let settings = Settings::from_file(path)?;
        Ok(match verb_of(&settings) {
            Some(("distill", _)) => Self::Distill(Box::new(settings.build()?)),
            _ => Self::Train(Box::new(settings.build()?)),
        })
    }

    /// The verb that runs it.
    pub(crate) fn verb(&self) -> &'static str {
        match self {
            Self::Train(_) => "train",
            Self::Distill(_) => "distill",
        }
    }

    /// Number of updates in all.
    pub(crate) fn total_updates(&self) -> u64 {
        match self {
            Self::Train(config) => config.train.updates,
            Self::Distill(config) => config.total_updates(),
        }
    }

    /// What the run does, in a sentence.
    pub(super) fn in_words(&self) -> String {
        match self {
            Self::Train(config) => format!(
                "Trains a diffusion model on {}: {} updates of batch {}.",
                data(&config.data),
                config.train.updates,
                config.data.batch_size
            ),
            Self::Distill(config) => distillation(config),
        }
    }

    /// The settings next to those of the nearest preset.
    pub(super) fn beside_preset(&self) -> BesidePreset {
        let here = self.leaves();
        let of_verb = PRESETS.iter().filter(|preset| preset.verb == self.verb());
        let beside = of_verb.filter_map(|preset| {
            let settings = Settings::parse(preset.name, preset.text).ok()?;
            let there = match self {
                Self::Train(_) => Self::Train(Box::new(settings.build().ok()?)),
                Self::Distill(_) => Self::Distill(Box::new(settings.build().ok()?)),
            };
            Some(BesidePreset::of(Some(preset.name), &here, &there.leaves()))
        });
        let nearest = beside.min_by_key(|beside| beside.num_differences);
        nearest.unwrap_or_else(|| BesidePreset::of(None, &here, &BTreeMap::new()))
    }

    /// Every value that is no table, under its full key.
    fn leaves(&self) -> BTreeMap<String, String> {
        let value = match self {
            Self::Train(config) => Value::try_from(config),
            Self::Distill(config) => Value::try_from(config),
        };
        let mut leaves = BTreeMap::new();
        // A config that was read can be written.
        if let Ok(value) = value {
            add_leaves("", &value, &mut leaves);
        }
        leaves
    }
}

impl BesidePreset {
    fn of(
        preset: Option<&'static str>,
        here: &BTreeMap<String, String>,
        there: &BTreeMap<String, String>,
    ) -> Self {
        let keys: BTreeSet<&String> = here.keys().chain(there.keys()).collect();
        let setting = |key: &String| {
            let (own, other) = (here.get(key).cloned(), there.get(key).cloned());
            let differs = preset.is_some() && own != other && !OWN.contains(&key.as_str());
            Setting { key: key.clone(), here: own, preset: other, differs }
        };
        let settings: Vec<Setting> = keys.into_iter().map(setting).collect();
        let num_differences = settings.iter().filter(|setting| setting.differs).count();
        Self { preset, num_differences, settings }
    }
}

fn add_leaves(key: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                add_leaves(&key, value, leaves);
            }
        }
        other => {
            leaves.insert(key.to_owned(), other.to_string());
        }
    }
}

fn distillation(config: &DistillConfig) -> String {
    let guidance = match config.teacher.guidance {
        TeacherGuidance::Cfg { scale } => format!(" (guidance {scale})"),
        TeacherGuidance::CfgRange { min, max } | TeacherGuidance::Embedded { min, max } => {
            format!(" (guidance {} to {})", 1.0 + min, 1.0 + max)
        }
        TeacherGuidance::BakedIn => String::new(),
    };
    let method = match config.objective {
        ObjectiveConfig::Progressive(_) => "progressive distillation (PD)",
        ObjectiveConfig::Lcm(_) => "latent consistency distillation (LCM)",
        ObjectiveConfig::Dmd2(_) => "distribution matching distillation (DMD2)",
    };
    format!(
        "Distils {}{guidance} into {} by {method} {}, on {}: {} updates of batch {}.",
        config.teacher.path.display(),
        student(&config.student.stages),
        sources(&config.mixing.priors),
        data(&config.data),
        config.total_updates(),
        config.data.batch_size
    )
}

fn student(stages: &[u32]) -> String {
    let stages: Vec<String> = stages.iter().map(ToString::to_string).collect();
    format!("a student of {} steps", stages.join(", then "))
}

fn sources(priors: &PriorSchedule) -> String {
    if *priors == PriorSchedule::constant(Priors::FORWARD_ONLY) {
        return "on noised data alone".to_owned();
    }
    let last = priors.at(1.0);
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    format!(
        "with DDIL (states at the end: {} noised data, {} the student's, {} the teacher's)",
        percent(last.forward()),
        percent(last.student()),
        percent(last.teacher())
    )
}

fn data(data: &DataSection) -> String {
    let name = match &data.path {
        Some(path) => path.display().to_string(),
        None => data.kind.as_str().to_owned(),
    };
    match data.resolution {
        Some(side) => format!("{name} at {side}x{side}"),
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(preset: &str, changes: &[&str]) -> RunConfig {
        let preset = crate::presets::find(preset).expect("there is such a preset");
        let mut settings = Settings::parse(preset.name, preset.text).expect("it is TOML");
        for change in changes {
            settings.set(change).expect("there is such a key");
        }
        RunConfig::Distill(Box::new(settings.build().expect("it is valid")))
    }

    #[test]
    fn a_config_is_shown_beside_the_preset_that_it_came_from() {
        for preset in PRESETS.iter().filter(|preset| preset.verb == "distill") {
            let changes = ["run.name=\"other\"", "run.folder=\"elsewhere\"", "run.seed=77"];
            let found = config(preset.name, &changes).beside_preset();
            assert_eq!((found.preset, found.num_differences), (Some(preset.name), 1));
            let different: Vec<&Setting> = found.settings.iter().filter(|s| s.differs).collect();
            assert_eq!(different[0].key, "run.seed");
            assert_eq!(different[0].here.as_deref(), Some("77"));
        }
    }

    #[test]
    fn a_run_is_one_sentence() {
        let found = config("fashion-mnist-pd-ddil", &[]).in_words();
        for words in ["guidance 3", "a student of 4 steps", "(PD) with DDIL", "on fashion_mnist"] {
            assert!(found.contains(words), "{words}: {found}");
        }
        let plain = config("fashion-mnist-pd-ddil", &crate::presets::PLAIN).in_words();
        assert!(plain.contains("(PD) on noised data alone"), "{plain}");
    }
}
