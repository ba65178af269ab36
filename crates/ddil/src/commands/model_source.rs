//! Where a model is read from, for the verbs that sample.

use std::path::{Path, PathBuf};

use anyhow::Context;
use ddil_models::{Placement, Precision};
use ddil_pipelines::{Pipeline, PipelineClass};
use ddil_trainer::RunCheckpoint;

/// A model in a folder, or the moving average in a checkpoint of a run.
pub(super) enum ModelSource {
    /// A model folder, or a run folder with an export.
    Folder(PathBuf),
    /// A checkpoint of a run.
    Checkpoint(Box<RunCheckpoint>),
}

impl ModelSource {
    /// The model that a path names; none if there is none.
    pub(super) fn find(path: &Path) -> anyhow::Result<Option<Self>> {
        if Pipeline::is_at(path) {
            return Ok(Some(Self::Folder(path.to_owned())));
        }
        let found = RunCheckpoint::find(path).with_context(|| not_read(path))?;
        Ok(found.map(|checkpoint| Self::Checkpoint(checkpoint.into())))
    }

    /// As [`find`](Self::find), where nothing else than a model can be meant.
    pub(super) fn at(path: &Path) -> anyhow::Result<Self> {
        // The error of a folder without a model names what is missing.
        Ok(Self::find(path)?.unwrap_or_else(|| Self::Folder(path.to_owned())))
    }

    /// The class of its pipeline; only an index is read.
    pub(super) fn class(&self) -> anyhow::Result<PipelineClass> {
        let class = match self {
            Self::Folder(path) => Pipeline::class_at(path),
            Self::Checkpoint(checkpoint) => Pipeline::class_at(&checkpoint.export()),
        };
        class.with_context(|| not_read(self.path()))
    }

    /// Reads it.
    pub(super) fn open(
        &self,
        placement: Placement,
        precision: Precision,
    ) -> anyhow::Result<Pipeline> {
        match self {
            Self::Folder(path) => {
                Pipeline::open(path, placement, precision).with_context(|| not_read(path))
            }
            Self::Checkpoint(checkpoint) => {
                let pipeline = checkpoint.open(placement, precision);
                pipeline.with_context(|| not_read(self.path()))
            }
        }
    }

    /// The folder whose files are the weights: of a run its export, of a checkpoint its own.
    pub(super) fn weights_folder(&self) -> PathBuf {
        match self {
            Self::Folder(path) => {
                let export = path.join("export");
                if export.is_dir() { export } else { path.clone() }
            }
            Self::Checkpoint(checkpoint) => checkpoint.checkpoint().path().to_owned(),
        }
    }

    /// The config of its run: of a run folder, of the model in one (`export` or `best`), or of a checkpoint.
    pub(super) fn config(&self) -> Option<PathBuf> {
        match self {
            Self::Checkpoint(checkpoint) => Some(checkpoint.config()),
            Self::Folder(path) => {
                let is_run = |folder: &&Path| folder.join("status.json").is_file();
                let run = path.parent().filter(is_run);
                let mut places =
                    std::iter::once(&**path).chain(run).map(|folder| folder.join("config.toml"));
                places.find(|config| config.is_file())
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Folder(path) => path,
            Self::Checkpoint(checkpoint) => checkpoint.checkpoint().path(),
        }
    }
}

fn not_read(path: &Path) -> String {
    format!("could not read a model from {}", path.display())
}
