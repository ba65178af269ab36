//! The `[evaluate]` table: how the moving average is evaluated during a run.

use std::path::PathBuf;

use ddil_evaluate::{ExtractorChoice, MIN_SAMPLES};
use serde::{Deserialize, Serialize};

use super::{DataKind, DataSection, OutputSection, ensure};
use crate::error::Result;

/// How the moving average is evaluated during a run. Keys mean the same as in the `[evaluate]` table of a comparison.
///
/// Samples and features have random streams of their own: the weights of a run with and without evaluation are equal bit
/// for bit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateSection {
    /// Updates between two evaluations; the last update is evaluated too. 0, the default, evaluates never.
    pub interval: u64,
    /// Samples per evaluation; default 5000.
    pub samples: u32,
    /// Number of sampling steps; default the student's own, or `train.sample_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u32>,
    /// Samples per network call; default 100, and at most 4 for a text-to-image student.
    pub batch_size: u32,
    /// Seed of the noise; default 0.
    pub seed: u64,
    /// The features to compare: `fashion_classifier` (the default), `raw_pixels`, or a TorchScript file.
    pub extractor: String,
    /// How images are converted for a TorchScript file, as for `ddil evaluate --extractor-input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extractor_input: Option<String>,
    /// Whether `true` is passed to a TorchScript file as a second argument.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub return_features: bool,
    /// The images to compare with, as for `ddil evaluate --reference`: a folder of images, `fashion_mnist`, or a file of
    /// statistics. The default is the data's held-out images, or all of its images if there are none, also
    /// those that `exclude_classes` and `max_samples` leave out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
}

impl Default for EvaluateSection {
    fn default() -> Self {
        Self {
            interval: 0,
            samples: 5000,
            steps: None,
            batch_size: 100,
            seed: 0,
            extractor: "fashion_classifier".to_owned(),
            extractor_input: None,
            return_features: false,
            reference: None,
        }
    }
}

impl EvaluateSection {
    /// Whether this is the default table, which a config need not contain.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The extractor of features.
    pub fn extractor(&self) -> ExtractorChoice {
        ExtractorChoice::new(&self.extractor)
            .with_input(self.extractor_input.clone())
            .with_return_features(self.return_features)
    }

    /// Whether the model is evaluated after `step` updates.
    pub(crate) fn is_due(&self, step: u64, total: u64) -> bool {
        self.interval > 0 && (step == total || step.is_multiple_of(self.interval))
    }

    /// Checks the table against the others.
    pub(super) fn ensure(&self, data: &DataSection, output: &OutputSection) -> Result<()> {
        if let Some(metric) = output.checkpoints.keep_best {
            let expected = "no value with evaluate.interval = 0: nothing is evaluated";
            let is_known = self.interval > 0;
            ensure("output.checkpoints.keep_best", metric.as_str(), is_known, expected)?;
        }
        if self.interval == 0 {
            return Ok(());
        }
        let expected = format!("at least {MIN_SAMPLES}");
        ensure("evaluate.samples", self.samples, self.samples >= MIN_SAMPLES, &expected)?;
        ensure("evaluate.batch_size", self.batch_size, self.batch_size > 0, "at least 1")?;
        let steps = self.steps.unwrap_or(1);
        ensure("evaluate.steps", steps, steps > 0, "at least 1")?;
        let is_fashion = data.kind == DataKind::FashionMnist;
        let expected =
            "a TorchScript file, or `raw_pixels` for tiny images: the data are not Fashion-MNIST";
        let fits = is_fashion || self.extractor != "fashion_classifier";
        ensure("evaluate.extractor", &self.extractor, fits, expected)
    }
}
