//! `ddil range`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use ddil_core::{RandomStreams, Stream};
use ddil_data::{EncodedDataset, FashionMnist, ImageDataset, read_image_folder};
use ddil_evaluate::all_images;
use ddil_files::settings::to_toml;
use ddil_schedulers::{DataRange, Thresholding};
use serde::Serialize;
use tch::{Device, Tensor};

use super::print;
use crate::cli::RangeArgs;

/// Enough for the quantiles of each channel; a few hundred megabytes.
const MAX_LATENTS: i64 = 4096;

/// The table as written in a config file.
#[derive(Serialize)]
struct Tables {
    thresholding: Thresholding,
}

pub(crate) fn run(args: &RangeArgs) -> anyhow::Result<ExitCode> {
    // Image values end at black and white, which are part of the data; latents have no such limits.
    let (samples, quantile, margin) = if args.data.join("dataset.json").is_file() {
        (latents(&args.data)?, 0.0005, 0.1)
    } else {
        (all_images(&open(&args.data)?)?, 0.0, 0.0)
    };
    let (quantile, margin) = (args.quantile.unwrap_or(quantile), args.margin.unwrap_or(margin));
    let range = DataRange::of_samples(&samples, quantile, margin)?;
    let (n, channels) = (samples.size()[0], samples.size()[1]);
    print(&format!(
        "# {n} samples of {}, {channels} channels: quantiles {quantile} and {}, extended by {margin} of the width\n{}",
        args.data.display(),
        1.0 - quantile,
        to_toml(&Tables { thresholding: Thresholding::Clamp(range) })?
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// Latents of a folder of encoded data, drawn once each; only the first ones if there are very many.
fn latents(folder: &Path) -> anyhow::Result<Tensor> {
    let data = EncodedDataset::open(folder, None)?;
    let Some(shape) = data.latent_shape() else {
        bail!(
            "{} contains prompts but no latents, which the range is computed from",
            folder.display()
        );
    };
    let first: Vec<i64> = (0..data.len().min(MAX_LATENTS)).collect();
    let mut draws = RandomStreams::new(0, 0).draws(0, Stream::Data, Device::Cpu)?;
    Ok(data.batch(&first, shape, &mut draws, Device::Cpu)?.x0)
}

fn open(data: &Path) -> anyhow::Result<ImageDataset> {
    if data == Path::new("fashion_mnist") {
        return Ok(FashionMnist::from_folder(None)?.train);
    }
    let path = data.display();
    ensure!(
        data.is_dir(),
        "{path} is not a folder; expected a folder of images or latents, or `fashion_mnist`"
    );
    read_image_folder(data).with_context(|| format!("could not read images from {path}"))
}
