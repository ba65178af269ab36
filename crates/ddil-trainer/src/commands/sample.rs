//! `ddil sample`.

use std::process::ExitCode;

use anyhow::{bail, ensure};
use ddil_trainer::guide::Guide;
use ddil_trainer::picture::{Picture, save_each};
use ddil_trainer::sampling::{classes, generate, initial_noise, layout};
use tch::Device;

use super::open_model;
use crate::cli::SampleArgs;

pub(crate) fn run(args: &SampleArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.num_samples > 0, "--num-samples is 0; expected at least 1");
    let (pipeline, plan) = open_model(&args.model, &args.sampling)?;
    let num_classes = pipeline.card.class_names.len() as i64;
    if let Some(class) = args.class.filter(|class| !(0..num_classes).contains(class)) {
        bail!("--class is {class}; the model has {num_classes} classes, counted from 0");
    }
    let device = pipeline.network.placement().device;
    let (n, shape) = (args.num_samples, pipeline.card.image_shape);
    let noise = initial_noise(plan.seed, n, shape, device)?;
    let conditioning = classes(&pipeline.card, n, args.class, device);
    let samples = generate(
        &pipeline.network,
        &plan,
        &Guide::of_classes(&pipeline.card),
        &noise,
        &conditioning,
    )?;
    let samples = samples.to_device(Device::Cpu);
    let columns = if num_classes > 0 && args.class.is_none() { num_classes } else { 8 };
    Picture::grid(&samples, layout(columns as u32))?.save(&args.output)?;
    println!("{n} samples in {} steps: {}", plan.steps, args.output.display());
    if let Some(folder) = &args.folder {
        let files = save_each(&samples, folder, 0)?;
        println!("{} files in {}", files.len(), folder.display());
    }
    Ok(ExitCode::SUCCESS)
}
