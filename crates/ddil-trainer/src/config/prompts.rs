//! The `prompts` table of a distillation config.

use std::collections::BTreeSet;
use std::path::PathBuf;

use ddil_data::Captions;
use serde::{Deserialize, Serialize};

use super::{DataSection, ensure};
use crate::error::Result;

/// What backward trajectories are conditioned on: those of the student, of the teacher, and mixed ones.
///
/// Noised dataset samples keep their own label or caption. Pure noise is the first state of a trajectory: with other
/// prompts than the data's it is conditioned on these, also where it takes the place of a sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptsSection {
    /// Where labels or prompts come from; default `data`.
    pub source: PromptSource,
    /// With `classes`: names of the teacher's classes, or their numbers if it has no names; default all classes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// With `classes`: how often each class is drawn relative to the others, in the order of `classes` or, without it,
    /// of the teacher's; default equally often.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f64>,
    /// With `file`: the file, see [`read_prompts`](ddil_data::read_prompts).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// With `file`: which captions of an image are used, `first` or `all`; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captions: Option<Captions>,
    /// With `file`: folder for the encoded prompts; default beside `data.cache`, or a folder in the user's cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
}

/// Where the labels or prompts of backward trajectories come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptSource {
    /// The labels or prompts of the batch, in another order: each is as frequent as in the data.
    #[default]
    Data,
    /// The teacher's classes, for a teacher with classes.
    Classes,
    /// A file of prompts, for a text-to-image teacher.
    File,
}

impl PromptSource {
    /// The name used in config files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Classes => "classes",
            Self::File => "file",
        }
    }
}

impl PromptsSection {
    pub(super) fn ensure(&self, data: &DataSection) -> Result<()> {
        let source = self.source;
        let keys = [
            ("prompts.classes", !self.classes.is_empty(), PromptSource::Classes),
            ("prompts.weights", !self.weights.is_empty(), PromptSource::Classes),
            ("prompts.path", self.path.is_some(), PromptSource::File),
            ("prompts.captions", self.captions.is_some(), PromptSource::File),
            ("prompts.cache", self.cache.is_some(), PromptSource::File),
        ];
        for (key, is_set, of) in keys {
            let (source_name, of_name) = (source.as_str(), of.as_str());
            let expected = format!(
                "no value with prompts.source = {source_name:?}: it belongs to prompts.source = {of_name:?}"
            );
            ensure(key, "set", !is_set || source == of, &expected)?;
        }
        let has_path = source != PromptSource::File || self.path.is_some();
        ensure("prompts.path", "not set", has_path, "a file of prompts")?;
        self.ensure_classes()?;
        self.ensure_cache(data)
    }

    fn ensure_classes(&self) -> Result<()> {
        let Self { classes, weights, .. } = self;
        let mut seen = BTreeSet::new();
        let twice = classes.iter().find(|class| !seen.insert(*class));
        ensure(
            "prompts.classes",
            format!("{:?} twice", twice.map_or("", |name| name)),
            twice.is_none(),
            "each class once; prompts.weights sets how often it is drawn",
        )?;
        if weights.is_empty() {
            return Ok(());
        }
        let shown = format!("{weights:?}");
        let sum: f64 = weights.iter().sum();
        let possible = weights.iter().all(|weight| *weight >= 0.0) && sum > 0.0 && sum.is_finite();
        ensure("prompts.weights", &shown, possible, "finite, at least 0, and not all 0")?;
        let fits = classes.is_empty() || classes.len() == weights.len();
        let expected = format!("{} weights, one for each of prompts.classes", classes.len());
        ensure("prompts.weights", &shown, fits, &expected)
    }

    /// Two caches in one folder would replace each other.
    fn ensure_cache(&self, data: &DataSection) -> Result<()> {
        let Some(cache) = &self.cache else { return Ok(()) };
        let shown = cache.display();
        let named = cache.file_name().is_some();
        ensure("prompts.cache", "a path without a folder name", named, "the path of a folder")?;
        for (key, other) in [("data.cache", &data.cache), ("data.path", &data.path)] {
            let differs = other.as_ref() != Some(cache);
            let expected = format!("another folder than {key}");
            ensure("prompts.cache", &shown, differs, &expected)?;
        }
        Ok(())
    }
}
