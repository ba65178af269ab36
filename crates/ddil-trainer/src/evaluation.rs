//! Generated images against real ones, on features.

use ddil_metrics::{
    FeatureExtractor, Neighbours, Prdc, Statistics, frechet_distance, prdc, quantize,
};
use tch::{Kind, Tensor};

use crate::error::Result;

/// Real images as features: what generated ones are compared with.
#[derive(Debug)]
pub struct Reference {
    /// The dataset and which part of it.
    pub name: String,
    features: Tensor,
    statistics: Statistics,
}

/// How a set of images compares with a [`Reference`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// How many images were compared.
    pub samples: u64,
    /// Fréchet distance.
    pub frechet: f64,
    /// Precision, recall, density and coverage.
    pub prdc: Prdc,
}

impl Reference {
    /// Takes in real images, `[n, channels, height, width]` in `[-1, 1]`.
    ///
    /// # Errors
    ///
    /// What the extractor and the metrics refuse: wrong shapes, fewer than two images.
    pub fn new(
        name: impl Into<String>,
        images: &Tensor,
        extractor: &dyn FeatureExtractor,
    ) -> Result<Self> {
        let features = features(images, extractor)?;
        let statistics = Statistics::from_features(&features)?;
        Ok(Self { name: name.into(), features, statistics })
    }

    /// Compares images, generated or held out, with the real ones.
    ///
    /// They are rounded to 8 bits first, as a PNG would. Precision, recall, density and coverage are counted against
    /// as many real images as there are others, the first ones, since all four depend on both numbers; the Fréchet
    /// distance takes all real images.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn score(&self, images: &Tensor, extractor: &dyn FeatureExtractor) -> Result<Scores> {
        let features = features(&quantize(images), extractor)?;
        let statistics = Statistics::from_features(&features)?;
        let real = self.features.narrow(0, 0, self.features.size()[0].min(features.size()[0]));
        Ok(Scores {
            samples: statistics.num_samples(),
            frechet: frechet_distance(&self.statistics, &statistics)?,
            prdc: prdc(&real, &features, Neighbours::default())?,
        })
    }
}

/// Features in batches, so that memory does not grow with the number of images.
fn features(images: &Tensor, extractor: &dyn FeatureExtractor) -> Result<Tensor> {
    const BATCH: i64 = 250;
    let _no_grad = tch::no_grad_guard();
    let batches: Result<Vec<Tensor>> = images
        .split(BATCH, 0)
        .iter()
        .map(|batch| Ok(extractor.features(batch)?.to_kind(Kind::Float)))
        .collect();
    Ok(Tensor::cat(&batches?, 0))
}
