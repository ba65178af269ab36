//! Comparison of images with real ones, on features.

use ddil_metrics::{
    FeatureExtractor, Neighbours, Prdc, Reference, Statistics, frechet_distance, kid, prdc,
};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::Result;
use crate::features::features_of_images;

/// The smallest number of images that can be compared: neighbourhoods of five need more points.
pub const MIN_SAMPLES: u32 = 10;

/// A metric of [`Scores`], by its name in configs and records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Fréchet distance.
    Frechet,
    /// Kernel distance.
    Kid,
    /// Precision.
    Precision,
    /// Recall.
    Recall,
    /// Density.
    Density,
    /// Coverage.
    Coverage,
}

impl Metric {
    /// All of them, in the order of the tables.
    pub const ALL: [Self; 6] =
        [Self::Frechet, Self::Kid, Self::Precision, Self::Recall, Self::Density, Self::Coverage];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Frechet => "frechet",
            Self::Kid => "kid",
            Self::Precision => "precision",
            Self::Recall => "recall",
            Self::Density => "density",
            Self::Coverage => "coverage",
        }
    }

    /// Its value; `None` if the reference has statistics alone, except for the Fréchet distance.
    pub fn of(self, scores: &Scores) -> Option<f64> {
        let by_features = scores.by_features;
        let prdc = by_features.map(|scores| scores.prdc);
        match self {
            Self::Frechet => Some(scores.frechet),
            Self::Kid => by_features.map(|scores| scores.kid),
            Self::Precision => prdc.map(|prdc| prdc.precision),
            Self::Recall => prdc.map(|prdc| prdc.recall),
            Self::Density => prdc.map(|prdc| prdc.density),
            Self::Coverage => prdc.map(|prdc| prdc.coverage),
        }
    }

    /// Whether the value `new` is better than `old`: smaller for distances, larger for the others.
    pub fn is_better(self, new: f64, old: f64) -> bool {
        match self {
            Self::Frechet | Self::Kid => new < old,
            Self::Precision | Self::Recall | Self::Density | Self::Coverage => new > old,
        }
    }
}

/// The comparison of a set of images with a [`Reference`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// The number of images compared.
    pub samples: u64,
    /// Fréchet distance.
    pub frechet: f64,
    /// The metrics that require the features of the reference.
    pub by_features: Option<FeatureScores>,
}

impl Scores {
    /// Every metric that has a value, in order.
    pub fn values(&self) -> impl Iterator<Item = (Metric, f64)> + '_ {
        Metric::ALL.into_iter().filter_map(|metric| Some((metric, metric.of(self)?)))
    }
}

/// The metrics of a set of images that statistics alone do not determine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FeatureScores {
    /// Kernel distance.
    pub kid: f64,
    /// Precision, recall, density and coverage.
    pub prdc: Prdc,
}

/// A reference of images, `[n, channels, height, width]` in `[-1, 1]`.
///
/// # Errors
///
/// Errors of the extractor and the metrics: wrong shapes, fewer than two images.
pub fn reference_of_images(
    name: impl Into<String>,
    images: &Tensor,
    extractor: &dyn FeatureExtractor,
) -> Result<Reference> {
    Ok(Reference::new(name, &features_of_images(images, extractor)?, extractor)?)
}

/// Compares features with those of a reference.
///
/// Precision, recall, density and coverage use as many real images as there are images to compare, the first ones, since
/// all four depend on both numbers; the Fréchet distance and KID use all of them.
///
/// # Errors
///
/// Errors of the metrics: fewer than two images, too few for the neighbours.
pub fn score(reference: &Reference, features: &Tensor) -> ddil_metrics::Result<Scores> {
    let statistics = Statistics::from_features(features)?;
    let n = features.size()[0];
    let by_features = reference.features().map(|all| {
        let real = all.narrow(0, 0, all.size()[0].min(n));
        let prdc = prdc(&real, features, Neighbours::default())?;
        Ok::<_, ddil_metrics::Error>(FeatureScores { kid: kid(all, features)?, prdc })
    });
    Ok(Scores {
        samples: n.unsigned_abs(),
        frechet: frechet_distance(reference.statistics(), &statistics)?,
        by_features: by_features.transpose()?,
    })
}
