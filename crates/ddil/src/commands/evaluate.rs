//! `ddil evaluate`.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

use crate::compare::Extractor;
use crate::evaluation::{Reference, draw_observed, shift};
use crate::exit_code::NOT_FINITE;
use crate::results::{Measurement, append, shift_table, table};
use crate::sample_file;
use anyhow::{Context, bail, ensure};
use ddil_data::{FashionMnist, ImageDataset, read_image_folder};
use ddil_files::settings::Settings;
use ddil_metrics::{FashionClassifier, FeatureExtractor, RawPixels};
use ddil_pipelines::{Pipeline, SamplePlan};
use ddil_trainer::config::{DataKind, DataSection};
use serde::Deserialize;
use tch::{Device, Tensor};

use super::{Calls, open_model, print, sample_plan, set_threads, start};
use crate::cli::EvaluateArgs;

/// A measurement and its name in the table.
type Row = (String, Measurement);

pub(crate) fn run(args: &EvaluateArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.num_samples > 1, "--num-samples is {}; expected at least 2", args.num_samples);
    let subject = &args.subject;
    ensure!(
        subject == Path::new("data") || subject.is_dir(),
        "{} is not a folder; expected a model folder, a run folder, a folder of images, or `data`",
        subject.display()
    );
    start(&args.sampling.parent)?;
    let real = RealImages::open(args)?;
    let (rows, exit_code) = if subject == Path::new("data") {
        set_threads(args.sampling.threads)?;
        (real.rows(args)?, ExitCode::SUCCESS)
    } else if Pipeline::is_at(subject) {
        model_rows(args, &real)?
    } else {
        set_threads(args.sampling.threads)?;
        (vec![folder_row(args, &real)?], ExitCode::SUCCESS)
    };
    if let Some(path) = &args.json {
        rows.iter().try_for_each(|(_, measurement)| append(path, measurement))?;
    }
    let shift = shift_table(&rows);
    let shift = if shift.is_empty() { shift } else { format!("\n{shift}") };
    print(&format!("{}{shift}", table(&rows)))?;
    Ok(exit_code)
}

/// The real images, and the features on which other images are compared with them.
struct RealImages {
    train: ImageDataset,
    /// Held-out images, if there are any.
    held_out: Option<ImageDataset>,
    extractor: Box<dyn FeatureExtractor>,
    reference: Reference,
    teacher: Option<Reference>,
}

impl RealImages {
    fn open(args: &EvaluateArgs) -> anyhow::Result<Self> {
        let extractor = extractor(&args.extractor)?;
        let data = data_section(&args.data)?;
        let held_out = args.reference.as_deref();
        let (train, held_out, name) = match (data.kind, data.path.as_deref()) {
            (DataKind::FashionMnist, path) => {
                ensure!(
                    held_out.is_none(),
                    "--reference is for a folder of images; fashion_mnist has its own test images"
                );
                let FashionMnist { train, test } = FashionMnist::from_folder(path)?;
                (train, Some(test), "fashion_mnist/test")
            }
            (DataKind::ImageFolder, Some(path)) => {
                let held_out = held_out.map(read_image_folder).transpose()?;
                let name = if held_out.is_some() { "images/held_out" } else { "images/train" };
                (read_image_folder(path)?, held_out, name)
            }
            (kind, _) => bail!(
                "--data {}: data.kind = {} has no images to compare with; expected fashion_mnist, or image_folder with \
                 a path",
                args.data.display(),
                kind.as_str()
            ),
        };
        let extractor: Box<dyn FeatureExtractor> = match extractor {
            Extractor::FashionClassifier => Box::new(FashionClassifier::pretrained(Device::Cpu)?),
            Extractor::RawPixels => Box::new(RawPixels::new(train.image_shape())),
        };
        let compared = held_out.as_ref().unwrap_or(&train);
        let reference = Reference::new(name, &all_images(compared)?, &*extractor)?;
        let teacher = args.teacher_samples.as_deref().map(|folder| {
            Ok::<_, anyhow::Error>(Reference::new(
                "teacher",
                &sample_file::read_folder(folder)?,
                &*extractor,
            )?)
        });
        let teacher = teacher.transpose()?;
        Ok(Self { train, held_out, extractor, reference, teacher })
    }

    /// Compares images with the held-out ones, and with the teacher's samples if there are any.
    fn score(&self, method: &str, images: &Tensor) -> anyhow::Result<Measurement> {
        let scores = self.reference.score(images, &*self.extractor)?;
        let mut measurement = Measurement::of(method, &scores, &self.reference, &*self.extractor);
        if let Some(teacher) = &self.teacher {
            measurement.frechet_to_teacher = Some(teacher.score(images, &*self.extractor)?.frechet);
        }
        Ok(measurement)
    }

