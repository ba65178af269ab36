use ddil_core::{RandomStreams, Stream};
use ddil_data::{BatchIndices, ImageDataset};
use ddil_models::{AutoencoderKL, AutoencoderKLConfig, NetworkConfig, Placement};
use tch::{Device, Kind, Tensor};

use super::{Progress, Settings};
use crate::{Result, Trainer};

/// Weight of the divergence from the standard normal distribution, in nats per latent value.
const KL_WEIGHT: f64 = 1e-3;
/// Number of images on which the scale of the latents is measured.
const NUM_MEASURED: i64 = 2000;

/// Trains an autoencoder and sets its scaling factor so that the latents of these images have unit variance; also
/// returns the mean loss of every update.
///
/// The loss is the absolute plus the squared error of an image, and a small share of the divergence of its latents from
/// the standard normal distribution: that of [Rombach et al. 2022](https://arxiv.org/abs/2112.10752) without its
/// critics, which images of this size do not need.
///
/// # Errors
///
/// Errors of the networks and the data; a loss or gradient that is NaN or infinite.
pub fn train_autoencoder(
    settings: &Settings,
    images: &ImageDataset,
    progress: &Progress,
) -> Result<(AutoencoderKL, Vec<f64>)> {
    let vae = settings.vae.build(Placement::default(), settings.seed)?;
    let (stage, streams) = (settings.autoencoder, RandomStreams::new(settings.seed, 1));
    let mut indices = BatchIndices::new(images.len(), stage.batch_size, streams.seed)?;
    let trainer = Trainer::new(vae.parameters().learned(), stage.training)?;
    let updates = stage.training.updates;
    let losses = progress.run("autoencoder", trainer, updates, |step| {
        let x = coloured(&images.batch(&indices.at(step))?.x0);
        let posterior = vae.encode(&x)?;
        let mut generator = streams.generator(step, Stream::Noise, Device::Cpu)?;
        let latents = posterior.sample(&mut generator)?;
        let error = vae.decode(&latents)? - x;
        let error = (error.abs() + error.square()).flatten(1, -1).mean_dim(1, false, Kind::Float);
        let values = latents.numel() as f64 / latents.size()[0] as f64;
        Ok(error + posterior.kl()? * (KL_WEIGHT / values))
    })?;
    Ok((with_scale(&vae, images)?, losses))
}

/// The same network with the scaling factor that gives the latents unit variance.
fn with_scale(vae: &AutoencoderKL, images: &ImageDataset) -> Result<AutoencoderKL> {
    let _no_grad = tch::no_grad_guard();
    let x = coloured(&images.range(0, NUM_MEASURED)?.x0);
    let mut generator = RandomStreams::new(0, 1).generator(0, Stream::Sample, Device::Cpu)?;
    let mut latents = Vec::new();
    for part in x.split(100, 0) {
        latents.push(vae.encode(&part)?.sample(&mut generator)?);
    }
    let scaling_factor = 1.0 / Tensor::cat(&latents, 0).std(true).double_value(&[]);
    let config = AutoencoderKLConfig { scaling_factor, ..vae.config().clone() };
    let scaled = config.build(Placement::default(), 0)?;
    scaled.parameters().copy_from(vae.parameters())?;
    scaled.parameters().set_trainable(false);
    Ok(scaled)
}

/// Grey images in three equal channels, the format of Stable Diffusion's pipelines.
pub(super) fn coloured(images: &Tensor) -> Tensor {
    let [batch, _, height, width] = [0, 1, 2, 3].map(|i| images.size()[i]);
    images.expand([batch, 3, height, width], false).contiguous()
}
