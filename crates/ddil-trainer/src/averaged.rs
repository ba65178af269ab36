//! The model of a checkpoint.

use std::path::{Path, PathBuf};

use ddil_files::settings::Settings;
use ddil_models::{Placement, Precision};
use ddil_pipelines::Pipeline;

use crate::checkpoint::{self, CHECKPOINTS, Checkpoint};
use crate::config::DistillConfig;
use crate::distill::restore_average;
use crate::error::{Error, Result};
use crate::run_folder::CONFIG;
use crate::session::{EXPORT, average_of};
use crate::state;

/// A checkpoint in its run's folder, whose moving average is a model: the one that the run exported after that update.
///
/// # Example
///
/// A path that is neither a checkpoint nor `checkpoints`, `latest` or `best` of a run is none:
///
/// ```
/// use ddil_trainer::RunCheckpoint;
///
/// let folder = tempfile::tempdir()?;
/// assert!(RunCheckpoint::find(folder.path())?.is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct RunCheckpoint {
    run: PathBuf,
    checkpoint: Checkpoint,
}

impl RunCheckpoint {
    /// The checkpoint that a path names, as [`checkpoint::find`] finds it; none if the path names none.
    ///
    /// # Errors
    ///
    /// Those of [`checkpoint::find`]; [`Error::OutsideOfRun`] for a checkpoint that is not in the folder of a run,
    /// [`Error::NoExport`] if that has no exported model.
    pub fn find(path: &Path) -> Result<Option<Self>> {
        let Some(checkpoint) = checkpoint::find(path)? else { return Ok(None) };
        // Of the folder as it is, and not through a link to it.
        let folder = checkpoint.path();
        let whole = folder.canonicalize().map_err(Error::io("find", folder))?;
        let parent = whole.parent().filter(|parent| parent.ends_with(CHECKPOINTS));
        let run = parent.and_then(Path::parent).filter(|run| run.join(CONFIG).is_file());
        let Some(run) = run else { return Err(Error::OutsideOfRun { path: folder.to_owned() }) };
        let found = Self { run: run.to_owned(), checkpoint };
        if !Pipeline::is_at(&found.export()) {
            return Err(Error::NoExport { path: found.run });
        }
        Ok(Some(found))
    }

    /// The folder of the run.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The config of the run.
    pub fn config(&self) -> PathBuf {
        self.run.join(CONFIG)
    }

    /// The exported model of the run, of its last checkpoint: everything but weights and timesteps is that of each
    /// checkpoint.
    pub fn export(&self) -> PathBuf {
        self.run.join(EXPORT)
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Reads the averaged model; for a student that is an adapter, the teacher is read too.
    ///
    /// # Errors
    ///
    /// Errors of the files; [`Error::StateMismatch`] if the weights are not those of the run's model.
    pub fn open(&self, placement: Placement, precision: Precision) -> Result<Pipeline> {
        let export = Pipeline::open(&self.export(), placement, precision)?;
        let (average, spent) = average_of(&self.checkpoint)?;
        let mut pipeline = match self.checkpoint.manifest().kind.as_str() {
            "train" => {
                state::restore("moving average", &export.network.parameters().learned(), &average)?;
                export
            }
            "distill" => {
                let config: DistillConfig = Settings::from_file(&self.config())?.build()?;
                restore_average(&config, export, &average, spent.updates)?
            }
            found => {
                return Err(Error::OtherCheckpoint {
                    path: self.checkpoint.path().to_owned(),
                    found: found.to_owned(),
                    expected: "train` or `distill".to_owned(),
                });
            }
        };
        (pipeline.card.updates, pipeline.card.seconds) = (spent.updates, spent.seconds);
        Ok(pipeline)
    }
}
