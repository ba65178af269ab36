//! `ddil evaluate`.

mod real_images;
mod subject;

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::ensure;
use ddil_data::ImageDataset;
use ddil_evaluate::{
    Measurement, draw_observed, features_as_stored, features_of_files, score, shift,
};
use ddil_metrics::{FeatureExtractor, Reference};
use ddil_pipelines::{Pipeline, SamplePlan};
use tch::Tensor;

use self::real_images::RealImages;
use self::subject::Subject;
use super::{Bar, Calls, num_threads, print, sample_plan, start};
use crate::cli::EvaluateArgs;
use crate::exit_code::NOT_FINITE;
use crate::results::{details, shift_table, table};
use crate::sample_file;

/// A measurement and its name in the table.
type Row = (String, Measurement);

pub(crate) fn run(args: &EvaluateArgs) -> anyhow::Result<ExitCode> {
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
    start(&args.sampling.parent)?;
    let subject = Subject::open(args)?;
    if let Subject::Model(..) = subject {
        ensure_possible(args)?;
    }
    let real = RealImages::open(args, &subject)?;
    let (rows, exit_code) = match &subject {
        Subject::Data => {
            if let Some(reference) = &real.reference {
                save(args, reference)?;
            }
            (real.rows(args)?, ExitCode::SUCCESS)
        }
        Subject::Model(pipeline, plan) => model_rows(args, pipeline, plan, &real)?,
        Subject::Samples(images) => {
            let features = features_as_stored(images, &*real.extractor)?;
            (images_rows(args, &features, &real)?, ExitCode::SUCCESS)
        }
        Subject::Files(files) => {
            let threads = num_threads(args.sampling.threads);
            let bar = &mut Bar::default();
            let features = features_of_files(files, "images", &*real.extractor, threads, bar)?;
            (images_rows(args, &features, &real)?, ExitCode::SUCCESS)
        }
    };
    if let Some(path) = &args.json {
        rows.iter().try_for_each(|(_, measurement)| measurement.append_to(path))?;
    }
    if !rows.is_empty() {
        let parts = [table(&rows), details(&rows), shift_table(&rows)];
        print(&parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(exit_code)
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
    pipeline: &Pipeline,
    own: &SamplePlan,
    real: &RealImages,
) -> anyhow::Result<(Vec<Row>, ExitCode)> {
    ensure_same_shape(args, pipeline, real)?;
    let (mut rows, mut exit_code) = (Vec::new(), ExitCode::SUCCESS);
    let counts: BTreeSet<u32> = args.also_steps.iter().copied().chain([own.steps]).collect();
    for steps in counts {
        let is_own = steps == own.steps;
        let plan =
            if is_own { own.clone() } else { sample_plan(pipeline, &args.sampling, Some(steps))? };
        let n = if is_own { None } else { args.also_samples }.unwrap_or(args.num_samples);
        let images = drawn(pipeline, &plan, args.num_samples, n)?;
        if let Some(file) = args.keep.as_deref().filter(|_| is_own) {
            sample_file::write_first(file, &images)?;
        }
        if !sample_file::is_finite(&images)? {
            eprintln!(
                "error: samples in {steps} steps are NaN or infinite; the table has no row for them"
            );
            exit_code = ExitCode::from(NOT_FINITE);
            continue;
        }
        let features = features_as_stored(&images, &*real.extractor)?;
        if is_own && args.save_statistics.is_some() {
            let name = format!("{}, {steps} steps", args.subject.display());
            save(args, &Reference::new(name, &features, &*real.extractor)?)?;
        }
        let Some(measurement) = real.score("samples", &features, args.standard_errors)? else {
            continue;
        };
        let mut measurement = measurement.of_model(&pipeline.card, &plan);
        if let Some(train) = real.train.as_ref().filter(|_| is_own && args.shift_samples > 0) {
            measurement.shift = shift(pipeline, &plan, train, args.shift_samples)?;
        }
        rows.push((measurement.method.clone(), measurement));
    }
    Ok((rows, exit_code))
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

/// The first `n` of `total` samples, with a progress bar.
fn drawn(pipeline: &Pipeline, plan: &SamplePlan, total: u32, n: u32) -> anyhow::Result<Tensor> {
    tracing::info!("sampling {n} images in {} steps", plan.steps);
    let calls = Calls::of("evaluate", plan, n);
    Ok(draw_observed(pipeline, plan, total, 0..n, None, &|| calls.note())?)
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
