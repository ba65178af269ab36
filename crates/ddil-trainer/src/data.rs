//! Batches for training, each a function of the number of its update.

use ddil_core::{Conditioning, Data};
use tch::Device;

use crate::config::{DataKind, DataSection};
use crate::dataset::{
    BatchIndices, FashionMnist, ImageDataset, flip_horizontally, read_image_folder,
};
use crate::error::{Error, Result};

/// Keeps the order of what a discriminator is shown apart from that of what is noised.
const REAL: u64 = 0x7265_616c;

/// A dataset with the order in which its samples come.
#[derive(Debug)]
pub struct TrainingData {
    images: ImageDataset,
    indices: BatchIndices,
    /// Another order of the same samples.
    real: BatchIndices,
    horizontal_flip: bool,
    /// Whether labels are handed out, if there are any.
    labelled: bool,
    device: Device,
}

impl TrainingData {
    /// Opens the data of a config; batches come out on `device`.
    ///
    /// # Errors
    ///
    /// What is missing or damaged, and where; [`Error::InvalidConfig`] if a batch is larger than the dataset.
    pub fn open(section: &DataSection, seed: u64, device: Device) -> Result<Self> {
        let images = open_images(section)?;
        let (len, batch) = (images.len(), section.batch_size);
        if i64::from(batch) > len {
            return Err(Error::InvalidConfig {
                field: "data.batch_size".to_owned(),
                value: batch.to_string(),
                expected: format!("at most {len}, the number of samples"),
            });
        }
        let indices = BatchIndices::new(len, batch as usize, seed)?;
        let real = BatchIndices::new(len, batch as usize, seed ^ REAL)?;
        let labelled = images.labels().is_some();
        let horizontal_flip = section.horizontal_flip;
        Ok(Self { images, indices, real, horizontal_flip, labelled, device })
    }

    /// The same without labels, for a network that takes none.
    #[must_use]
    pub fn ignore_labels(self) -> Self {
        Self { labelled: false, ..self }
    }

    /// The batch of update `step`.
    ///
    /// # Errors
    ///
    /// What libtorch refuses, such as memory.
    pub fn batch_at(&mut self, step: u64) -> Result<Data> {
        let (indices, flips) = (self.indices.at(step), self.indices.flips_at(step));
        self.batch(&indices, &flips)
    }

    /// The batch that update `step` shows to a discriminator: as large, of the same samples in another order.
    ///
    /// # Errors
    ///
    /// What libtorch refuses, such as memory.
    pub fn real_at(&mut self, step: u64) -> Result<Data> {
        let (indices, flips) = (self.real.at(step), self.real.flips_at(step));
        self.batch(&indices, &flips)
    }

    fn batch(&self, indices: &[i64], flips: &[bool]) -> Result<Data> {
        let mut batch = self.images.batch(indices)?;
        if self.horizontal_flip {
            batch.x0 = flip_horizontally(&batch.x0, flips)?;
        }
        let labels = batch.labels.filter(|_| self.labelled);
        let conditioning = labels.map_or_else(Conditioning::none, Conditioning::class_labels);
        Ok(Data { x0: batch.x0, conditioning }.to_device(self.device)?)
    }

    /// The dataset itself.
    pub fn images(&self) -> &ImageDataset {
        &self.images
    }

    /// Channels, height, width.
    pub fn image_shape(&self) -> [i64; 3] {
        self.images.image_shape()
    }

    /// Names of the classes; none without labels.
    pub fn class_names(&self) -> &[String] {
        if self.labelled { self.images.class_names() } else { &[] }
    }

    /// The class that stands for "no condition": the one after the last; none without labels.
    pub fn null_class(&self) -> Option<i64> {
        self.labelled.then(|| self.class_names().len() as i64)
    }
}

/// The images that a config trains on.
fn open_images(section: &DataSection) -> Result<ImageDataset> {
    match (section.kind, &section.path) {
        (DataKind::FashionMnist, path) => Ok(FashionMnist::load(path.as_deref())?.train),
        (DataKind::ImageFolder, Some(path)) => Ok(read_image_folder(path)?),
        (DataKind::ImageFolder, None) => Err(Error::InvalidConfig {
            field: "data.path".to_owned(),
            value: "not set".to_owned(),
            expected: "the folder of the images".to_owned(),
        }),
    }
}
