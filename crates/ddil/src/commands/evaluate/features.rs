//! The features of what is measured, which a measurement that was stopped finds again.

use std::path::{Path, PathBuf};

use ddil_data::ImageFiles;
use ddil_evaluate::{
    Drawing, Error, FeatureKey, FeatureRows, FeatureStore, Result, features_of_drawing,
    features_of_files,
};
use ddil_metrics::FeatureExtractor;
use ddil_pipelines::SamplePlan;
use ddil_trainer::Interrupt;
use tch::Tensor;

use super::subject::Model;
use crate::cli::EvaluateArgs;
use crate::commands::{Bar, Calls};
use crate::sample_file;

/// Features on disk, and the stop request that is checked while they are computed.
pub(super) struct Features<'a> {
    pub(super) store: FeatureStore,
    pub(super) interrupt: &'a Interrupt,
}

impl<'a> Features<'a> {
    /// In the folder of the command line, or in the user's cache.
    pub(super) fn new(folder: Option<&Path>, interrupt: &'a Interrupt) -> Self {
        let store = folder.map_or_else(FeatureStore::in_cache, FeatureStore::in_folder);
        Self { store, interrupt }
    }

    /// Features of image files.
    pub(super) fn of_files(
        &mut self,
        files: &ImageFiles,
        extractor: &dyn FeatureExtractor,
        threads: usize,
    ) -> Result<Tensor> {
        let rows = self.rows(files.len() as u64, || FeatureKey::of_files(files, extractor))?;
        let bar = &mut Bar::new(self.interrupt);
        features_of_files(files, "images", extractor, threads, rows, bar)
    }

    /// Features of the first `n` samples of a model; the first few samples are written to `keep`.
    pub(super) fn of_model(
        &mut self,
        args: &EvaluateArgs,
        model: &Model,
        plan: &SamplePlan,
        n: u32,
        extractor: &dyn FeatureExtractor,
        keep: Option<&Path>,
    ) -> anyhow::Result<Tensor> {
        let (total, pipeline) = (args.num_samples, &model.pipeline);
        let rows = self.rows(u64::from(n), || {
            let (folders, network) = of_model(args, model);
            let folders: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
            FeatureKey::of_model(&folders, plan, [n, total], &network, extractor)
        })?;
        let done = rows.len() as u32;
        if done > 0 {
            tracing::info!("the features of {done} of {n} samples are there already");
        }
        if done < n {
            tracing::info!("sampling {} images in {} steps", n - done, plan.steps);
        }
        let mut first = FirstSamples::default();
        let calls = Calls::after("evaluate", plan, n, done);
        let on_call = || calls.note();
        let drawing = Drawing::of_pipeline(pipeline, plan, total).up_to(n).with_callback(&on_call);
        let bar = &mut Bar::hidden(self.interrupt);
        let drawn = |index: u64, images: &Tensor| first.note(index, images);
        let found = features_of_drawing(&drawing, "samples", extractor, rows, bar, drawn);
        if let Some(file) = keep.filter(|_| !matches!(found, Err(Error::Stopped { .. }))) {
            // Those of a measurement that was stopped, or that ended at the first batch, are not all there.
            // Whole batches, so that rounding is the same.
            let few = (sample_file::KEPT as u32).next_multiple_of(plan.batch_size.max(1)).min(n);
            first.complete(&Drawing::of_pipeline(pipeline, plan, total).up_to(few))?;
            first.write(file)?;
        }
        Ok(found?)
    }

    /// The rows on disk; in memory if there are few images or the disk cannot be used.
    pub(super) fn rows(
        &mut self,
        images: u64,
        key: impl FnOnce() -> Result<FeatureKey>,
    ) -> Result<FeatureRows> {
        if !self.store.keeps(images) {
            return Ok(FeatureRows::in_memory());
        }
        match self.store.open(&key()?, false) {
            Err(error @ (Error::Files(_) | Error::InUse { .. })) => {
                tracing::warn!(
                    "features are kept in memory, and a measurement that is stopped begins again: {}",
                    ddil_files::with_causes(&error)
                );
                Ok(FeatureRows::in_memory())
            }
            rows => rows,
        }
    }

    /// Removes what is of no use once the measurement is complete.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.store.clear()
    }
}

/// The folders of a model's files, and how it is evaluated: what its samples depend on beside a plan.
pub(super) fn of_model(args: &EvaluateArgs, model: &Model) -> ([PathBuf; 2], String) {
    let sampling = &args.sampling;
    let network = format!(
        "{}, {}, {}, {} threads",
        sampling.device, sampling.precision, sampling.memory_format, sampling.threads
    );
    // An adapter is in another folder than its base, and a checkpoint than the other parts.
    ([model.source.weights_folder(), model.pipeline.parts.path().to_owned()], network)
}

/// The first few samples of a model.
#[derive(Default)]
struct FirstSamples(Vec<Tensor>);

impl FirstSamples {
    fn count(&self) -> i64 {
        self.0.iter().map(|images| images.size()[0]).sum()
    }

    fn note(&mut self, index: u64, images: &Tensor) {
        if index as i64 == self.count() && self.count() < sample_file::KEPT {
            self.0.push(images.shallow_clone());
        }
    }

    /// Draws them if they are not all there.
    fn complete(&mut self, drawing: &Drawing<'_>) -> Result<()> {
        let wanted = sample_file::KEPT.min(i64::from(drawing.end()));
        if self.count() >= wanted {
            return Ok(());
        }
        self.0.clear();
        drawing.for_each(0, |images| {
            self.0.push(images);
            Ok(())
        })
    }

    fn write(&self, file: &Path) -> anyhow::Result<()> {
        Ok(sample_file::write_first(file, &Tensor::f_cat(&self.0, 0)?)?)
    }
}
