//! Metrics of generated samples: Fréchet and kernel distance, precision and recall, energy and Wasserstein distance,
//! diversity.
//!
//! Every metric is a function of *features*, tensors `[n, d]` with one sample per row, and independent of the sampler
//! and network that generated them. A [`FeatureExtractor`] computes features from a batch of images; `ddil-data` reads
//! images from files.
//!
//! | question | function |
//! | --- | --- |
//! | how far apart are two distributions? | [`frechet_distance`], [`kid`], [`energy_distance`], [`sliced_wasserstein`] |
//! | do samples look real, and are all real samples reached? | [`prdc`]: precision, recall, density, coverage |
//! | how varied are the samples? | [`mean_pairwise_distance`], [`mean_cosine_distance`], [`diversity_per_group`], [`TorchScriptDistance`] |
//! | how exact is a number? | [`standard_errors`], [`kid_of_subsets`] |
//! | real images in a file | [`Reference`]: also pytorch-fid's and clean-fid's `.npz` |
//! | features of images | [`FashionClassifier`], [`RawPixels`], [`TorchScriptExtractor`] |
//! | do samples show their class? | [`ClassPredictor`] |
//! | the input of a network from images of any size | [`ImageInput`] |
//!
//! [`measure`] computes all of them and returns a [`Report`] with the reference, the extractor and the number of
//! samples: only numbers with the same three can be compared.
//!
//! Sums are in `f64` on the device of the features, in blocks, so that memory is bounded for any number of samples.
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
mod image_input;
mod kid;
mod perceptual;
mod reference;
mod report;
mod resampling;
mod wasserstein;

pub use classifier::{FASHION_CLASSES, FashionClassifier};
pub use coverage::{
    DensityCoverage, Neighbours, Prdc, PrecisionRecall, density_coverage, prdc, precision_recall,
};
pub use diversity::{mean_cosine_distance, mean_pairwise_distance};
pub use energy::energy_distance;
pub use error::{Error, Result};
pub use features::{
    ClassPredictor, FeatureExtractor, RawPixels, TorchScriptExtractor, TorchScriptOptions, quantize,
};
pub use frechet::{Moments, Statistics, frechet_distance};
pub use image_input::{ImageInput, Normalization, PixelRange, Resize};
pub use kid::kid;
pub use perceptual::TorchScriptDistance;
pub use reference::Reference;
pub use report::{MeasureOptions, Report, Values, measure};
pub use resampling::{
    MeanDeviation, Subsets, diversity_per_group, kid_of_subsets, standard_errors,
};
pub use wasserstein::{sliced_wasserstein, sliced_wasserstein_along};

/// The version of tch whose tensors are part of this crate's API: an upgrade of tch is a breaking release.
pub use tch;
