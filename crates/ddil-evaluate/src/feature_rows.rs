//! Features in memory, or in a file that a stopped measurement continues.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ddil_files::{Error as FileError, read_versioned, write_json};
use ddil_libtorch::{ArgumentError, MappedFile};
use fs4::fs_std::FileExt;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

const FEATURES: &str = "features.f32";
const STATE: &str = "state.json";
const LOCK: &str = ".lock";
/// The only version of the files so far.
const FORMAT_VERSION: u32 = 1;
/// Minimum time between two flushes to disk.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// Features of a set of images, in the order of the images, while they are computed.
///
/// # Example
///
/// ```
/// use ddil_evaluate::FeatureRows;
/// use tch::Tensor;
///
/// let mut rows = FeatureRows::in_memory();
/// rows.push(&Tensor::zeros([3, 2], tch::kind::FLOAT_CPU))?;
/// rows.push(&Tensor::ones([1, 2], tch::kind::FLOAT_CPU))?;
/// assert_eq!(rows.len(), 4);
/// assert_eq!(rows.finish()?.size(), [4, 2]);
/// # Ok::<(), ddil_evaluate::Error>(())
/// ```
#[derive(Debug)]
pub struct FeatureRows {
    len: u64,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Memory(Vec<Tensor>),
    Disk(OnDisk),
}

#[derive(Debug)]
struct OnDisk {
    folder: PathBuf,
    file: File,
    dim: i64,
    total: u64,
    saved: Instant,
    /// Held while this is open.
    _lock: File,
}

/// How much of the file is complete.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    format_version: u32,
    /// Rows whose bytes are on disk.
    rows: u64,
    /// Rows in all.
    total: u64,
    /// Features per row.
    dim: i64,
}

impl FeatureRows {
    /// No rows yet; they are kept in memory and lost when the process ends.
    pub fn in_memory() -> Self {
        Self { len: 0, place: Place::Memory(Vec::new()) }
    }

    /// The rows in a folder, which is created if necessary: those of an earlier process, or none.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if another process uses the folder, [`Error::Files`] if it cannot be written.
    pub(crate) fn in_folder(folder: &Path, total: u64, dim: i64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(FileError::io("create", folder))?;
        let lock = lock(folder)?;
        let path = folder.join(FEATURES);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = file.map_err(FileError::io("open", &path))?;
        let found = file.metadata().map_err(FileError::io("open", &path))?.len();
        let known = read_versioned::<State>(&folder.join(STATE), FORMAT_VERSION).ok();
        let known = known.filter(|state| (state.total, state.dim) == (total, dim));
        let rows = known.map_or(0, |state| state.rows.min(total));
        let end = rows.saturating_mul(bytes_of(dim));
        // Features that cannot be read are computed again.
        let (len, end) = if found < end { (0, 0) } else { (rows, end) };
        file.set_len(end)
            .and_then(|()| file.seek(SeekFrom::Start(end)))
            .map_err(FileError::io("write", &path))?;
        let folder = folder.to_owned();
        let place = OnDisk { folder, file, dim, total, saved: Instant::now(), _lock: lock };
        Ok(Self { len, place: Place::Disk(place) })
    }

    /// The number of rows.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether another process can continue after this one.
    pub fn are_kept(&self) -> bool {
        matches!(self.place, Place::Disk(_))
    }

    /// Adds features, `[n, dim]`.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for another shape than `[n, dim]`, [`Error::Files`] if the disk is full.
    pub fn push(&mut self, features: &Tensor) -> Result<()> {
        const OP: &str = "FeatureRows::push";
        ddil_libtorch::ensure_real(OP, "features", features)?;
        let shape = features.size();
        let dim = self.dim();
        if shape.len() != 2 || dim.is_some_and(|dim| dim != shape[1]) {
            let expected =
                dim.map_or("[n, features]".to_owned(), |dim| format!("[n, {dim}], as before"));
            return Err(ArgumentError::Shape { op: OP, name: "features", shape, expected }.into());
        }
        let rows = || features.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float);
        let rows = rows().map_err(Error::torch(OP))?;
        match &mut self.place {
            Place::Memory(batches) => batches.push(rows),
            Place::Disk(place) => place.append(&rows)?,
        }
        self.len += shape[0].unsigned_abs();
        if self.is_due() { self.save() } else { Ok(()) }
    }

    fn dim(&self) -> Option<i64> {
        match &self.place {
            Place::Memory(batches) => batches.first().map(|batch| batch.size()[1]),
            Place::Disk(place) => Some(place.dim),
        }
    }

    fn is_due(&self) -> bool {
        matches!(&self.place, Place::Disk(place) if place.saved.elapsed() >= SAVE_INTERVAL)
    }

    /// Flushes the rows to disk, from where another process continues.
    pub(crate) fn save(&mut self) -> Result<()> {
        match &mut self.place {
            Place::Memory(_) => Ok(()),
            Place::Disk(place) => place.save(self.len),
        }
    }

    /// All rows, `[n, dim]`, `Float`, on the CPU. Rows on disk are mapped, and read when they are used.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] without rows, [`Error::Files`] and [`Error::Libtorch`] if the file cannot be flushed or mapped.
    pub fn finish(mut self) -> Result<Tensor> {
        self.save()?;
        match self.place {
            Place::Memory(batches) => {
                Tensor::f_cat(&batches, 0).map_err(Error::torch("FeatureRows::finish"))
            }
            Place::Disk(place) => {
                let file = MappedFile::open(place.folder.join(FEATURES))?;
                Ok(file.tensor(0, [self.len as i64, place.dim], Kind::Float)?)
            }
        }
    }
}

impl OnDisk {
    fn append(&mut self, rows: &Tensor) -> Result<()> {
        let values = rows.f_contiguous().and_then(|rows| Vec::<f32>::try_from(rows.f_view([-1])?));
        let values = values.map_err(Error::torch("FeatureRows::push"))?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        Ok(self.file.write_all(&bytes).map_err(FileError::io("write", &self.folder))?)
    }

    fn save(&mut self, rows: u64) -> Result<()> {
        self.file.sync_data().map_err(FileError::io("flush", &self.folder))?;
        let Self { total, dim, .. } = *self;
        let state = State { format_version: FORMAT_VERSION, rows, total, dim };
        write_json(&self.folder.join(STATE), &state)?;
        self.saved = Instant::now();
        Ok(())
    }
}

/// Whether the rows in a folder are complete; true if nothing can be read, so that it is left alone.
pub(crate) fn is_complete(folder: &Path) -> bool {
    read_versioned::<State>(&folder.join(STATE), FORMAT_VERSION)
        .map_or(true, |state| state.rows >= state.total)
}

fn bytes_of(dim: i64) -> u64 {
    dim.unsigned_abs().saturating_mul(4)
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(FileError::io("open", &path))?;
    match FileExt::try_lock_exclusive(&file) {
        Ok(true) => Ok(file),
        Ok(false) => Err(Error::InUse { path: folder.to_owned() }),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            Err(Error::InUse { path: folder.to_owned() })
        }
        Err(error) => Err(FileError::io("lock", &path)(error).into()),
    }
}
