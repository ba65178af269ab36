//! Finished cells, on disk.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ddil_examples::Result;

use crate::cell::{Cell, Record};
use crate::measure::Points;

/// A folder with one line per cell in `cells.jsonl`, and points for plots.
pub(crate) struct Store {
    folder: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    file: File,
    records: Vec<Record>,
}

impl Store {
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder.join("points"))?;
        let path = folder.join("cells.jsonl");
        let mut records = Vec::new();
        if path.exists() {
            for line in BufReader::new(File::open(&path)?).lines() {
                // A line that was incomplete when the run was stopped is an unfinished cell.
                records.extend(serde_json::from_str::<Record>(&line?).ok());
            }
        }
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        if fs::read(&path)?.last().is_some_and(|byte| *byte != b'\n') {
            file.write_all(b"\n")?;
        }
        Ok(Self { folder: folder.to_owned(), inner: Mutex::new(Inner { file, records }) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has(&self, cell: Cell, hash: &str) -> bool {
        self.inner().records.iter().any(|r| r.cell == cell && r.hash == hash)
    }

    pub(crate) fn put(&self, record: Record) -> Result<()> {
        let mut line = serde_json::to_string(&record)?;
        line.push('\n');
        let mut inner = self.inner();
        inner.file.write_all(line.as_bytes())?;
        inner.records.push(record);
        Ok(())
    }

    pub(crate) fn records(&self) -> Vec<Record> {
        self.inner().records.clone()
    }

    pub(crate) fn put_points(&self, name: &str, points: &Points) -> Result<()> {
        Ok(fs::write(self.folder.join("points").join(name), serde_json::to_string(points)?)?)
    }

    /// None if there are no points.
    pub(crate) fn points(&self, name: &str) -> Result<Option<Points>> {
        let path = self.folder.join("points").join(name);
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&fs::read_to_string(path)?)?))
    }
}
