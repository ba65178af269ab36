//! Batches for training, each a function of the number of its update.

mod encode;
mod row_file;
mod source;

use std::collections::BTreeSet;

use ddil_core::{Conditioning, Data, RandomStreams, Stream};
use ddil_data::{BatchIndices, EncodedBatch, EncodedDataset, ImageDataset, flip_horizontally};
use tch::{Device, Tensor};

pub use self::source::DataSource;
use crate::config::DataSection;
use crate::error::Result;
use crate::interrupt::Interrupt;

/// Keeps what a discriminator is shown apart from what is noised.
const REAL: u64 = 0x7265_616c;

/// A dataset with the order in which its samples come.
#[derive(Debug)]
pub struct TrainingData {
    samples: Samples,
    /// Channels, height and width of a sample.
    shape: [i64; 3],
    indices: BatchIndices,
    /// Another order of the same samples.
    real: BatchIndices,
    seed: u64,
    horizontal_flip: bool,
    /// Whether labels are handed out, if there are any.
    labelled: bool,
    device: Device,
}

#[derive(Debug)]
enum Samples {
    Images(ImageDataset),
    Encoded(Box<EncodedDataset>),
}

impl TrainingData {
    /// Opens pixels of a config; batches come out on `device`.
    ///
    /// # Errors
    ///
    /// What is missing or damaged, and where; [`Error::Invalid`](crate::Error::Invalid) if a batch is larger
    /// than the dataset, and for data of texts.
    pub fn open(section: &DataSection, seed: u64, device: Device) -> Result<Self> {
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
            Samples::Encoded(data) => (data.len(), false),
        };
        let batch = section.batch_size as usize;
        let indices = BatchIndices::new(len, batch, seed)?;
        let real = BatchIndices::new(len, batch, seed ^ REAL)?;
        let horizontal_flip = section.horizontal_flip;
        Ok(Self { samples, shape, indices, real, seed, horizontal_flip, labelled, device })
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
        self.batch(step, &indices, &flips, self.seed)
    }

    /// The batch that update `step` shows to a discriminator: as large, of the same samples in another order.
    ///
    /// # Errors
    ///
    /// What libtorch refuses, such as memory.
    pub fn real_at(&mut self, step: u64) -> Result<Data> {
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
                Data { x0: batch.x0, conditioning }
            }
            Samples::Encoded(data) => {
                // Which phrasing, and which of the latents that the autoencoder thinks possible.
                let streams = RandomStreams::new(seed, 0);
                let mut draws = streams.draws(step, Stream::Data, self.device)?;
                let EncodedBatch { x0, conditioning } =
                    data.batch(indices, self.shape, &mut draws, self.device)?;
                Data { x0, conditioning }
            }
        };
        Ok(data.to_device(self.device)?)
    }

    /// Channels, height, width.
    pub fn image_shape(&self) -> [i64; 3] {
        self.shape
    }

    /// Latents and prompts, if that is what the data are.
    pub fn encoded(&self) -> Option<&EncodedDataset> {
        match &self.samples {
            Samples::Images(_) => None,
            Samples::Encoded(data) => Some(data),
        }
    }

    /// Rows of the first so many prompts, each once; none without prompts.
    pub fn first_prompts(&self, most: usize) -> Vec<i64> {
        let Some(data) = self.encoded() else { return Vec::new() };
        let (mut seen, mut rows) = (BTreeSet::new(), Vec::new());
        let samples = (0..data.len()).filter_map(|sample| data.prompts_of(sample).ok());
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
    pub fn class_names(&self) -> &[String] {
        match &self.samples {
            Samples::Images(images) if self.labelled => images.class_names(),
            _ => &[],
        }
    }

    /// The class that stands for "no condition": the one after the last; none without labels.
    pub fn null_class(&self) -> Option<i64> {
        self.labelled.then(|| self.class_names().len() as i64)
    }
}

/// What a network that is told sizes is told of pictures of a height and width as they are sampled: neither scaled nor
/// cropped, `[batch, 6]`.
pub(crate) fn sampled_time_ids([height, width]: [i64; 2], batch: i64) -> Tensor {
    let [height, width] = [height, width].map(|side| side as f32);
    Tensor::from_slice(&[height, width, 0.0, 0.0, height, width]).repeat([batch, 1])
}
