use ddil_data::ImageDataset;
use ddil_libtorch::Generator;
use ddil_models::AutoencoderKL;
use tch::Tensor;

use super::autoencoder::coloured;
use crate::Result;

/// Number of images per pass of the autoencoder.
const BATCH_SIZE: i64 = 100;

/// The encoded distributions of all images of a data set, so that they are computed only once.
#[derive(Debug)]
pub struct Latents {
    mean: Tensor,
    std: Tensor,
    labels: Vec<usize>,
}

impl Latents {
    /// Encodes a data set, or its first images.
    ///
    /// # Errors
    ///
    /// A data set without labels; errors of the autoencoder.
    pub fn of(vae: &AutoencoderKL, images: &ImageDataset, limit: Option<i64>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let len = limit.map_or(images.len(), |limit| limit.min(images.len()));
        let (mut means, mut stds) = (Vec::new(), Vec::new());
        for start in (0..len).step_by(BATCH_SIZE as usize) {
            let batch = images.range(start, BATCH_SIZE.min(len - start))?;
            let posterior = vae.encode(&coloured(&batch.x0))?;
            means.push(vae.scale(&posterior.mean)?);
            stds.push((posterior.logvar * 0.5).exp() * vae.config().scaling_factor);
        }
        let labels = images.labels().ok_or("the images have no labels")?.narrow(0, 0, len);
        let labels = Vec::<i64>::try_from(&labels)?.into_iter().map(|label| label as usize);
        Ok(Self {
            mean: Tensor::cat(&means, 0),
            std: Tensor::cat(&stds, 0),
            labels: labels.collect(),
        })
    }

    /// Number of images.
    pub fn num_images(&self) -> i64 {
        self.mean.size()[0]
    }

    /// Latents sampled for these images, `[batch, channels, height, width]`, of about unit variance, and their labels.
    ///
    /// # Errors
    ///
    /// Errors of libtorch.
    pub fn draw(&self, indices: &[i64], generator: &mut Generator) -> Result<(Tensor, Vec<usize>)> {
        let rows = Tensor::from_slice(indices);
        let [mean, std] = [&self.mean, &self.std].map(|part| part.f_index_select(0, &rows));
        let (mean, std) = (mean?, std?);
        let noise = generator.normal(mean.size(), mean.kind())?;
        let labels = indices.iter().map(|&index| self.labels[index as usize]).collect();
        Ok((mean + std * noise, labels))
    }
}
