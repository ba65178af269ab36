//! Comparison of images with real ones, on features.

use ddil_metrics::{
    FeatureExtractor, Neighbours, Prdc, Reference, Statistics, frechet_distance, kid, prdc,
    quantize,
};
use tch::{Device, Kind, Tensor};

use crate::error::Result;

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
    Ok(Reference::new(name, &features(images, extractor)?, extractor)?)
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

/// Features of images as stored in a PNG, in batches: `[n, channels, height, width]` in `[-1, 1]`, rounded to 8 bits.
///
/// # Errors
///
/// Errors of the extractor.
pub fn features_as_stored(images: &Tensor, extractor: &dyn FeatureExtractor) -> Result<Tensor> {
    features(&quantize(images)?, extractor)
}

/// Features in batches, so that memory does not grow with the number of images.
fn features(images: &Tensor, extractor: &dyn FeatureExtractor) -> Result<Tensor> {
    const BATCH: i64 = 250;
    let _no_grad = tch::no_grad_guard();
    let batches: Result<Vec<Tensor>> = images
        .split(BATCH, 0)
        .iter()
        .map(|batch| Ok(extractor.features(batch)?.to_kind(Kind::Float).to_device(Device::Cpu)))
        .collect();
    Ok(Tensor::cat(&batches?, 0))
}
