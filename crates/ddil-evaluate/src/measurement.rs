//! Measurements, as in `results.json`.

use std::path::Path;

use ddil_core::Priors;
use ddil_files::{ensure_version, first_version, read_json, write_json};
use ddil_metrics::{FeatureExtractor, ImageInput, Reference, standard_errors};
use ddil_pipelines::{Card, SamplePlan};
use ddil_schedulers::{SolverConfig, Thresholding};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::classes::MissingClasses;
use crate::error::Result;
use crate::prompt_scores::{ClipScores, PromptDiversity};
use crate::prompts::PromptSet;
use crate::scores::{FeatureScores, Scores, score};
use crate::shift::ShiftRow;

/// The only version of the row format so far.
const FORMAT_VERSION: u32 = 1;

/// One measurement: the model, how it was sampled, and how its samples compare with the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Version of the row: 1, which rows without this field also have.
    #[serde(default = "first_version")]
    pub format_version: u32,
    /// The dataset that samples are compared with, and the part of it; empty if they are compared with none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub dataset: String,
    /// The number of images in it; none if its file does not contain the number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_samples: Option<u64>,
    /// `teacher`, `progressive`, ..; `data` for real samples against real samples.
    pub method: String,
    /// Priors of the sources at the end of training; none for a teacher.
    pub priors: Option<Priors>,
    /// Treatment of clean data beyond the data's range.
    pub thresholding: Thresholding,
    /// Guidance scale of the sampling; none if it is distilled into the model or not used.
    pub guidance_scale: Option<f64>,
    /// Network steps per sample.
    pub steps: u32,
    /// The multistep solver; none for DDIM and for latent consistency models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solver: Option<SolverConfig>,
    /// Seed of the run.
    pub seed: u64,
    /// Number of training updates.
    pub updates: u64,
    /// Duration of the training in seconds.
    pub seconds: f64,
    /// Number of samples compared.
    pub samples: u64,
    /// The features on which they were compared; empty if there were none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub extractor: String,
    /// How images were converted for the extractor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<ImageInput>,
    /// Kernel distance to the dataset (KID), of all samples; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<f64>,
    /// Fréchet distance to the dataset; none if the samples are compared with none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frechet: Option<f64>,
    /// Fréchet distance to the teacher's own samples at its full number of steps, if they were drawn: these are what a
    /// student of a guided teacher is trained to match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frechet_to_teacher: Option<f64>,
    /// Share of samples that the extractor's classifier assigns to their class; none if it has no
    /// classifier of the model's classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_agreement: Option<f64>,
    /// The samples of classes that the training data lack, if they lack any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_classes: Option<MissingClasses>,
    /// Share of samples near real ones; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<f64>,
    /// Share of real samples near generated ones; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recall: Option<f64>,
    /// Density of real samples around generated ones; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// Share of real samples with a generated one nearby; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<f64>,
    /// Standard errors, if they were requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standard_errors: Option<StandardErrors>,
    /// Distance between the states visited at inference and those of training, by timestep.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shift: Vec<ShiftRow>,
    /// The documented protocol that was followed, such as `coco2017-5k`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// The prompts of the samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PromptSet>,
    /// Height and width of the samples drawn from prompts, in pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_size: Option<[i64; 2]>,
    /// Seed of the sampling of prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_seed: Option<u64>,
    /// The CLIP score of the samples and their prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_score: Option<ClipScores>,
    /// How much the samples of one prompt differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diversity: Option<PromptDiversity>,
}

/// Standard errors of the metrics of a [`Measurement`]: how much they would differ for other samples of the same model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StandardErrors {
    /// The number of random halves they were estimated from.
    pub halves: u32,
    /// Of the Fréchet distance.
    pub frechet: f64,
    /// Of the kernel distance; none, like those below, if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<f64>,
    /// Of the precision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<f64>,
    /// Of the recall.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recall: Option<f64>,
    /// Of the density.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// Of the coverage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<f64>,
}

impl Measurement {
    /// The scores of images that no model generated; `method` names them.
    pub fn of(
        method: &str,
        scores: &Scores,
        reference: &Reference,
        extractor: &dyn FeatureExtractor,
    ) -> Self {
        let prdc = scores.by_features.map(|scores| scores.prdc);
        Self {
            dataset: reference.name().to_owned(),
            reference_samples: reference.statistics().num_samples(),
            kid: scores.by_features.map(|scores| scores.kid),
            frechet: Some(scores.frechet),
            precision: prdc.map(|prdc| prdc.precision),
            recall: prdc.map(|prdc| prdc.recall),
            density: prdc.map(|prdc| prdc.density),
            coverage: prdc.map(|prdc| prdc.coverage),
            ..Self::unscored(method, scores.samples, Some(extractor))
        }
    }

