//! Evaluation of the moving average during a run.

use std::fmt;
use std::thread;

use ddil_evaluate::{
    Drawing, ExtractorChoice, FeatureRows, FeatureStore, Metric, Monitor, ReferenceChoice, Scores,
    features_of_drawing, reference_of_dataset, score, warnings_of,
};
use ddil_files::{Invalid, listed};
use ddil_metrics::{FeatureExtractor, Reference};
use tch::Device;

use crate::config::{DataKind, DataSection, EvaluateSection, OutputSection, RunSection};
use crate::data::read_images;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::progress::Progress;

/// The tables of a config on which an evaluation depends.
#[derive(Clone, Copy)]
pub(crate) struct EvaluationConfig<'a> {
    pub(crate) run: &'a RunSection,
    pub(crate) data: &'a DataSection,
    pub(crate) evaluate: &'a EvaluateSection,
    pub(crate) output: &'a OutputSection,
}

/// The network of features, and the images that samples are compared with.
pub(crate) struct Evaluator {
    extractor: Box<dyn FeatureExtractor>,
    reference: Reference,
}

impl fmt::Debug for Evaluator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evaluator").field("extractor", &self.extractor.id()).finish_non_exhaustive()
    }
}

impl EvaluationConfig<'_> {
    /// Opens the extractor, for images of `shape`, and the reference; none if nothing is evaluated.
    pub(crate) fn open(
        &self,
        shape: Option<[i64; 3]>,
        device: Device,
        interrupt: &Interrupt,
    ) -> Result<Option<Evaluator>> {
        if self.evaluate.interval == 0 {
            return Ok(None);
        }
        let extractor = self.extractor().open(shape, device).map_err(in_table)?;
        let monitor = &mut Watched::new(interrupt);
        let reference = if self.compares_scaled_images() {
            // Read again and not stored: scaled images have no files of their own.
            let images = read_images(self.data)?.shuffled(0)?;
            reference_of_dataset("images/train", &images, &*extractor, monitor).map_err(in_table)?
        } else {
            // References of a few thousand images and more are computed once for all runs.
            let mut store = FeatureStore::in_cache();
            let (choice, threads) = (self.reference()?, self.num_threads());
            choice.open(&*extractor, threads, Some(&mut store), monitor).map_err(in_table)?
        };
        for warning in warnings_of(&reference, &*extractor) {
            tracing::warn!("evaluate: {warning}");
        }
        let excluded = &self.data.exclude_classes;
        if self.evaluate.reference.is_none() && !excluded.is_empty() {
            tracing::warn!(
                "evaluate: the reference contains the classes that data.exclude_classes leaves out, {}; \
                 evaluate.reference names other images",
                listed(excluded)
            );
        }
        self.ensure_metric(reference.features().is_some())?;
        Ok(Some(Evaluator { extractor, reference }))
    }

    /// Checks what [`open`](Self::open) would open, without computing features of a folder.
    pub(crate) fn check(&self, shape: Option<[i64; 3]>, device: Device) -> Result<()> {
        if self.evaluate.interval == 0 {
            return Ok(());
        }
        let extractor = self.extractor().open(shape, device).map_err(in_table)?;
        let has_features = self.reference()?.check(&*extractor).map_err(in_table)?;
        self.ensure_metric(has_features)
    }

    fn ensure_metric(&self, has_features: bool) -> Result<()> {
        match self.output.checkpoints.keep_best {
            Some(metric) if metric != Metric::Frechet && !has_features => {
                let expected = "frechet: the reference contains statistics alone";
                let field = "output.checkpoints.keep_best";
                Err(Invalid::new(field, metric.as_str(), expected).into())
            }
            _ => Ok(()),
        }
    }

    /// Whether the reference is the training images as the run scales them: files of another size would have other detail.
    fn compares_scaled_images(&self) -> bool {
        let is_folder = self.data.kind == DataKind::ImageFolder;
        self.evaluate.reference.is_none() && is_folder && self.data.resolution.is_some()
    }

    fn extractor(&self) -> ExtractorChoice {
        self.evaluate.extractor().at_size(self.size_of_fashion_mnist())
    }

    /// The size to which Fashion-MNIST is scaled; none for its own, and for other data.
    fn size_of_fashion_mnist(&self) -> Option<[i64; 2]> {
        self.data.size().filter(|_| self.data.kind == DataKind::FashionMnist)
    }

    /// The images to compare with: by default the held-out images of the data, or the training images.
    fn reference(&self) -> Result<ReferenceChoice> {
        let size = self.size_of_fashion_mnist();
        if let Some(path) = &self.evaluate.reference {
            return Ok(ReferenceChoice::named(path).map_err(in_table)?.at_size(size));
        }
        match (self.data.kind, &self.data.path) {
            (DataKind::FashionMnist, path) => {
                Ok(ReferenceChoice::FashionMnist { folder: path.clone(), size })
            }
            (DataKind::ImageFolder | DataKind::Captions, Some(path)) => {
                Ok(ReferenceChoice::Folder(path.clone()))
            }
            (kind, _) => {
                let expected = format!(
                    "a folder of images or a file of statistics: data.kind = {:?} has no images",
                    kind.as_str()
                );
                Err(Invalid::new("evaluate.reference", "not set", expected).into())
            }
        }
    }

    fn num_threads(&self) -> usize {
        match self.run.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads as usize,
        }
    }
}

impl Evaluator {
    /// Draws the samples and compares them with the reference; none if a stop was requested.
    pub(crate) fn scores(
        &self,
        drawing: &Drawing<'_>,
        interrupt: &Interrupt,
    ) -> Result<Option<Scores>> {
        let monitor = &mut Watched::new(interrupt);
        let (extractor, rows) = (&*self.extractor, FeatureRows::in_memory());
        let features =
            match features_of_drawing(drawing, "evaluate", extractor, rows, monitor, |_, _| {}) {
                Err(ddil_evaluate::Error::Stopped { .. }) => return Ok(None),
                features => features?,
            };
        Ok(Some(score(&self.reference, &features)?))
    }
}

/// The error of a task that was built without an evaluator.
pub(crate) fn not_evaluated() -> Error {
    Invalid::new("evaluate.interval", "0", "at least 1, to evaluate").into()
}

/// The settings of an error as keys of the table.
fn in_table(error: ddil_evaluate::Error) -> Error {
    Error::Evaluate(error.with_settings_named(|field| format!("evaluate.{field}")))
}

/// Shows a progress bar, and stops when a stop of the run is requested.
struct Watched<'a> {
    progress: Option<Progress>,
    interrupt: &'a Interrupt,
}

impl<'a> Watched<'a> {
    fn new(interrupt: &'a Interrupt) -> Self {
        Self { progress: None, interrupt }
    }
}

impl Monitor for Watched<'_> {
    fn note(&mut self, what: &str, done: u64, total: u64) {
        let progress = self.progress.get_or_insert_with(|| Progress::new(what, done, total));
        progress.update(done, &[]);
        if done >= total {
            // The bar of the run stays.
            progress.clear();
            self.progress = None;
        }
    }

    fn should_stop(&self) -> bool {
        self.interrupt.is_requested()
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        if let Some(progress) = &mut self.progress {
            progress.clear();
        }
    }
}
