//! The images that others are compared with, and the features on which they are compared.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use ddil_data::{FashionMnist, ImageDataset};
use ddil_evaluate::{
    ExtractorChoice, Measurement, ReferenceChoice, SamplesOfClasses, few_images,
    reference_of_dataset, reference_of_images, score, warnings_of,
};
use ddil_files::settings::Settings;
use ddil_metrics::{FASHION_CLASSES, FeatureExtractor, Reference};
use ddil_trainer::config::{DataKind, DataSection, parse_device};
use ddil_trainer::{images_for, labels_for, read_fashion_mnist, read_images};
use serde::Deserialize;
use tch::Tensor;

use super::features::Features;
use super::protocol;
use super::subject::{Model, Subject};
use crate::cli::EvaluateArgs;
use crate::commands::{Bar, num_threads};
use crate::sample_file;

const FASHION_MNIST: &str = "fashion_mnist";

/// The real images, and the features on which other images are compared with them.
pub(super) struct RealImages {
    /// Training images, if something requires them; for the covariate shift, those that the run used, with its labels.
    pub(super) train: Option<ImageDataset>,
    pub(super) extractor: Box<dyn FeatureExtractor>,
    /// None if features are only to be saved.
    pub(super) reference: Option<Reference>,
    /// Whether the reference contains other images than the training data.
    is_held_out: bool,
    teacher: Option<Reference>,
    /// Labels of the classes that the data of the subject's run lack.
    missing_classes: Vec<usize>,
}

/// Images in memory, as the `[data]` table of a config or the command line names them.
struct Loaded {
    train: ImageDataset,
    held_out: Option<ImageDataset>,
    name: String,
}

impl RealImages {
    /// `drawn` is the shape of the images of a text-to-image model: channels, height, width.
    pub(super) fn open(
        args: &EvaluateArgs,
        subject: &Subject,
        drawn: Option<[i64; 3]>,
        features: &mut Features,
    ) -> anyhow::Result<Self> {
        let data = data_of(args, subject)?;
        let is_required = requires_data(args, subject, data.is_some())?;
        let size = match &data {
            Some((section, _)) if section.kind == DataKind::FashionMnist => section.size(),
            _ => fashion_mnist_of(subject).size(),
        };
        let choice = choice(args, data.as_ref().map(|(section, _)| section.kind))?.at_size(size);
        let named = data.as_ref().filter(|_| is_required);
        let loaded = named.map(|(section, place)| load(section, place)).transpose()?;
        let shape = match subject {
            Subject::Data => loaded.as_ref().map(|loaded| loaded.train.image_shape()),
            other => drawn.map_or_else(
                || other.image_shape(choice.name == "raw_pixels"),
                |shape| Ok(Some(shape)),
            )?,
        };
        let device = parse_device(&args.sampling.device)?;
        let extractor = choice.open(shape, device).map_err(as_option)?;
        let (reference, is_held_out) =
            open_reference(args, size, loaded.as_ref(), &*extractor, features)?;
        for warning in reference.iter().flat_map(|own| warnings_of(own, &*extractor)) {
            tracing::warn!("{warning}");
        }
        let teacher = args.teacher_samples.as_deref().map(|folder| {
            let images = sample_file::read_folder(folder)?;
            anyhow::Ok(reference_of_images("teacher", &images, &*extractor)?)
        });
        let train = loaded.map(|loaded| loaded.train);
        let missing_classes = match subject {
            Subject::Model(model) => missing_classes(model),
            _ => Vec::new(),
        };
        let is_folder = data.as_ref().is_some_and(|(of, _)| of.kind == DataKind::ImageFolder);
        let train = if args.shift_samples > 0 { of_run(train, data, subject)? } else { train };
        // The first images of a folder of classes are those of one class; Fashion-MNIST's are in random order.
        let train = match train {
            Some(images) if is_folder => Some(images.shuffled(0)?),
            train => train,
        };
        let teacher = teacher.transpose()?;
        Ok(Self { train, extractor, reference, is_held_out, teacher, missing_classes })
    }

    /// Adds what the classes of a model's samples tell; `features` are those of its samples, of which the classes
    /// alternate.
    pub(super) fn add_classes(
        &self,
        measurement: &mut Measurement,
        features: &Tensor,
        class_names: &[String],
    ) -> anyhow::Result<()> {
        if class_names.is_empty() {
            return Ok(());
        }
        let (samples, extractor) =
            (SamplesOfClasses::new(features, class_names)?, &*self.extractor);
        measurement.class_agreement = samples.agreement(extractor)?;
        let missing = &self.missing_classes;
        // Two samples of each class or more: a covariance requires two, and fewer are too few for any metric.
        if !missing.is_empty() && features.size()[0] >= 2 * class_names.len() as i64 {
            let found = samples.of_missing(missing, self.teacher.as_ref(), extractor)?;
            measurement.missing_classes = Some(found);
        }
        Ok(())
    }