    /// Compares training images with held-out ones, and one half of the reference with the other.
    fn rows(&self, args: &EvaluateArgs) -> anyhow::Result<Vec<Row>> {
        let mut rows = Vec::new();
        if self.held_out.is_some() {
            rows.push(data_row(&self.train, args.num_samples, &self.reference, &*self.extractor)?);
        } else {
            ensure!(
                args.halves,
                "{} has no held-out images to compare its training images with; add --reference with a folder of them, or \
                 --halves",
                args.data.display()
            );
        }
        if args.halves {
            let compared = all_images(self.held_out.as_ref().unwrap_or(&self.train))?;
            let half = compared.size()[0] / 2;
            let name = format!("{}, first half", self.reference.name);
            let first = Reference::new(name, &compared.narrow(0, 0, half), &*self.extractor)?;
            let scores = first.score(&compared.narrow(0, half, half), &*self.extractor)?;
            let measurement = Measurement::of("data", &scores, &first, &*self.extractor);
            rows.push(("two halves".to_owned(), measurement));
        }
        Ok(rows)
    }
}

fn extractor(name: &str) -> anyhow::Result<Extractor> {
    Extractor::ALL.into_iter().find(|known| known.as_str() == name).with_context(|| {
        let known = Extractor::ALL.map(Extractor::as_str).join("` or `");
        format!("--extractor is `{name}`; expected `{known}`")
    })
}

/// The data named on the command line, or in a config file given there.
fn data_section(data: &Path) -> anyhow::Result<DataSection> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        data: DataSection,
    }
    if data == Path::new("fashion_mnist") {
        return Ok(DataSection::default());
    }
    if data.extension().is_some_and(|extension| extension == "toml") {
        return Ok(Settings::from_file(data)?.build::<Config>()?.data);
    }
    ensure!(
        data.is_dir(),
        "--data is {}; expected `fashion_mnist`, a folder of images, or a config file (.toml) with a [data] table",
        data.display()
    );
    let path = Some(data.to_owned());
    Ok(DataSection { kind: DataKind::ImageFolder, path, ..DataSection::default() })
}

/// Training images against held-out ones: the distances due to chance and to the split.
pub(crate) fn data_row(
    train: &ImageDataset,
    n: u32,
    reference: &Reference,
    extractor: &dyn FeatureExtractor,
) -> anyhow::Result<Row> {
    let images = train.range(0, i64::from(n).min(train.len()))?.x0;
    let scores = reference.score(&images, extractor)?;
    Ok(("data".to_owned(), Measurement::of("data", &scores, reference, extractor)))
}

/// One row for each number of steps. Samples that are not finite have no row; the exit code reports them.
fn model_rows(args: &EvaluateArgs, real: &RealImages) -> anyhow::Result<(Vec<Row>, ExitCode)> {
    let (pipeline, own) = open_model(&args.subject, &args.sampling)?;
    ensure_comparable(args, &pipeline, real)?;
    let (mut rows, mut exit_code) = (Vec::new(), ExitCode::SUCCESS);
    let counts: BTreeSet<u32> = args.also_steps.iter().copied().chain([own.steps]).collect();
    for steps in counts {
        let is_own = steps == own.steps;
        let plan =
            if is_own { own.clone() } else { sample_plan(&pipeline, &args.sampling, Some(steps))? };
        let n = if is_own { None } else { args.also_samples }.unwrap_or(args.num_samples);
        let images = drawn(&pipeline, &plan, args.num_samples, n)?;
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
        let mut measurement = real.score("", &images)?.of_model(&pipeline.card, &plan);
        if is_own && args.shift_samples > 0 {
            measurement.shift = shift(&pipeline, &plan, &real.train, args.shift_samples)?;
        }
        rows.push((measurement.method.clone(), measurement));
    }
    Ok((rows, exit_code))
}

/// Rejects invalid combinations before anything is drawn.
fn ensure_comparable(
    args: &EvaluateArgs,
    pipeline: &Pipeline,
    real: &RealImages,
) -> anyhow::Result<()> {
    let model = args.subject.display();
    ensure!(
        !pipeline.parts.class().is_text_to_image(),
        "{model} requires prompts; draw samples with `ddil sample {model} --prompts-file prompts.txt --folder images`, \
         then evaluate that folder"
    );
    if let Some(samples) = args.also_samples {
        ensure!(
            (2..=args.num_samples).contains(&samples),
            "--also-samples is {samples}; expected 2 to --num-samples, which is {}",
            args.num_samples
        );
    }
    ensure!(
        args.shift_samples != 1,
        "--shift-samples is 1; expected at least 2, or 0 to skip the shift"
    );
    let (drawn, data) = (pipeline.card.image_shape, real.train.image_shape());
    let shown = |[channels, height, width]: [i64; 3]| format!("{channels} x {height} x {width}");
    ensure!(
        drawn == data,
        "{model} draws images of {} (channels x height x width), but those of {} are {}; set --data to the model's own \
         data: a folder of images, or the config of its run",
        shown(drawn),
        args.data.display(),
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

fn folder_row(args: &EvaluateArgs, real: &RealImages) -> anyhow::Result<Row> {
    let folder = &args.subject;
    let images = if sample_file::list(folder).is_empty() {
        let images = read_image_folder(folder).with_context(|| {
            format!(
                "{} is neither a model folder, nor a run folder with a model, nor a folder of images",
                folder.display()
            )
        })?;
        all_images(&images)?
    } else {
        sample_file::read_folder(folder)?
    };
    Ok((folder.display().to_string(), real.score("images", &images)?))
}

/// Every image of a dataset, `[n, channels, height, width]` in `[-1, 1]`.
pub(crate) fn all_images(images: &ImageDataset) -> anyhow::Result<Tensor> {
    Ok(images.range(0, images.len())?.x0)
}
