//! Batches for training, each a function of its update number.

mod encode;
mod part;
mod row_file;
mod source;

use std::collections::BTreeSet;

use ddil_core::{Conditioning, Data, RandomStreams, Stream};
use ddil_data::{BatchIndices, EncodedBatch, EncodedDataset, ImageDataset, flip_horizontally};
use tch::{Device, Tensor};

pub(crate) use self::source::{DataSource, PromptFile};
pub use self::source::{images_for, labels_for, read_fashion_mnist, read_images};
use crate::config::DataSection;
use crate::error::Result;
use crate::interrupt::Interrupt;

/// Random stream of a discriminator's batches, separate from that of the noised batches.
const REAL: u64 = 0x7265_616c;

/// A dataset and the order of its samples.
#[derive(Debug)]
pub(crate) struct TrainingData {
    samples: Samples,
    /// Channels, height and width of a sample.
    shape: [i64; 3],
    indices: BatchIndices,
    /// Another order of the same samples.
    real: BatchIndices,
    seed: u64,
    horizontal_flip: bool,
    /// Whether batches contain labels, if the data have any.
    labelled: bool,
    device: Device,
}

#[derive(Debug)]
enum Samples {
    Images(ImageDataset),
    /// With the indices of the samples that are used, if not all.
    Encoded(Box<EncodedDataset>, Option<Vec<i64>>),
}

impl TrainingData {
    /// Opens a config's pixel data; batches are on `device`.
    ///
    /// # Errors
    ///
    /// An error for missing or damaged data, with the place; [`Error::Invalid`](crate::Error::Invalid) if a batch is
    /// larger than the dataset, and for text data.
    pub(crate) fn open(section: &DataSection, seed: u64, device: Device) -> Result<Self> {
        let source = DataSource::of_pixels(section)?;
        source.open(section, seed, device, None, &Interrupt::default())
    }

    fn new(
        samples: Samples,
        shape: [i64; 3],
        section: &DataSection,
        seed: u64,
        device: Device,
    ) -> Result<Self> {
        let (len, labelled) = match &samples {
            Samples::Images(images) => (images.len(), images.labels().is_some()),
            Samples::Encoded(_, Some(chosen)) => (chosen.len() as i64, false),
            Samples::Encoded(data, None) => (data.len(), false),
        };
        let batch = section.batch_size as usize;
        let indices = BatchIndices::new(len, batch, seed)?;
        let real = BatchIndices::new(len, batch, seed ^ REAL)?;
        let horizontal_flip = section.horizontal_flip;
        Ok(Self { samples, shape, indices, real, seed, horizontal_flip, labelled, device })
    }

    /// The same without labels, for a network that takes none.
    #[must_use]
    pub(crate) fn ignore_labels(self) -> Self {
        Self { labelled: false, ..self }
    }

    /// The batch of update `step`.
    ///
    /// # Errors
    ///
    /// Errors of libtorch, such as out of memory.
    pub(crate) fn batch_at(&mut self, step: u64) -> Result<Data> {
        let (indices, flips) = (self.indices.at(step), self.indices.flips_at(step));
        self.batch(step, &indices, &flips, self.seed)
    }

    /// The discriminator's batch of update `step`: the same size, from the same samples in another order.
    ///
    /// # Errors
    ///
    /// Errors of libtorch, such as out of memory.
    pub(crate) fn real_at(&mut self, step: u64) -> Result<Data> {
        let (indices, flips) = (self.real.at(step), self.real.flips_at(step));
        self.batch(step, &indices, &flips, self.seed ^ REAL)
    }

    fn batch(&self, step: u64, indices: &[i64], flips: &[bool], seed: u64) -> Result<Data> {
        let data = match &self.samples {
            Samples::Images(images) => {
                let mut batch = images.batch(indices)?;
                if self.horizontal_flip {
                    batch.x0 = flip_horizontally(&batch.x0, flips)?;
                }
                let labels = batch.labels.filter(|_| self.labelled);
                let conditioning =
                    labels.map_or_else(Conditioning::none, Conditioning::class_labels);
                Data::new(batch.x0).with_conditioning(conditioning)
            }
            Samples::Encoded(data, chosen) => {
                let chosen = chosen.as_ref().map(|chosen| {
                    indices.iter().map(|index| chosen[*index as usize]).collect::<Vec<i64>>()
                });
                let indices = chosen.as_deref().unwrap_or(indices);
                // The choice of caption, and the sample from the autoencoder's posterior.
                let streams = RandomStreams::new(seed, 0);
                let mut draws = streams.draws(step, Stream::Data, self.device)?;
                let EncodedBatch { x0, conditioning } =
                    data.batch(indices, self.shape, &mut draws, self.device)?;
                Data::new(x0).with_conditioning(conditioning)
            }
        };
        Ok(data.to_device(self.device)?)
    }

    /// Channels, height, width.
    pub(crate) fn image_shape(&self) -> [i64; 3] {
        self.shape
    }

    /// Latents and prompts, for data of that kind.
    pub(crate) fn encoded(&self) -> Option<&EncodedDataset> {
        match &self.samples {
            Samples::Images(_) => None,
            Samples::Encoded(data, _) => Some(data),
        }
    }

    /// Rows of the first distinct prompts, at most that many; none without prompts.
    pub(crate) fn first_prompts(&self, most: usize) -> Vec<i64> {
        let Samples::Encoded(data, chosen) = &self.samples else { return Vec::new() };
        let (mut seen, mut rows) = (BTreeSet::new(), Vec::new());
        let all: Vec<i64> = (0..data.len()).collect();
        let samples = chosen.as_ref().unwrap_or(&all).iter();
        let samples = samples.filter_map(|sample| data.prompts_of(*sample).ok());
        for row in samples.filter_map(|rows| rows.first()) {
            if rows.len() == most {
                break;
            }
            if seen.insert(*row) {
                rows.push(*row);
            }
        }
        rows
    }

    /// Names of the classes; none without labels.
    pub(crate) fn class_names(&self) -> &[String] {
        match &self.samples {
            Samples::Images(images) if self.labelled => images.class_names(),
            _ => &[],
        }
    }

    /// The null class: the one after the last; none without labels.
    pub(crate) fn null_class(&self) -> Option<i64> {
        self.labelled.then(|| self.class_names().len() as i64)
    }
}

/// SDXL's size and crop conditioning for images of a height and width as they are sampled: neither scaled nor cropped,
/// `[batch, 6]`.
pub(crate) fn sampled_time_ids([height, width]: [i64; 2], batch: i64) -> Tensor {
    let [height, width] = [height, width].map(|side| side as f32);
    Tensor::from_slice(&[height, width, 0.0, 0.0, height, width]).repeat([batch, 1])
}
