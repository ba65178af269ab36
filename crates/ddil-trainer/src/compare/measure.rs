//! Samples and scores of everything that a comparison has.

use std::collections::BTreeMap;
use std::fs;

use ddil_data::{FashionMnist, ImageDataset, read_image_folder};
use ddil_files::Invalid;
use ddil_metrics::{FashionClassifier, FeatureExtractor, RawPixels};
use ddil_models::{Placement, weights};
use tch::{Device, Kind, Tensor};

use super::folder::ComparisonFolder;
use super::matrix::Extractor;
use super::record::Row;
use super::setting::{Setting, TeacherSamples};
use crate::config::{DataKind, DistillConfig, Precision, parse_device};
use crate::error::{Error, Result};
use crate::evaluation::{Reference, draw, shift};
use crate::pipeline::Pipeline;
use crate::results::Measurement;
use crate::sampling::SamplePlan;

/// Less coverage than that is a collapse: nine in ten real images have no sample near.
pub(super) const LEAST_COVERAGE: f64 = 0.1;

/// Samples of each model that are kept to be looked at.
pub(super) const SHOWN: i64 = 20;

const IMAGES: &str = "images";

/// What everything is compared with.
struct Real {
    train: ImageDataset,
    /// Held-out images, where there are some.
    test: Option<ImageDataset>,
    extractor: Box<dyn FeatureExtractor>,
    reference: Reference,
}

impl Real {
    fn open(setting: &Setting) -> Result<Self> {
        let path = setting.data.path.as_deref();
        let (train, test, name) = match (setting.data.kind, path) {
            (DataKind::FashionMnist, path) => {
                let FashionMnist { train, test } = FashionMnist::load(path)?;
                (train, Some(test), "fashion_mnist/test")
            }
            (DataKind::ImageFolder, path) => {
                let train = read_image_folder(path.unwrap_or(std::path::Path::new("")))?;
                let held_out = setting.evaluate.reference.as_deref();
                let test = held_out.map(read_image_folder).transpose()?;
                let name = if test.is_some() { "images/held_out" } else { "images/train" };
                (train, test, name)
            }
            (kind, _) => {
                return Err(Error::Invalid(Invalid::new(
                    "data.kind",
                    kind.as_str().to_owned(),
                    "fashion_mnist or image_folder: comparisons look at pixels",
                )));
            }
        };
        let extractor: Box<dyn FeatureExtractor> = match setting.evaluate.extractor {
            Extractor::FashionClassifier => Box::new(FashionClassifier::pretrained(Device::Cpu)?),
            Extractor::RawPixels => Box::new(RawPixels::new(train.image_shape())),
        };
        let compared = test.as_ref().unwrap_or(&train);
        let reference = Reference::new(name, &all(compared)?, &*extractor)?;
        Ok(Self { train, test, extractor, reference })
    }

    fn score(&self, images: &Tensor) -> Result<Measurement> {
        let scores = self.reference.score(images, &*self.extractor)?;
        Ok(Measurement::of("", &scores, &self.reference, &*self.extractor))
    }

    fn taught(&self, folder: &ComparisonFolder, taught: &TeacherSamples) -> Result<Reference> {
        Reference::new("teacher", &drawn(folder, taught)?, &*self.extractor)
    }
}

/// Training images against held-out ones, and one half of what is compared with against the other.
pub(super) fn real(setting: &Setting) -> Result<Vec<(String, Row)>> {
    let real = Real::open(setting)?;
    let mut rows = Vec::new();
    let mut add = |name: &str, measurement: Measurement| {
        let measurement = Measurement { method: "data".to_owned(), ..measurement };
        let row =
            Row { steps: 0, own_steps: true, collapsed: None, measurement: Some(measurement) };
        rows.push((name.to_owned(), row));
    };
    if real.test.is_some() {
        let n = i64::from(setting.evaluate.samples).min(real.train.len());
        add("training images", real.score(&real.train.range(0, n)?.x0)?);
    }
    let compared = all(real.test.as_ref().unwrap_or(&real.train))?;
    let half = compared.size()[0] / 2;
    let first = Reference::new(
        format!("{}, first half", real.reference.name),
        &compared.narrow(0, 0, half),
        &*real.extractor,
    )?;
    let scores = first.score(&compared.narrow(0, half, half), &*real.extractor)?;
    add("two halves", Measurement::of("", &scores, &first, &*real.extractor));
    Ok(rows)
}

/// Draws some samples of a teacher, kept as bytes, as a picture would be.
pub(super) fn draw_part(setting: &Setting, teacher: &TeacherSamples, start: u32) -> Result<()> {
    let folder = setting.folder.teacher(&teacher.key());
    fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    crate::files::write_json(&folder.join("samples.json"), teacher)?;
    let pipeline = read_model(&teacher.path, &teacher.device, true, teacher.precision)?;
    let plan = SamplePlan {
        guidance_scale: teacher.guidance_scale,
        thresholding: teacher.thresholding.clone(),
        batch_size: setting.evaluate.batch_size,
        seed: teacher.seed,
        ..SamplePlan::of(&pipeline, Some(teacher.steps))
    };
    let images = draw(&pipeline, &plan, teacher.total, start..teacher.end_of(start))?;
    if !is_finite(&images)? {
        return Err(Error::Invalid(Invalid::new(
            "teacher.path",
            teacher.path.display(),
            "a teacher whose samples are numbers",
        )));
    }
    save_images(&teacher.part(&setting.folder, start), &images)
}