    /// Compares features with those of the reference, and with the teacher's if there are any.
    pub(super) fn score(
        &self,
        method: &str,
        features: &Tensor,
        halves: u32,
    ) -> anyhow::Result<Option<Measurement>> {
        let Some(reference) = &self.reference else { return Ok(None) };
        if let Some(warning) = few_images(method, features.size()[0], self.extractor.dim()) {
            tracing::warn!("{warning}");
        }
        let scores = score(reference, features)?;
        let mut measurement = Measurement::of(method, &scores, reference, &*self.extractor);
        if let Some(teacher) = &self.teacher {
            measurement.frechet_to_teacher = Some(score(teacher, features)?.frechet);
        }
        if halves > 0 {
            measurement.add_standard_errors(reference, features, halves).with_context(|| {
                format!(
                    "--standard-errors cannot be measured on halves of {} images",
                    features.size()[0]
                )
            })?;
        }
        Ok(Some(measurement))
    }

    /// Compares training images with held-out ones, and one half of the reference with the other.
    pub(super) fn rows(&self, args: &EvaluateArgs) -> anyhow::Result<Vec<super::Row>> {
        let (Some(train), Some(reference)) = (&self.train, &self.reference) else {
            bail!("`data` requires --data");
        };
        let mut rows = Vec::new();
        if self.is_held_out {
            rows.push(super::data_row(train, args.num_samples, reference, &*self.extractor)?);
        } else {
            ensure!(
                args.halves,
                "there are no held-out images to compare the training images with; pass --reference with a folder of them, \
                 or --halves"
            );
        }
        if args.halves {
            let features = reference
                .features()
                .context("--halves requires images, and not statistics alone")?;
            let half = features.size()[0] / 2;
            let [first, second] = [0, half].map(|start| features.narrow(0, start, half));
            let name = format!("{}, first half", reference.name());
            let first = Reference::new(name, &first, &*self.extractor)?;
            let scores = score(&first, &second)?;
            let measurement = Measurement::of("data", &scores, &first, &*self.extractor);
            rows.push(("two halves".to_owned(), measurement));
        }
        Ok(rows)
    }
}

/// Whether images of the data are required; an error if they are and there are none.
fn requires_data(args: &EvaluateArgs, subject: &Subject, has_data: bool) -> anyhow::Result<bool> {
    let has_prompts = args.prompting.prompts.is_some();
    // Images of prompts may be measured without others.
    let saves_only =
        args.reference.is_none() && (args.save_statistics.is_some() || has_prompts) && !has_data;
    let is_required = args.shift_samples > 0
        || matches!(subject, Subject::Data)
        || (args.reference.is_none() && !saves_only);
    ensure!(
        has_data || !is_required,
        "there are no images to compare {} with; expected --reference (a folder, or a file of statistics) or --data",
        args.subject.display()
    );
    Ok(is_required)
}

/// The reference of the command line, or else of the data; and whether it contains other images than the training data.
/// Fashion-MNIST has the size of the data.
fn open_reference(
    args: &EvaluateArgs,
    size: Option<[i64; 2]>,
    loaded: Option<&Loaded>,
    extractor: &dyn FeatureExtractor,
    features: &mut Features,
) -> anyhow::Result<(Option<Reference>, bool)> {
    Ok(match (&args.reference, loaded) {
        (Some(path), _) => {
            let threads = num_threads(args.sampling.threads);
            let bar = &mut Bar::new(features.interrupt);
            let store = Some(&mut features.store);
            let opened = ReferenceChoice::named(path)
                .and_then(|choice| choice.at_size(size).open(extractor, threads, store, bar));
            (Some(opened.map_err(as_option)?), true)
        }
        (None, Some(Loaded { train, held_out, name })) => {
            let compared = held_out.as_ref().unwrap_or(train);
            // As the training images, of which metrics take the first.
            let compared = if held_out.is_some() { compared } else { &compared.shuffled(0)? };
            let bar = &mut Bar::new(features.interrupt);
            let reference = reference_of_dataset(name, compared, extractor, bar)?;
            (Some(reference), held_out.is_some())
        }
        (None, None) => (None, false),
    })
}

