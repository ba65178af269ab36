//! `ddil evaluate`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use ddil_data::{FashionMnist, read_image_folder};
use ddil_metrics::{FashionClassifier, FeatureExtractor};
use ddil_trainer::evaluation::{Reference, draw};
use ddil_trainer::pipeline::Pipeline;
use ddil_trainer::results::{Measurement, append, table};
use tch::{Device, Tensor};

use super::{open_model, say, set_threads};
use crate::cli::EvaluateArgs;

/// What generated images are compared with.
const REFERENCE: &str = "fashion_mnist/test";

pub(crate) fn run(args: &EvaluateArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.num_samples > 1, "--num-samples is {}; expected at least 2", args.num_samples);
    let subject = &args.subject;
    ensure!(
        subject == Path::new("data") || subject.is_dir(),
        "{} is neither a model folder nor a folder of images, nor `data`",
        subject.display()
    );
    let extractor = FashionClassifier::pretrained(Device::Cpu)?;
    let data = FashionMnist::load(None)?;
    let reference = Reference::new(REFERENCE, &all_images(&data.test)?, &extractor)?;
    let (name, measurement) = if args.subject == Path::new("data") {
        set_threads(args.sampling.threads)?;
        data_row(&data, args.num_samples, &reference, &extractor)?
    } else if Pipeline::is_at(&args.subject) {
        model_row(args, &reference, &extractor)?
    } else {
        set_threads(args.sampling.threads)?;
        folder_row(args, &reference, &extractor)?
    };
    if let Some(path) = &args.json {
        append(path, &measurement)?;
    }
    say(&table(&[(name, measurement)]))?;
    Ok(ExitCode::SUCCESS)
}

/// Training images against test images: what chance and nothing else gives.
pub(crate) fn data_row(
    data: &FashionMnist,
    n: u32,
    reference: &Reference,
    extractor: &dyn FeatureExtractor,
) -> anyhow::Result<(String, Measurement)> {
    let images = data.train.range(0, i64::from(n).min(data.train.len()))?.x0;
    let scores = reference.score(&images, extractor)?;
    Ok(("data".to_owned(), Measurement::of("data", &scores, reference, extractor)))
}

fn model_row(
    args: &EvaluateArgs,
    reference: &Reference,
    extractor: &dyn FeatureExtractor,
) -> anyhow::Result<(String, Measurement)> {
    let (pipeline, plan) = open_model(&args.subject, &args.sampling)?;
    ensure!(
        !pipeline.frame.class().is_text_to_image(),
        "{0} draws what it is asked for; draw with `ddil sample {0} --prompts-file .. --folder pictures`, then evaluate \
         that folder",
        args.subject.display()
    );
    let started = Instant::now();
    let images = draw(&pipeline, &plan, args.num_samples, 0..args.num_samples)?;
    eprintln!("{} samples in {:.1} s", args.num_samples, started.elapsed().as_secs_f64());
    let scores = reference.score(&images, extractor)?;
    let measurement =
        Measurement::of("", &scores, reference, extractor).of_model(&pipeline.card, &plan);
    Ok((measurement.method.clone(), measurement))
}

fn folder_row(
    args: &EvaluateArgs,
    reference: &Reference,
    extractor: &dyn FeatureExtractor,
) -> anyhow::Result<(String, Measurement)> {
    let folder = &args.subject;
    let images = read_image_folder(folder).with_context(|| {
        format!("{} is neither a model folder nor a folder of images", folder.display())
    })?;
    let scores = reference.score(&all_images(&images)?, extractor)?;
    Ok((folder.display().to_string(), Measurement::of("images", &scores, reference, extractor)))
}

/// Every image of a dataset, `[n, channels, height, width]` in `[-1, 1]`.
pub(crate) fn all_images(images: &ddil_data::ImageDataset) -> anyhow::Result<Tensor> {
    Ok(images.range(0, images.len())?.x0)
}
