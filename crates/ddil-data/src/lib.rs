//! Data sets for diffusion models: images, captions and encoded latents, and the sample order of training.
//!
//! An [`ImageDataset`] keeps its images in memory, one byte per value, and returns batches of floats from -1 to 1.
//! [`BatchIndices`] returns the samples of a step as a pure function of seed and step, so a resumed run continues
//! exactly without saved state. An [`EncodedDataset`] reads the latents and encoded prompts of a text-to-image model
//! from memory-mapped files.
//!
//! | task | items | shapes |
//! | --- | --- | --- |
//! | images in memory | [`ImageDataset`], [`Batch`], [`flip_horizontally`] | `x0` `[batch, channels, height, width]`, -1 to 1; `labels` `[batch]` |
//! | folders of PNG and JPEG files | [`read_image_folder`], [`read_image_folder_scaled`], [`ImageFolder`] to read a part; [`read_cropped`] | `[n, channels, height, width]` |
//! | images of any sizes, decoded in threads; features of them | [`ImageFiles`] | `[1, channels, height, width]` |
//! | captions of images | [`read_captions`], [`CaptionedImage`] | |
//! | prompts: text, JSON lines, tables, captions of COCO | [`read_prompts`], [`Prompt`], [`Captions`] | |
//! | IDX files, Fashion-MNIST | [`read_idx_images`], [`read_idx_labels`], [`FashionMnist`] | `[n, rows, columns]`, `[n]` |
//! | latents and encoded prompts | [`EncodedDataset`], [`EncodedBatch`], [`encoded`] | `x0` `[batch, channels, height, width]`, scaled |
//! | sample order; a part of the samples | [`BatchIndices`]; [`choose_samples`], [`SampleChoice`] | |
//!
//! # Example
//!
//! ```
//! use ddil_data::{BatchIndices, read_image_folder};
//!
//! // Two classes with one 4x4 PNG each: one black, one white.
//! let folder = tempfile::tempdir()?;
//! for (class, value) in [("dark", 0_u8), ("light", 255)] {
//!     let class = folder.path().join(class);
//!     std::fs::create_dir(&class)?;
//!     let mut png = png::Encoder::new(std::fs::File::create(class.join("0.png"))?, 4, 4);
//!     png.set_color(png::ColorType::Grayscale);
//!     png.write_header()?.write_image_data(&[value; 16])?;
//! }
//!
//! let dataset = read_image_folder(folder.path())?;
//! assert_eq!(dataset.class_names(), ["dark", "light"]);
//!
//! let mut indices = BatchIndices::new(dataset.len(), 2, 0)?;
//! let batch = dataset.batch(&indices.at(7))?;
//! assert_eq!(batch.x0.size(), [2, 1, 4, 4]);
//! assert_eq!((batch.x0.min().double_value(&[]), batch.x0.max().double_value(&[])), (-1.0, 1.0));
//! assert_eq!(batch.labels.map(|labels| labels.size()), Some(vec![2]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod captions;
mod cropped;
pub mod encoded;
mod error;
mod fashion_mnist;
mod files;
mod folder;
mod idx;
mod image_files;
mod images;
mod indices;
mod jpeg;
mod layout;
mod prompts;
mod texts;

pub use captions::{CaptionedImage, read_captions};
pub use cropped::{CroppedImage, read_cropped};
pub use ddil_files::Report;
pub use encoded::{
    EncodedBatch, EncodedDataset, EncodedInfo, EncodedShape, LatentScaling, TruncatedPrompts,
};
pub use error::{Error, Result};
pub use fashion_mnist::{FashionMnist, cache_folder, fashion_mnist_folders};
pub use folder::{ImageFolder, read_image_folder, read_image_folder_scaled};
pub use idx::{read_idx_images, read_idx_labels};
pub use image_files::ImageFiles;
pub use images::{Batch, ImageDataset, flip_horizontally};
pub use indices::{BatchIndices, SampleChoice, choose_samples};
pub use prompts::{Captions, Prompt, read_prompts};

pub use tch;
