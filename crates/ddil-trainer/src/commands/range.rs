//! `ddil range`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use ddil_schedulers::{DataRange, Thresholding};
use ddil_trainer::dataset::{FashionMnist, ImageDataset, read_image_folder};
use ddil_trainer::settings::to_toml;
use serde::Serialize;

use super::{evaluate::all_images, say};
use crate::cli::RangeArgs;

/// The table as it stands in a config file.
#[derive(Serialize)]
struct Tables {
    thresholding: Thresholding,
}

pub(crate) fn run(args: &RangeArgs) -> anyhow::Result<ExitCode> {
    let images = open(&args.data)?;
    let range = DataRange::of_samples(&all_images(&images)?, args.quantile, args.margin)?;
    let (n, [channels, ..]) = (images.len(), images.image_shape());
    say(&format!(
        "# {n} samples of {}, {channels} channels: quantiles {} and {}, widened by {} of the width\n{}",
        args.data.display(),
        args.quantile,
        1.0 - args.quantile,
        args.margin,
        to_toml(&Tables { thresholding: Thresholding::Clamp(range) })?
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn open(data: &Path) -> anyhow::Result<ImageDataset> {
    if data == Path::new("fashion_mnist") {
        return Ok(FashionMnist::load(None)?.train);
    }
    let path = data.display();
    ensure!(data.is_dir(), "{path} is neither a folder of images nor `fashion_mnist`");
    read_image_folder(data).with_context(|| format!("no images could be read from {path}"))
}
