//! Measures generated samples: how good they are, how varied, and how far from a reference.
//!
//! Everything here sees *features*, a tensor `[n, d]` with one sample a row, and never a sampler or a network
//! that made them. A [`FeatureExtractor`] turns images into features; the metrics are plain functions below it:
//!
//! | question | function |
//! | --- | --- |
//! | how far apart are the two laws? | [`frechet_distance`], [`kid`], [`energy_distance`], [`sliced_wasserstein`] |
//! | do samples look like real ones, and are all real ones reached? | [`prdc`]: precision, recall, density, coverage |
//! | how varied are the samples among themselves? | [`mean_pairwise_distance`] |
//!
//! [`measure`] takes all of them at once and gives a [`Report`] that says against what, with which extractor and
//! from how many samples the numbers were made: a number without these compares with nothing.
//!
//! Sums run in `f64` on the device of the features, and work through large sets in blocks, so memory stays
//! bounded at any number of samples.
//!
//! # Example
//!
//! ```
//! use ddil_metrics::{Statistics, frechet_distance};
//! use tch::Tensor;
//!
//! let real = Tensor::from_slice(&[0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]).view([4, 2]);
//! let moved = &real + 3.0;
//! let distance = frechet_distance(
//!     &Statistics::from_features(&real)?,
//!     &Statistics::from_features(&moved)?,
//! )?;
//! assert!((distance - 18.0).abs() < 1e-9);
//! # Ok::<(), ddil_metrics::Error>(())
//! ```

#![forbid(unsafe_code)]

mod classifier;
mod coverage;
mod distances;
mod diversity;
mod energy;
mod error;
mod features;
mod frechet;
mod kid;
mod report;
mod wasserstein;

pub use classifier::{FASHION_CLASSES, FashionClassifier};
pub use coverage::{
    DensityCoverage, Neighbours, Prdc, PrecisionRecall, density_coverage, prdc, precision_recall,
};
pub use diversity::mean_pairwise_distance;
pub use energy::energy_distance;
pub use error::{Error, Result};
pub use features::{
    FeatureExtractor, PixelRange, RawPixels, Resize, TorchScriptExtractor, TorchScriptOptions,
    quantize,
};
pub use frechet::{Moments, Statistics, frechet_distance};
pub use kid::kid;
pub use report::{MeasureOptions, Report, Values, measure};
pub use wasserstein::{sliced_wasserstein, sliced_wasserstein_along};

/// The tch whose tensors this crate takes and returns. It is part of the API: a new tch is a breaking release.
pub use tch;
