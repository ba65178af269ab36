use std::{
    env,
    path::{Path, PathBuf},
};

use ddil_files::hex;
use sha2::{Digest, Sha256};
use tch::Tensor;

use crate::{Error, ImageDataset, Result, idx};

/// Pixels of background on each side: 28 becomes 32, which can be halved down to 4.
const PADDING: i64 = 2;

/// Names and SHA-256 of the decompressed files.
const TRAIN_IMAGES: (&str, &str) =
    ("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888");
const TRAIN_LABELS: (&str, &str) =
    ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9");
const TEST_IMAGES: (&str, &str) =
    ("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b");
const TEST_LABELS: (&str, &str) =
    ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34");

/// Fashion-MNIST: 70 000 grey images of clothes in ten classes
/// ([Xiao et al. 2017](https://arxiv.org/abs/1708.07747)), padded from 28x28 to 32x32 with background.
///
/// # Example
///
/// ```no_run
/// use ddil_data::FashionMnist;
///
/// let data = FashionMnist::from_folder(None)?;
/// assert_eq!((data.train.len(), data.test.len()), (60_000, 10_000));
/// assert_eq!(data.train.image_shape(), [1, 32, 32]);
/// # Ok::<(), ddil_data::Error>(())
/// ```
#[derive(Debug)]
pub struct FashionMnist {
    /// 60 000 training samples.
    pub train: ImageDataset,
    /// 10 000 test samples.
    pub test: ImageDataset,
}

impl FashionMnist {
    /// Height and width of the padded images.
    pub const SIDE: i64 = 28 + 2 * PADDING;

    /// Reads the data set from `folder`, or from the first of [`fashion_mnist_folders`] that contains it.
    ///
    /// The four IDX files may be compressed (`.gz`). Each is checked against the SHA-256 of the published file.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] if no folder contains the files, [`Error::Read`] if a file cannot be read,
    /// [`Error::Checksum`] if it is not the published file.
    pub fn from_folder(folder: Option<&Path>) -> Result<Self> {
        let folder = found_folder(folder)?;
        Ok(Self {
            train: read_split(&folder, TRAIN_IMAGES, TRAIN_LABELS)?,
            test: read_split(&folder, TEST_IMAGES, TEST_LABELS)?,
        })
    }

    /// The labels of the training samples, `[60 000]`, `Int64`, without the images.
    ///
    /// # Errors
    ///
    /// As [`from_folder`](Self::from_folder), of the one file that is read.
    pub fn train_labels(folder: Option<&Path>) -> Result<Tensor> {
        read_labels(&found_folder(folder)?, TRAIN_LABELS)
    }

    /// All images at another size, as by [`ImageDataset::scaled`]: of the padded images, so that 16 is half of their side.
    ///
    /// # Errors
    ///
    /// Those of [`ImageDataset::scaled`].
    pub fn scaled(&self, size: [i64; 2]) -> Result<Self> {
        Ok(Self { train: self.train.scaled(size)?, test: self.test.scaled(size)? })
    }

    /// The name of the test images as those of a comparison: `fashion_mnist/test`, with the size if they are scaled.
    pub fn test_name(&self) -> String {
        match self.test.image_shape() {
            [_, Self::SIDE, Self::SIDE] => "fashion_mnist/test".to_owned(),
            [_, height, width] => format!("fashion_mnist/test-{width}x{height}"),
        }
    }
}

/// The given folder, or the first of the default ones, that contains the data set.
fn found_folder(folder: Option<&Path>) -> Result<PathBuf> {
    let folders = folder.map_or_else(fashion_mnist_folders, |path| vec![path.to_owned()]);
    match folders.iter().find(|path| find(path, TRAIN_IMAGES.0).is_some()) {
        Some(folder) => Ok(folder.clone()),
        None => Err(Error::Missing { dataset: "Fashion-MNIST", looked_in: folders }),
    }
}

/// The folders that [`FashionMnist::from_folder`] searches by default, in order.
///
/// `$DDIL_DATA/fashion-mnist` and `$DDIL_DATA` if the variable is set; otherwise `datasets/fashion-mnist` in
/// `$DDIL_CACHE`, or in `$XDG_CACHE_HOME/ddil`, or in `~/.cache/ddil`.
pub fn fashion_mnist_folders() -> Vec<PathBuf> {
    if let Some(data) = path_in("DDIL_DATA") {
        return vec![data.join("fashion-mnist"), data];
    }
    vec![cache_folder().join("datasets/fashion-mnist")]
}

/// The cache folder, whose content can be downloaded or computed again: `$DDIL_CACHE`, or `$XDG_CACHE_HOME/ddil`, or
/// `~/.cache/ddil`.
///
/// A relative `XDG_CACHE_HOME` is ignored, as its specification requires. Without `HOME` the home folder is that of the
/// user's account, and without an account the cache is in the system's folder of temporary files.
pub fn cache_folder() -> PathBuf {
    let xdg = || path_in("XDG_CACHE_HOME").filter(|cache| cache.is_absolute());
    let home = || env::home_dir().filter(|home| home.is_absolute());
    path_in("DDIL_CACHE")
        .or_else(|| xdg().map(|cache| cache.join("ddil")))
        .or_else(|| home().map(|home| home.join(".cache/ddil")))
        .unwrap_or_else(|| env::temp_dir().join("ddil-cache"))
}

/// The path in an environment variable; `None` if it is unset or empty.
fn path_in(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn read_split(
    folder: &Path,
    images: (&str, &'static str),
    labels: (&str, &'static str),
) -> Result<ImageDataset> {
    let (path, bytes) = read_checked(folder, images)?;
    let pixels = pad(&idx::images_from(&path, &bytes)?);
    let labels = read_labels(folder, labels)?;
    let class_names = ddil_metrics::FASHION_CLASSES.map(str::to_owned).to_vec();
    ImageDataset::with_class_names(&pixels, Some(&labels), class_names)
}

fn read_labels(folder: &Path, labels: (&str, &'static str)) -> Result<Tensor> {
    let (path, bytes) = read_checked(folder, labels)?;
    idx::labels_from(&path, &bytes)
}

/// `[n, 28, 28]` to `[n, 1, 32, 32]`; 0 is the background.
fn pad(images: &Tensor) -> Tensor {
    images.unsqueeze(1).constant_pad_nd([PADDING; 4])
}

fn read_checked(
    folder: &Path,
    (name, expected): (&str, &'static str),
) -> Result<(PathBuf, Vec<u8>)> {
    let path = find(folder, name).unwrap_or_else(|| folder.join(name));
    let bytes = idx::read(&path)?;
    let found = sha256(&bytes);
    if found != expected {
        return Err(Error::Checksum { path, found, expected });
    }
    Ok((path, bytes))
}

/// The file of this name, compressed or not.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    [folder.join(name), folder.join(format!("{name}.gz"))].into_iter().find(|path| path.is_file())
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