/// The extractor of the command line; the classifier of Fashion-MNIST is the default for its images alone.
fn choice(args: &EvaluateArgs, data: Option<DataKind>) -> anyhow::Result<ExtractorChoice> {
    let is_fashion = match &args.reference {
        Some(reference) => reference == Path::new(FASHION_MNIST),
        None => data == Some(DataKind::FashionMnist),
    };
    let name = match &args.extractor {
        Some(name) => name.clone(),
        None if is_fashion => "fashion_classifier".to_owned(),
        None => bail!(
            "--extractor is not set; expected a TorchScript file such as inception-2015-12-05.pt, a transformers folder of \
             CLIP or DINOv2, or `raw_pixels` for tiny images (`fashion_classifier` is the default for Fashion-MNIST alone)"
        ),
    };
    Ok(ExtractorChoice::new(name)
        .with_input(protocol::extractor_input(args))
        .with_return_features(args.return_features))
}

/// An error with the settings named as options: `--extractor-input`.
pub(super) fn as_option(error: ddil_evaluate::Error) -> ddil_evaluate::Error {
    error.with_settings_named(|field| format!("--{}", field.replace('_', "-")))
}

/// The data of the command line, of a run, or Fashion-MNIST for a model of its classes; with the place it is named in.
fn data_of(
    args: &EvaluateArgs,
    subject: &Subject,
) -> anyhow::Result<Option<(DataSection, PathBuf)>> {
    if args.prompting.prompts.is_some() {
        return Ok(None);
    }
    if let Some(data) = &args.data {
        let section = match data.to_str() {
            Some(FASHION_MNIST) => fashion_mnist_of(subject),
            _ => data_section(data)?,
        };
        return Ok(Some((section, data.clone())));
    }
    let fashion_mnist = || Some((fashion_mnist_of(subject), PathBuf::from(FASHION_MNIST)));
    Ok(match subject {
        Subject::Data => fashion_mnist(),
        Subject::Model(model) => {
            if let Some(config) = model.source.config() {
                Some((data_section(&config)?, config))
            } else if model.pipeline.card.class_names == FASHION_CLASSES {
                fashion_mnist()
            } else {
                None
            }
        }
        Subject::Samples(_) | Subject::Files(_) => None,
    })
}

/// Fashion-MNIST, at the size of the images that a model of its classes draws.
fn fashion_mnist_of(subject: &Subject) -> DataSection {
    let Subject::Model(model) = subject else { return DataSection::default() };
    let card = &model.pipeline.card;
    let [_, height, width] = card.image_shape;
    let is_scaled =
        card.class_names == FASHION_CLASSES && height == width && height != FashionMnist::SIDE;
    let resolution = u32::try_from(height).ok().filter(|_| is_scaled);
    DataSection { resolution, ..DataSection::default() }
}

/// The training images that a model's run used, with the labels of the model: a label means what it meant in the run.
fn of_run(
    train: Option<ImageDataset>,
    data: Option<(DataSection, PathBuf)>,
    subject: &Subject,
) -> anyhow::Result<Option<ImageDataset>> {
    Ok(match (train, data, subject) {
        (Some(train), Some((section, _)), Subject::Model(model)) => {
            Some(images_for(&train, &section, &model.pipeline)?)
        }
        (train, ..) => train,
    })
}

/// Labels of the model's classes that the data of its run lack; none, with a warning, if these data cannot be read.
fn missing_classes(model: &Model) -> Vec<usize> {
    let count = model.pipeline.card.class_names.len();
    let Some(config) = model.source.config().filter(|_| count > 0) else { return Vec::new() };
    let labels = data_section(&config)
        .and_then(|section| Ok(labels_for(&section, &model.pipeline)?))
        .unwrap_or_else(|error| {
            tracing::warn!(
                "the classes that the data of the run lack are not measured, because the data cannot be read: {error:#}"
            );
            None
        });
    let Some(labels) = labels else { return Vec::new() };
    let present: BTreeSet<i64> = labels.into_iter().collect();
    (0..count).filter(|&label| !present.contains(&(label as i64))).collect()
}

/// The data named on the command line, or in a config file.
fn data_section(data: &Path) -> anyhow::Result<DataSection> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        data: DataSection,
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

fn load(section: &DataSection, place: &Path) -> anyhow::Result<Loaded> {
    Ok(match (section.kind, &section.path) {
        (DataKind::FashionMnist, _) => {
            let data = read_fashion_mnist(section)?;
            let name = data.test_name();
            Loaded { train: data.train, held_out: Some(data.test), name }
        }
        (DataKind::ImageFolder, Some(_)) => {
            Loaded { train: read_images(section)?, held_out: None, name: "images/train".to_owned() }
        }
        (kind, _) => bail!(
            "--data {}: the kind of data is {}, which has no images to compare with; expected fashion_mnist or \
             image_folder with a path",
            place.display(),
            kind.as_str()
        ),
    })
}
