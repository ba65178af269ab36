use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The folder layout of a comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct ComparisonFolder(PathBuf);

impl ComparisonFolder {
    /// The folder at a path; the file system is not accessed.
    pub(crate) fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder itself.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Creates the folder and its subfolders if they do not exist.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if a folder cannot be created.
    pub(crate) fn create(&self) -> Result<()> {
        for folder in [self.cells(), self.0.join("teachers")] {
            fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        }
        Ok(())
    }

    /// A file such as `results.json`.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Output of verbs whose work belongs to no cell.
    pub(crate) fn log(&self) -> PathBuf {
        self.file("work.log")
    }

    /// The rows of real images.
    pub(crate) fn real(&self) -> PathBuf {
        self.file("real.json")
    }

    /// The folder of the cells' run folders.
    pub(crate) fn cells(&self) -> PathBuf {
        self.0.join("cells")
    }

    /// A cell's run folder.
    pub(crate) fn run_of(&self, cell: &str) -> PathBuf {
        self.cells().join(cell)
    }

    /// A cell's config.
    pub(crate) fn config_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.toml"))
    }

    /// Output of a cell's verbs.
    pub(crate) fn log_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.log"))
    }

    /// The lock of the process that works on a cell.
    pub(crate) fn lock_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.lock"))
    }

    /// The record of how a cell ended.
    pub(crate) fn record_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.json"))
    }

    /// A cell's first samples at its own number of steps.
    pub(crate) fn samples_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.safetensors"))
    }

    /// Samples of a teacher.
    pub(crate) fn teacher(&self, key: &str) -> PathBuf {
        self.0.join("teachers").join(key)
    }

    /// Removes everything of a cell except its lock.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if something cannot be removed.
    pub(crate) fn remove_cell(&self, cell: &str) -> Result<()> {
        // The record first: without it no part of the cell counts as done.
        let files =
            [self.record_of(cell), self.samples_of(cell), self.config_of(cell), self.log_of(cell)];
        for file in files.iter().filter(|file| file.exists()) {
            fs::remove_file(file).map_err(Error::io("remove", file))?;
        }
        let run = self.run_of(cell);
        if run.exists() {
            fs::remove_dir_all(&run).map_err(Error::io("remove", &run))?;
        }
        Ok(())
    }
}
