//! Measures diffusion models: draws samples, computes their features, and compares them with real images.
//!
//! The metrics themselves are in [`ddil_metrics`]; this crate applies them to models and to image files. The program
//! `ddil evaluate` and the evaluation during training are built from it.
//!
//! | task | items |
//! | --- | --- |
//! | choose a network of features | [`ExtractorChoice`], [`FolderExtractor`] |
//! | choose the images to compare with | [`ReferenceChoice`], [`reference_of_images`], [`reference_of_dataset`], [`all_images`], [`warnings_of`], [`few_images`] |
//! | draw samples | [`Drawing`], [`draw`], [`draw_observed`] |
//! | compute features | [`features_of_files`], [`features_of_drawing`], [`features_as_stored`] |
//! | keep features, and continue after a stop | [`FeatureRows`], [`FeatureStore`], [`FeatureKey`] |
//! | compare | [`score`], [`Scores`], [`FeatureScores`], [`Metric`] |
//! | measure images of prompts: CLIP score, diversity | [`EvaluationPrompts`], [`PromptSet`], [`PromptDrawing`], [`PromptMeter`], [`PromptNetworks`], [`CaptionScorer`] |
//! | by class: whether samples show it; classes that the data lack | [`SamplesOfClasses`], [`MissingClasses`] |
//! | record the result | [`Measurement`], [`StandardErrors`] |
//! | measure the covariate shift | [`shift`], [`ShiftRow`] |
//! | show progress, stop | [`Monitor`], [`Unmonitored`] |
//!
//! # Example
//!
//! Twenty samples of a model against as many others:
//!
//! ```
//! use ddil_evaluate::{ExtractorChoice, draw, features_as_stored, reference_of_images, score};
//! use ddil_models::Placement;
//! use ddil_pipelines::{Pipeline, Precision, SamplePlan};
//! use tch::Device;
//!
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher");
//! let model = Pipeline::open(folder.as_ref(), Placement::default(), Precision::Float32)?;
//! let plan = SamplePlan::of(&model, Some(1));
//! let extractor = ExtractorChoice::new("fashion_classifier").open(Some([1, 32, 32]), Device::Cpu)?;
//!
//! let other = draw(&model, &SamplePlan { seed: 1, ..plan.clone() }, 20, 0..20)?;
//! let reference = reference_of_images("another seed", &other, &*extractor)?;
//! let images = draw(&model, &plan, 20, 0..20)?;
//! let scores = score(&reference, &features_as_stored(&images, &*extractor)?)?;
//! assert!(scores.samples == 20 && scores.frechet > 0.0);
//! # Ok::<(), ddil_evaluate::Error>(())
//! ```

#![forbid(unsafe_code)]

mod caption_score;
mod classes;
mod drawing;
mod error;
mod extractor;
mod feature_rows;
mod feature_store;
mod features;
mod measurement;
mod monitor;
mod network_folder;
mod preprocessor;
mod prompt_drawing;
mod prompt_scores;
mod prompts;
mod reference;
mod scores;
mod shift;

pub use caption_score::{CaptionEmbeds, CaptionScorer};
pub use classes::{MissingClasses, SamplesOfClasses};
pub use ddil_files::Report;
pub use drawing::{Drawing, draw, draw_observed};
pub use error::{Error, Result};
pub use extractor::ExtractorChoice;
pub use feature_rows::FeatureRows;
pub use feature_store::{FeatureKey, FeatureStore};
pub use features::{features_as_stored, features_of_drawing, features_of_files, is_finite};
pub use measurement::{Measurement, StandardErrors};
pub use monitor::{Monitor, Unmonitored};
pub use network_folder::FolderExtractor;
pub use prompt_drawing::{PromptDrawing, Truncated};
pub use prompt_scores::{
    ClipScores, MeanOverPrompts, PromptDiversity, PromptMeter, PromptNetworks, PromptScores,
};
pub use prompts::{EvaluationPrompts, PromptSet};
pub use reference::{ReferenceChoice, all_images, few_images, reference_of_dataset, warnings_of};
pub use scores::{FeatureScores, MIN_SAMPLES, Metric, Scores, reference_of_images, score};
pub use shift::{ShiftRow, shift};
pub use tch;
