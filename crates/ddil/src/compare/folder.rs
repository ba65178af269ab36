use std::fs;
use std::path::{Path, PathBuf};

use ddil_trainer::{Error, Result};
use serde::{Deserialize, Serialize};

/// Where everything of a comparison lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ComparisonFolder(PathBuf);

impl ComparisonFolder {
    /// The folder at a path; nothing is looked at.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the folder and those below it, where they are not there.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if one cannot be made.
    pub fn create(&self) -> Result<()> {
        for folder in [self.cells(), self.0.join("teachers")] {
            fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        }
        Ok(())
    }

    /// A file such as `results.json`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// What verbs print whose work is no cell's.
    pub fn log(&self) -> PathBuf {
        self.file("work.log")
    }

    /// The rows of real images.
    pub fn real(&self) -> PathBuf {
        self.file("real.json")
    }

    /// Where the run folders of the cells are.
    pub fn cells(&self) -> PathBuf {
        self.0.join("cells")
    }

    /// A cell's run folder.
    pub fn run_of(&self, cell: &str) -> PathBuf {
        self.cells().join(cell)
    }

    /// A cell's config.
    pub fn config_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.toml"))
    }

    /// What a cell's verbs printed.
    pub fn log_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.log"))
    }

    /// The lock of the process that is at work on a cell.
    pub fn lock_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.lock"))
    }

    /// How a cell ended.
    pub fn record_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.json"))
    }

    /// A cell's first samples at its own steps.
    pub fn samples_of(&self, cell: &str) -> PathBuf {
        self.cells().join(format!("{cell}.safetensors"))
    }

    /// Samples of a teacher.
    pub fn teacher(&self, key: &str) -> PathBuf {
        self.0.join("teachers").join(key)
    }

    /// Removes everything of a cell but its lock.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if something cannot be removed.
    pub fn remove_cell(&self, cell: &str) -> Result<()> {
        // The record first: without it nothing of the cell counts as done.
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