    /// Images that are compared with no others; `method` names them.
    pub fn unscored(method: &str, samples: u64, extractor: Option<&dyn FeatureExtractor>) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            dataset: String::new(),
            reference_samples: None,
            method: method.to_owned(),
            priors: None,
            thresholding: Thresholding::None,
            guidance_scale: None,
            steps: 0,
            solver: None,
            seed: 0,
            updates: 0,
            seconds: 0.0,
            samples,
            extractor: extractor.map(|own| own.id().to_owned()).unwrap_or_default(),
            input: extractor.map(|own| own.input().clone()),
            kid: None,
            frechet: None,
            frechet_to_teacher: None,
            class_agreement: None,
            missing_classes: None,
            precision: None,
            recall: None,
            density: None,
            coverage: None,
            standard_errors: None,
            shift: Vec::new(),
            protocol: None,
            prompts: None,
            image_size: None,
            sampling_seed: None,
            clip_score: None,
            diversity: None,
        }
    }

    /// Adds the standard errors of the metrics, from random halves of the images with these features.
    ///
    /// # Errors
    ///
    /// Errors of the metrics; too few images for half of them.
    pub fn add_standard_errors(
        &mut self,
        reference: &Reference,
        features: &Tensor,
        halves: u32,
    ) -> Result<()> {
        let values = |half: &Tensor| {
            let scores = score(reference, half)?;
            let others = scores.by_features.map(|FeatureScores { kid, prdc }| {
                [kid, prdc.precision, prdc.recall, prdc.density, prdc.coverage]
            });
            Ok(std::iter::once(scores.frechet).chain(others.into_iter().flatten()).collect())
        };
        let found = standard_errors(features, halves, 0, values)?;
        let at = |index: usize| found.get(index).copied();
        self.standard_errors = Some(StandardErrors {
            halves,
            frechet: found[0],
            kid: at(1),
            precision: at(2),
            recall: at(3),
            density: at(4),
            coverage: at(5),
        });
        Ok(())
    }

    /// Adds the known properties of the model and of its sampling.
    #[must_use]
    pub fn of_model(self, card: &Card, plan: &SamplePlan) -> Self {
        Self {
            method: card.method.clone(),
            priors: card.priors,
            thresholding: plan.thresholding.clone(),
            guidance_scale: (plan.guidance_scale != 1.0).then_some(plan.guidance_scale),
            steps: plan.steps,
            solver: plan.solver.clone(),
            seed: card.seed,
            updates: card.updates,
            seconds: card.seconds,
            ..self
        }
    }
}

impl Measurement {
    /// The measurements in a file.
    ///
    /// # Errors
    ///
    /// Errors of the file system; [`Error::Files`](crate::Error::Files) if the file contains something else, or
    /// if another version wrote a row.
    pub fn read_all(path: &Path) -> Result<Vec<Self>> {
        /// The version of a row, whatever else it contains.
        #[derive(Deserialize)]
        struct VersionOnly {
            #[serde(default = "first_version")]
            format_version: u32,
        }
        let versions: Vec<VersionOnly> = read_json(path)?;
        versions
            .iter()
            .try_for_each(|row| ensure_version(path, row.format_version, FORMAT_VERSION))?;
        Ok(read_json(path)?)
    }

    /// Adds this measurement to a file that contains an array of them, or creates the file.
    ///
    /// # Errors
    ///
    /// As [`read_all`](Self::read_all); a file with other contents is left unchanged.
    pub fn append_to(&self, path: &Path) -> Result<()> {
        let mut all = if path.exists() { Self::read_all(path)? } else { Vec::new() };
        all.push(self.clone());
        Ok(write_json(path, &all)?)
    }

    /// Writes measurements as an array and replaces an existing file.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub fn write_all<'a>(path: &Path, all: impl IntoIterator<Item = &'a Self>) -> Result<()> {
        let all: Vec<&Self> = all.into_iter().collect();
        Ok(write_json(path, &all)?)
    }
}
