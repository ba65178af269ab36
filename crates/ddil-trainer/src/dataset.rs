//! Images and texts from disk, and the order in which training sees them.
//!
//! An [`ImageDataset`] keeps its images as bytes and makes a batch of floats when one is asked for. Which images that
//! are is said by [`BatchIndices`], a pure function of seed and step: a resumed run goes on where it stopped, with
//! nothing to restore. An [`EncodedDataset`] holds latents and prompts as a text-to-image model's own parts made them of
//! pictures with captions ([`read_captions`]).
//!
//! # Example
//!
//! ```
//! use ddil_trainer::dataset::{BatchIndices, ImageDataset};
//! use tch::{Kind, Tensor};
//!
//! let pixels = Tensor::full([6, 1, 4, 4], 255, (Kind::Uint8, tch::Device::Cpu));
//! let labels = Tensor::from_slice(&[0_i64, 1, 2, 0, 1, 2]);
//! let dataset = ImageDataset::new(&pixels, Some(&labels))?;
//!
//! let mut indices = BatchIndices::new(dataset.len(), 4, 0)?;
//! let batch = dataset.batch(&indices.at(7))?;
//! assert_eq!(batch.x0.size(), [4, 1, 4, 4]);
//! assert_eq!(batch.x0.min().double_value(&[]), 1.0);
//! # Ok::<(), ddil_trainer::dataset::Error>(())
//! ```

mod captions;
mod cropped;
pub(crate) mod encoded;
mod error;
mod fashion_mnist;
mod folder;
mod idx;
mod images;
mod indices;
mod jpeg;

pub use captions::{Captioned, read_captions, read_prompts};
pub use cropped::{Cropped, read_cropped};
pub use encoded::{
    EncodedBatch, EncodedDataset, EncodedInfo, EncodedShape, LatentScaling, TruncatedPrompts,
};
pub use error::{Error, Result};
pub use fashion_mnist::{FashionMnist, cache_folder, fashion_mnist_folders};
pub use folder::read_image_folder;
pub use idx::{read_idx_images, read_idx_labels};
pub use images::{Batch, ImageDataset, flip_horizontally};
pub use indices::BatchIndices;
