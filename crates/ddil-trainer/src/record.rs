//! JSON lines, one per step, truncated exactly when a run is resumed.
//!
//! A checkpoint stores the [`Position`] of `metrics.jsonl`. On resume the file is verified up to that position and
//! truncated there, so that a run that was killed and resumed writes the same bytes as one that was not. No line may
//! therefore contain a time of day or a duration: those go to `timings.jsonl`, also a [`Record`], which is truncated by
//! step instead.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use ddil_files::{
    fault::{self, Point},
    open_regular_file, parse_json,
};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, crc32c};

/// A file of JSON lines, opened for appending.
///
/// # Example
///
/// ```
/// use ddil_trainer::record::Record;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("metrics.jsonl");
/// let mut record = Record::create(&path)?;
/// record.write(1, &serde_json::json!({ "loss": 0.5 }))?;
/// let position = record.position()?;
/// record.write(2, &serde_json::json!({ "loss": 0.25 }))?;
///
/// let mut record = Record::resume(&path, position)?;
/// record.write(2, &serde_json::json!({ "loss": 0.125 }))?;
/// assert_eq!(std::fs::read_to_string(&path)?, "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":0.125}\n");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    file: File,
    position: Position,
}

/// The length of a record and a checksum of its content; stored in checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32C of those bytes.
    pub crc32c: u32,
}

#[derive(Serialize)]
struct Line<'a, T> {
    step: u64,
    #[serde(flatten)]
    values: &'a T,
}

#[derive(Deserialize)]
struct StepOnly {
    step: u64,
}

impl Record {
    /// Creates a new record.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the file exists or cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = fault::reach(Point::RecordCreate, path)
            .and_then(|()| OpenOptions::new().append(true).create_new(true).open(path));
        let file = file.map_err(Error::io("create", path))?;
        Ok(Self { path: path.to_owned(), file, position: Position::default() })
    }

    /// Opens a record at a checkpoint's position and removes the lines after it.
    ///
    /// At position 0 a missing file is created.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the file cannot be opened or truncated, [`Error::DamagedRecord`] if its start does not match
    /// the position; the file is then unchanged.
    pub fn resume(path: &Path, position: Position) -> Result<Self> {
        if position.bytes == 0 && !path.exists() {
            return Self::create(path);
        }
        let damaged = |reason: String| Error::DamagedRecord {
            path: path.to_owned(),
            expected_bytes: position.bytes,
            reason,
        };
        let found = position_after(path, position.bytes)?;
        if found.bytes < position.bytes {
            return Err(damaged(format!("it now has only {}", found.bytes)));
        }
        if found != position {
            return Err(damaged("they now have another checksum".into()));
        }
        Self::cut(path, position)
    }

    /// Opens a record whose bytes need not be exact and removes the lines of steps after `step`.
    ///
    /// A missing file is created. An incomplete last line, left by a crash, is removed.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the file cannot be opened or truncated.
    pub fn resume_after(path: &Path, step: u64) -> Result<Self> {
        if !path.exists() {
            return Self::create(path);
        }
        let file = open_regular_file(path).map_err(Error::io("open", path))?;
        let mut reader = BufReader::new(file);
        let (mut position, mut line) = (Position::default(), Vec::new());
        loop {
            line.clear();
            reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
            let parsed = serde_json::from_slice(&line);
            match parsed {
                Ok(StepOnly { step: found }) if found <= step && line.ends_with(b"\n") => {
                    position.extend(&line);
                }
                _ => return Self::cut(path, position),
            }
        }
    }

    fn cut(path: &Path, position: Position) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("open", path))?;
        fault::reach(Point::RecordCut, path)
            .and_then(|()| file.set_len(position.bytes))
            .map_err(Error::io("cut", path))?;
        file.sync_all().map_err(Error::io("flush", path))?;
        Ok(Self { path: path.to_owned(), file, position })
    }

    /// Appends `{"step": step, ..values}` as one line; `values` must serialise to an object.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if `values` is not an object, or if the disk is full; an incomplete line is then removed.
    pub fn write(&mut self, step: u64, values: &impl Serialize) -> Result<()> {
        let line = serde_json::to_vec(&Line { step, values });
        let mut line = line.map_err(Error::json("write", &self.path))?;
        line.push(b'\n');
        let written = fault::write_all(Point::RecordWrite, &self.path, &mut self.file, &line);
        if let Err(error) = written {
            // An incomplete line would make the file unreadable; the first error is the one to report.
            let _ = self.file.set_len(self.position.bytes);
            return Err(Error::io("write", &self.path)(error));
        }
        self.position.extend(&line);
        Ok(())
    }

    /// Flushes to disk and returns the position, for a checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if flushing fails.
    pub fn position(&self) -> Result<Position> {
        fault::reach(Point::RecordFlush, &self.path)
            .and_then(|()| self.file.sync_data())
            .map_err(Error::io("flush", &self.path))?;
        Ok(self.position)
    }
}

impl Position {
    fn extend(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.crc32c = crc32c::extend(self.crc32c, bytes);
    }
}

/// Reads every line of a record, for reports.
///
/// # Errors
///
/// [`Error::Files`] if the file cannot be read, and at the first line that is not a valid `T`.
pub fn read_lines<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    text.lines()
        .map(|line| parse_json(line.as_bytes()).map_err(Error::json("read", path)))
        .collect()
}

/// The position after `bytes` bytes, or at the end of a shorter file.
fn position_after(path: &Path, bytes: u64) -> Result<Position> {
    let file = open_regular_file(path).map_err(Error::io("open", path))?;
    let mut reader = BufReader::new(file.take(bytes));
    let mut position = Position::default();
    loop {
        let chunk = reader.fill_buf().map_err(Error::io("read", path))?;
        if chunk.is_empty() {
            return Ok(position);
        }
        position.extend(chunk);
        let length = chunk.len();
        reader.consume(length);
    }
}