/// The row of a teacher whose samples are drawn.
pub(super) fn teacher(
    setting: &Setting,
    teacher: &TeacherSamples,
    taught: &TeacherSamples,
    own_steps: bool,
) -> Result<Row> {
    let real = Real::open(setting)?;
    let images = drawn(&setting.folder, teacher)?;
    let frechet_to_teacher = if teacher == taught {
        None
    } else {
        let taught = real.taught(&setting.folder, taught)?;
        Some(taught.score(&images, &*real.extractor)?.frechet)
    };
    let measurement = Measurement {
        method: "teacher".to_owned(),
        thresholding: teacher.thresholding.clone(),
        guidance_scale: (teacher.guidance_scale != 1.0).then_some(teacher.guidance_scale),
        steps: teacher.steps,
        frechet_to_teacher,
        ..real.score(&images)?
    };
    Ok(row(teacher.steps, own_steps, measurement))
}

/// The rows of a trained cell, and its first samples into a file.
pub(super) fn cell(
    setting: &Setting,
    name: &str,
    config: &DistillConfig,
    taught: &TeacherSamples,
) -> Result<Vec<Row>> {
    let Setting { folder, evaluate, .. } = setting;
    let run = &config.run;
    let pipeline = read_model(&run.path(), &run.device, run.channels_last, run.precision)?;
    let real = Real::open(setting)?;
    let teacher = real.taught(folder, taught)?;
    let own = SamplePlan::of(&pipeline, None).steps;
    let mut rows = Vec::new();
    for steps in evaluate.step_counts(own) {
        let own_steps = steps == own;
        let plan = SamplePlan {
            batch_size: evaluate.batch_size,
            seed: evaluate.seed,
            ..SamplePlan::of(&pipeline, Some(steps))
        };
        let n = evaluate.samples_at(own_steps);
        tracing::info!("sampling {n} images in {steps} steps");
        let images = draw(&pipeline, &plan, evaluate.samples, 0..n)?;
        if own_steps {
            save_images(&folder.samples_of(name), &images.narrow(0, 0, SHOWN.min(i64::from(n))))?;
        }
        if !is_finite(&images)? {
            let collapsed = Some("samples that are not numbers".to_owned());
            rows.push(Row { steps, own_steps, collapsed, measurement: None });
            continue;
        }
        let mut measurement = real.score(&images)?.of_model(&pipeline.card, &plan);
        let to_teacher = teacher.score(&images, &*real.extractor)?.frechet;
        measurement.frechet_to_teacher = Some(to_teacher);
        if own_steps && evaluate.shift_samples > 0 {
            measurement.shift = shift(&pipeline, &plan, &real.train, evaluate.shift_samples)?;
        }
        rows.push(row(steps, own_steps, measurement));
    }
    Ok(rows)
}

/// A row with what makes it count as collapsed.
fn row(steps: u32, own_steps: bool, measurement: Measurement) -> Row {
    let coverage = measurement.coverage;
    let collapsed = (coverage < LEAST_COVERAGE)
        .then(|| format!("coverage {coverage:.3} is below {LEAST_COVERAGE}"));
    Row { steps, own_steps, collapsed, measurement: Some(measurement) }
}

fn read_model(
    path: &std::path::Path,
    device: &str,
    channels_last: bool,
    precision: Precision,
) -> Result<Pipeline> {
    let placement = Placement { device: parse_device(device)?, kind: Kind::Float, channels_last };
    Pipeline::read(path, placement, precision)
}

fn all(images: &ImageDataset) -> Result<Tensor> {
    Ok(images.range(0, images.len())?.x0)
}

fn is_finite(images: &Tensor) -> Result<bool> {
    let finite = || images.f_isfinite()?.f_all()?.f_int64_value(&[]);
    Ok(finite().map_err(Error::torch("is_finite"))? != 0)
}

/// Every part of a teacher's samples.
fn drawn(folder: &ComparisonFolder, teacher: &TeacherSamples) -> Result<Tensor> {
    let parts: Result<Vec<Tensor>> =
        teacher.parts().map(|start| load_images(&teacher.part(folder, start))).collect();
    Tensor::f_cat(&parts?, 0).map_err(Error::torch("drawn"))
}

/// The first samples of a teacher.
pub(super) fn first_drawn(folder: &ComparisonFolder, teacher: &TeacherSamples) -> Result<Tensor> {
    let images = load_images(&teacher.part(folder, 0))?;
    Ok(images.narrow(0, 0, SHOWN.min(images.size()[0])))
}

/// Writes images as bytes; what is no number becomes black.
fn save_images(path: &std::path::Path, images: &Tensor) -> Result<()> {
    let bytes = || {
        let levels = images.f_add_scalar(1)?.f_mul_scalar(127.5)?.f_nan_to_num(0.0, 255.0, 0.0)?;
        levels.f_clamp(0, 255)?.f_round()?.f_to_kind(Kind::Uint8)
    };
    let bytes = bytes().map_err(Error::torch("save_images"))?;
    Ok(weights::save(&[(IMAGES.to_owned(), bytes)], path, &BTreeMap::new())?)
}

/// Reads them again, `[n, channels, height, width]` in `[-1, 1]`.
pub(super) fn load_images(path: &std::path::Path) -> Result<Tensor> {
    let mut tensors = weights::read_all(path)?;
    let Some(bytes) = tensors.remove(IMAGES) else {
        let (path, reason) = (path.to_owned(), format!("it has no `{IMAGES}`"));
        return Err(Error::Tensors { action: "read", path, reason });
    };
    let images = || bytes.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1);
    images().map_err(Error::torch("load_images"))
}
