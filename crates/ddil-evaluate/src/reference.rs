//! The images that others are compared with.

use std::path::{Path, PathBuf};

use ddil_data::{FashionMnist, ImageDataset, ImageFiles};
use ddil_files::Invalid;
use ddil_metrics::{FeatureExtractor, Neighbours, Reference};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::feature_rows::FeatureRows;
use crate::feature_store::{FeatureKey, FeatureStore};
use crate::features::{features_of_dataset, features_of_files};
use crate::monitor::Monitor;

/// The name of Fashion-MNIST's test images as a reference.
const FASHION_MNIST: &str = "fashion_mnist";

/// The images to compare with, as in a config or on a command line.
///
/// # Example
///
/// ```
/// use ddil_evaluate::ReferenceChoice;
///
/// let images = ReferenceChoice::named("fashion_mnist")?;
/// assert_eq!(images, ReferenceChoice::FashionMnist { folder: None, size: None });
/// // For a model that draws 16x16 pixels.
/// let scaled = images.at_size(Some([16, 16]));
/// assert_eq!(scaled, ReferenceChoice::FashionMnist { folder: None, size: Some([16, 16]) });
/// let error = ReferenceChoice::named("no/such/folder").expect_err("there is none");
/// assert!(error.to_string().contains("`reference` is no/such/folder"));
/// # Ok::<(), ddil_evaluate::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReferenceChoice {
    /// The test images of Fashion-MNIST.
    FashionMnist {
        /// The folder of the data; none for the default one.
        folder: Option<PathBuf>,
        /// Height and width to which the images are scaled, as by [`FashionMnist::scaled`]; none for their own.
        size: Option<[i64; 2]>,
    },
    /// A folder of images of any sizes, with its subfolders.
    Folder(PathBuf),
    /// A file of statistics, as [`Reference::from_file`] reads it.
    File(PathBuf),
}

impl ReferenceChoice {
    /// `fashion_mnist`, or the path of a folder or a file.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) with the setting `reference` if there is neither.
    pub fn named(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path == Path::new(FASHION_MNIST) {
            return Ok(Self::FashionMnist { folder: None, size: None });
        }
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.is_file() {
            return Ok(Self::File(path.to_owned()));
        }
        let expected = "`fashion_mnist`, a folder of images, or a file of statistics (.safetensors of \
                        --save-statistics, .npz of pytorch-fid or clean-fid)";
        Err(Invalid::new("reference", path.display(), expected).into())
    }

    /// The test images of Fashion-MNIST at the size of the samples they are compared with; another reference is unchanged.
    #[must_use]
    pub fn at_size(self, size: Option<[i64; 2]>) -> Self {
        match self {
            Self::FashionMnist { folder, .. } => Self::FashionMnist { folder, size },
            other => other,
        }
    }

    /// The reference. Features of a folder are computed, in `threads` threads that decode; those of
    /// [`FeatureStore::MIN_IMAGES`] images or more are kept in `store`, if there is one, and read from there the next
    /// time; they are in memory if the store is in use or cannot be written.
    ///
    /// # Errors
    ///
    /// Errors of the images or the file, and of the extractor; statistics of another extractor; too few images;
    /// [`Error::Stopped`](crate::Error::Stopped).
    pub fn open(
        &self,
        extractor: &dyn FeatureExtractor,
        threads: usize,
        store: Option<&mut FeatureStore>,
        monitor: &mut dyn Monitor,
    ) -> Result<Reference> {
        let reference = match self {
            Self::FashionMnist { folder, size } => {
                let mut data = FashionMnist::from_folder(folder.as_deref())?;
                if let Some(size) = size {
                    data.test = data.test.scaled(*size)?;
                }
                reference_of_dataset(data.test_name(), &data.test, extractor, monitor)?
            }
            Self::Folder(path) => {
                // Metrics of neighbours use the first images, which in a folder of classes are those of one class.
                let files = ImageFiles::in_folder(path)?.shuffled(0);
                let rows = match store.filter(|store| store.keeps(files.len() as u64)) {
                    // Another process computes them, or the folder cannot be written.
                    Some(store) => {
                        match store.open(&FeatureKey::of_files(&files, extractor)?, true) {
                            Err(Error::Files(_) | Error::InUse { .. }) => FeatureRows::in_memory(),
                            rows => rows?,
                        }
                    }
                    None => FeatureRows::in_memory(),
                };
                let features =
                    features_of_files(&files, "reference", extractor, threads, rows, monitor)?;
                Reference::new("images/held_out", &features, extractor)?
            }
            Self::File(path) => {
                let reference = Reference::from_file(path)?;
                reference.ensure_extractor(extractor)?;
                reference
            }
        };
        if let Some(features) = reference.features() {
            ensure_enough(self, features.size()[0])?;
        }
        Ok(reference)
    }

