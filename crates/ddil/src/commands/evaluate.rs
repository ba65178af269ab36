//! `ddil evaluate`.

mod features;
mod prompted;
mod protocol;
mod real_images;
mod subject;

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use ddil_data::ImageDataset;
use ddil_evaluate::{Measurement, features_as_stored, score, shift};
use ddil_metrics::{FeatureExtractor, Reference};
use ddil_pipelines::{Pipeline, SamplePlan};
use ddil_trainer::Interrupt;
use tch::Tensor;

use self::features::Features;
use self::real_images::RealImages;
use self::subject::{Model, Subject};
use super::{num_threads, print, sample_plan, start};
use crate::cli::EvaluateArgs;
use crate::exit_code::{NOT_FINITE, TRY_AGAIN};
use crate::results::{class_table, details, prompt_table, shift_table, table};

/// A measurement and its name in the table.
type Row = (String, Measurement);

pub(crate) fn run(args: &EvaluateArgs) -> anyhow::Result<ExitCode> {
    let ended = measure(args);
    let stopped = ended.as_ref().err().and_then(|error| error.downcast_ref());
    if let Some(stopped @ ddil_evaluate::Error::Stopped { .. }) = stopped {
        eprintln!("{stopped}");
        return Ok(ExitCode::from(TRY_AGAIN));
    }
    ended
}

/// Rejects values that are never allowed.
fn ensure_usable(args: &EvaluateArgs) -> anyhow::Result<()> {
    ensure!(args.num_samples > 1, "--num-samples is {}; expected at least 2", args.num_samples);
    if let Some(path) = &args.save_statistics {
        ensure!(!path.exists(), "{} exists already; choose another file", path.display());
        ensure!(
            ddil_files::parent(path).is_dir(),
            "--save-statistics: the folder of {} does not exist; create it first",
            path.display()
        );
    }
    ensure!(
        args.standard_errors != 1,
        "--standard-errors is 1; expected at least 2 random halves, or 0 for none"
    );
    Ok(())
}

fn measure(args: &EvaluateArgs) -> anyhow::Result<ExitCode> {
    ensure_usable(args)?;
    start(&args.sampling.parent)?;
    let prompts = prompted::prompts(args)?;
    let interrupt = Interrupt::listen()?;
    let mut features = Features::new(args.features.as_deref(), &interrupt);
    let subject = Subject::open(args)?;
    if let Some(prompts) = prompts {
        let (rows, exit_code) = prompted::rows(args, &subject, prompts, &mut features)?;
        report(args, &rows)?;
        features.clear()?;
        return Ok(exit_code);
    }
    if let Subject::Model(_) = subject {
        ensure_possible(args)?;
    }
    let class_names = class_names_of(args, &subject)?;
    let real = RealImages::open(args, &subject, None, &mut features)?;
    let (rows, exit_code) = match &subject {
        Subject::Data => {
            if let Some(reference) = &real.reference {
                save(args, reference)?;
            }
            (real.rows(args)?, ExitCode::SUCCESS)
        }
        Subject::Model(model) => model_rows(args, model, &real, &mut features)?,
        Subject::Samples(images) => {
            (samples_rows(args, images, &class_names, &real)?, ExitCode::SUCCESS)
        }
        Subject::Files(files) => {
            // As a reference: statistics that are saved can be one.
            let files = &files.shuffled(0);
            let threads = num_threads(args.sampling.threads);
            let found = features.of_files(files, &*real.extractor, threads)?;
            (images_rows(args, &found, &real)?, ExitCode::SUCCESS)
        }
    };
    report(args, &rows)?;
    features.clear()?;
    Ok(exit_code)
}

