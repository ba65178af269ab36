//! All metrics at once, with the settings that make them comparable.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    Neighbours, Statistics, energy_distance,
    error::{Error, Result},
    frechet_distance, kid, mean_pairwise_distance, prdc, sliced_wasserstein,
};

/// The metrics of one set of samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Values {
    /// See [`frechet_distance`].
    pub frechet: f64,
    /// See [`precision_recall`](crate::precision_recall).
    pub precision: f64,
    /// See [`precision_recall`](crate::precision_recall).
    pub recall: f64,
    /// See [`density_coverage`](crate::density_coverage).
    pub density: f64,
    /// See [`density_coverage`](crate::density_coverage).
    pub coverage: f64,
    /// See [`kid`].
    pub kid: f64,
    /// See [`energy_distance`].
    pub energy_distance: f64,
    /// See [`sliced_wasserstein`]; absent unless there are as many samples as reference samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliced_wasserstein: Option<f64>,
    /// See [`mean_pairwise_distance`]; of the samples.
    pub mean_pairwise_distance: f64,
}

/// Metrics, with their reference and settings.
///
/// Two reports can be compared if [`is_comparable`](Self::is_comparable) returns true.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the reference set: data set and split, or a hash.
    pub reference: String,
    /// Number of reference samples.
    pub num_reference: u64,
    /// Number of generated samples.
    pub num_samples: u64,
    /// [`FeatureExtractor::id`](crate::FeatureExtractor::id): name and hash of the weights.
    pub extractor: String,
    /// How images were resized for the extractor: the text form of [`Resize`](crate::Resize).
    pub resize: String,
    /// Settings of the metrics.
    pub options: MeasureOptions,
    /// The metrics.
    #[serde(flatten)]
    pub values: Values,
}

impl Report {
    /// Whether the metrics of `self` and `other` are comparable: everything but the samples is equal.
    pub fn is_comparable(&self, other: &Self) -> bool {
        self.reference == other.reference
            && self.num_reference == other.num_reference
            && self.num_samples == other.num_samples
            && self.extractor == other.extractor
            && self.resize == other.resize
            && self.options == other.options
    }
}

/// Settings of [`measure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MeasureOptions {
    /// Numbers of neighbours for the radii of precision, recall, density and coverage.
    pub neighbours: Neighbours,
    /// Number of directions of the sliced Wasserstein distance; default 256.
    pub num_projections: u32,
    /// Seed of these directions; default 0.
    pub projection_seed: u64,
}

impl Default for MeasureOptions {
    fn default() -> Self {
        Self { neighbours: Neighbours::default(), num_projections: 256, projection_seed: 0 }
    }
}

/// All metrics of `samples` against `reference`.
///
/// # Shapes and units
///
/// - `reference`: `[n, d]`, `samples`: `[m, d]`, features of one extractor, any floating kind
///
/// # Errors
///
/// Those of the metrics: too few samples, columns that differ, values that are NaN or infinite, invalid options.
///
/// # Example
///
/// ```
/// use ddil_metrics::{MeasureOptions, measure};
/// let real = tch::Tensor::randn([64, 4], tch::kind::FLOAT_CPU);
/// let values = measure(&real, &(&real * 0.5), MeasureOptions::default())?;
/// assert!(values.recall < 1.0 && values.frechet > 0.0);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn measure(reference: &Tensor, samples: &Tensor, options: MeasureOptions) -> Result<Values> {
    let found = prdc(reference, samples, options.neighbours)?;
    let sliced =
        sliced_wasserstein(reference, samples, options.num_projections, options.projection_seed);
    Ok(Values {
        frechet: frechet_distance(
            &Statistics::from_features(reference)?,
            &Statistics::from_features(samples)?,
        )?,
        precision: found.precision,
        recall: found.recall,
        density: found.density,
        coverage: found.coverage,
        kid: kid(reference, samples)?,
        energy_distance: energy_distance(reference, samples)?,
        sliced_wasserstein: match sliced {
            Ok(value) => Some(value),
            Err(Error::CountMismatch { .. }) => None,
            Err(error) => return Err(error),
        },
        mean_pairwise_distance: mean_pairwise_distance(samples)?,
    })
}