    /// Checks the reference without computing features of a folder; returns whether it has features, and not statistics
    /// alone.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), except for errors in the images of a folder.
    pub fn check(&self, extractor: &dyn FeatureExtractor) -> Result<bool> {
        let images = match self {
            Self::FashionMnist { folder, .. } => {
                Some(FashionMnist::from_folder(folder.as_deref())?.test.len())
            }
            Self::Folder(path) => Some(ImageFiles::in_folder(path)?.len() as i64),
            Self::File(path) => {
                let reference = Reference::from_file(path)?;
                reference.ensure_extractor(extractor)?;
                reference.features().map(|features| features.size()[0])
            }
        };
        if let Some(images) = images {
            ensure_enough(self, images)?;
        }
        Ok(images.is_some())
    }

    fn shown(&self) -> String {
        match self {
            Self::FashionMnist { .. } => FASHION_MNIST.to_owned(),
            Self::Folder(path) | Self::File(path) => path.display().to_string(),
        }
    }
}

/// The metrics of neighbours have no value for fewer images than neighbours.
fn ensure_enough(choice: &ReferenceChoice, images: i64) -> Result<()> {
    let Neighbours { precision_recall, density_coverage } = Neighbours::default();
    let least = i64::from(precision_recall.max(density_coverage)) + 1;
    if images >= least {
        return Ok(());
    }
    let (value, expected) =
        (choice.shown(), format!("at least {least} images, but found {images}"));
    Err(Invalid::new("reference", value, expected).into())
}

/// What limits a comparison with a reference; empty if nothing does.
pub fn warnings_of(reference: &Reference, extractor: &dyn FeatureExtractor) -> Vec<String> {
    let unnamed = reference.extractor().is_none().then(|| {
        format!(
            "{} does not name its network and interpolation; the distance is meaningful only if they are those of {}",
            reference.name(),
            extractor.id()
        )
    });
    let images = reference.statistics().num_samples();
    let few = images.and_then(|images| few_images("reference", images as i64, extractor.dim()));
    unnamed.into_iter().chain(few).collect()
}

/// A warning if there are too few images for their features: they leave directions of the covariance empty, which adds
/// to the Fréchet distance.
pub fn few_images(what: &str, images: i64, dim: i64) -> Option<String> {
    (images <= dim).then(|| {
        format!(
            "{what}: {images} images for {dim} features; the Fréchet distance of fewer than {} is dominated by their \
             number, so compare KID, or use more images",
            dim.saturating_add(1)
        )
    })
}

/// A reference of the images of a data set, which are converted in parts.
///
/// # Errors
///
/// Errors of the extractor and the metrics: images of another shape, fewer than two; [`Error::Stopped`].
pub fn reference_of_dataset(
    name: impl Into<String>,
    images: &ImageDataset,
    extractor: &dyn FeatureExtractor,
    monitor: &mut dyn Monitor,
) -> Result<Reference> {
    let features = features_of_dataset(images, "reference", extractor, monitor)?;
    Ok(Reference::new(name, &features, extractor)?)
}

/// Every image of a data set, `[n, channels, height, width]` in `[-1, 1]`.
///
/// # Errors
///
/// Errors of libtorch, such as out of memory.
pub fn all_images(images: &ImageDataset) -> Result<Tensor> {
    Ok(images.range(0, images.len())?.x0)
}