/// Writes the rows to the file of --json, and prints them.
fn report(args: &EvaluateArgs, rows: &[Row]) -> anyhow::Result<()> {
    if let Some(path) = &args.json {
        rows.iter().try_for_each(|(_, measurement)| measurement.append_to(path))?;
    }
    if !rows.is_empty() {
        let parts =
            [table(rows), details(rows), class_table(rows), prompt_table(rows), shift_table(rows)];
        print(&parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(())
}

/// Writes a reference to the file of --save-statistics, if there is one.
fn save(args: &EvaluateArgs, reference: &Reference) -> anyhow::Result<()> {
    let Some(path) = &args.save_statistics else { return Ok(()) };
    reference.write(path)?;
    tracing::info!("statistics of {} written to {}", reference.name(), path.display());
    Ok(())
}

/// Training images against held-out ones: the distances due to chance and to the split.
pub(crate) fn data_row(
    train: &ImageDataset,
    n: u32,
    reference: &Reference,
    extractor: &dyn FeatureExtractor,
) -> anyhow::Result<Row> {
    let images = train.range(0, i64::from(n).min(train.len()))?.x0;
    let scores = score(reference, &features_as_stored(&images, extractor)?)?;
    Ok(("data".to_owned(), Measurement::of("data", &scores, reference, extractor)))
}

/// One row for each number of steps. Samples that are not finite have no row; the exit code reports them.
fn model_rows(
    args: &EvaluateArgs,
    model: &Model,
    real: &RealImages,
    features: &mut Features,
) -> anyhow::Result<(Vec<Row>, ExitCode)> {
    let Model { pipeline, plan: own, .. } = model;
    ensure_same_shape(args, pipeline, real)?;
    let (mut rows, mut exit_code) = (Vec::new(), ExitCode::SUCCESS);
    for steps in step_counts(args, own) {
        let is_own = steps == own.steps;
        let plan =
            if is_own { own.clone() } else { sample_plan(pipeline, &args.sampling, Some(steps))? };
        let n = if is_own { None } else { args.also_samples }.unwrap_or(args.num_samples);
        let keep = args.keep.as_deref().filter(|_| is_own);
        let found = features.of_model(args, model, &plan, n, &*real.extractor, keep);
        let features = match found {
            Err(error) if is_not_finite(&error) => {
                eprintln!(
                    "error: samples in {steps} steps are NaN or infinite; the table has no row for them"
                );
                exit_code = ExitCode::from(NOT_FINITE);
                continue;
            }
            features => features?,
        };
        if is_own && args.save_statistics.is_some() {
            let name = format!("{}, {steps} steps", args.subject.display());
            save(args, &Reference::new(name, &features, &*real.extractor)?)?;
        }
        let Some(measurement) = real.score("samples", &features, args.standard_errors)? else {
            continue;
        };
        let mut measurement = measurement.of_model(&pipeline.card, &plan);
        real.add_classes(&mut measurement, &features, &pipeline.card.class_names)?;
        if let Some(train) = real.train.as_ref().filter(|_| is_own && args.shift_samples > 0) {
            measurement.shift = shift(pipeline, &plan, train, args.shift_samples)?;
        }
        rows.push((measurement.method.clone(), measurement));
    }
    Ok((rows, exit_code))
}

fn is_not_finite(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ddil_evaluate::Error::NotFinite { .. }))
}

/// The numbers of steps to measure at, each once, in order.
fn step_counts(args: &EvaluateArgs, own: &SamplePlan) -> BTreeSet<u32> {
    args.also_steps.iter().copied().chain([own.steps]).collect()
}

/// Rejects invalid combinations before anything is read or drawn.
fn ensure_possible(args: &EvaluateArgs) -> anyhow::Result<()> {
    if let Some(samples) = args.also_samples {
        ensure!(
            (2..=args.num_samples).contains(&samples),
            "--also-samples is {samples}; expected 2 to --num-samples, which is {}",
            args.num_samples
        );
    }
    ensure!(
        args.shift_samples != 1,
        "--shift-samples is 1; expected at least 2, or 0 to leave the shift out"
    );
    Ok(())
}

/// A model whose images have another shape than the data was trained on other data.
fn ensure_same_shape(
    args: &EvaluateArgs,
    pipeline: &Pipeline,
    real: &RealImages,
) -> anyhow::Result<()> {
    let Some(train) = &real.train else { return Ok(()) };
    let (drawn, data) = (pipeline.card.image_shape, train.image_shape());
    let shown = |[channels, height, width]: [i64; 3]| format!("{channels} x {height} x {width}");
    ensure!(
        drawn == data,
        "{} draws images of {} (channels, height, width), and those of the data are {}; name the model's own data with \
         --data, a folder of images or the config of its run",
        args.subject.display(),
        shown(drawn),
        shown(data)
    );
    Ok(())
}

/// The names of the classes of samples in files: those of the model of --classes-of; empty without it.
fn class_names_of(args: &EvaluateArgs, subject: &Subject) -> anyhow::Result<Vec<String>> {
    let Some(model) = &args.classes_of else { return Ok(Vec::new()) };
    ensure!(
        matches!(subject, Subject::Samples(_)),
        "--classes-of is for a folder of .safetensors files of `ddil sample`, and {} is none; a model's own classes are known",
        args.subject.display()
    );
    Ok(Pipeline::open_without_weights(model).context("--classes-of")?.card.class_names)
}

/// The row of a folder of sample files.
fn samples_rows(
    args: &EvaluateArgs,
    images: &Tensor,
    class_names: &[String],
    real: &RealImages,
) -> anyhow::Result<Vec<Row>> {
    let features = features_as_stored(images, &*real.extractor)?;
    let mut rows = images_rows(args, &features, real)?;
    for (_, measurement) in &mut rows {
        real.add_classes(measurement, &features, class_names)?;
        if let (Some(model), None) = (&args.classes_of, measurement.class_agreement) {
            tracing::warn!(
                "--classes-of has no effect: {} has no classifier of the classes of {}",
                real.extractor.id(),
                model.display()
            );
        }
    }
    Ok(rows)
}

/// The row of a folder of images.
fn images_rows(
    args: &EvaluateArgs,
    features: &Tensor,
    real: &RealImages,
) -> anyhow::Result<Vec<Row>> {
    let name = args.subject.display().to_string();
    if args.save_statistics.is_some() {
        save(args, &Reference::new(&*name, features, &*real.extractor)?)?;
    }
    let measurement = real.score("images", features, args.standard_errors)?;
    Ok(measurement.map(|measurement| (name, measurement)).into_iter().collect())
}
