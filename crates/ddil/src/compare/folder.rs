use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The folder layout of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
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

    /// The folders of all teachers' samples, ordered by name; there may be none yet.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the folder cannot be listed.
    pub(crate) fn teachers(&self) -> Result<Vec<PathBuf>> {
        let found = entries(&self.0.join("teachers"))?;
        Ok(found.into_iter().filter(|path| path.join("samples.json").is_file()).collect())
    }

    /// The files of rows in the folder of a teacher's samples, ordered by name.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the folder cannot be listed.
    pub(crate) fn rows_of(teacher: &Path) -> Result<Vec<PathBuf>> {
        let is_row = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("row_") && name.ends_with(".json") && !name.ends_with(".rows.json")
        };
        Ok(entries(teacher)?.into_iter().filter(is_row).collect())
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

/// What is in a folder, ordered by name; nothing in one that does not exist.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let listed = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let paths = listed.map(|entry| Ok(entry.map_err(Error::io("list", folder))?.path()));
    let mut paths = paths.collect::<Result<Vec<PathBuf>>>()?;
    paths.sort();
    Ok(paths)
}
