//! The folder of one run: its lock, its files and its status.
//!
//! ```text
//! runs/<name>/
//!   config.toml        all settings, as the run uses them
//!   environment.json   versions and machine
//!   status.json        running, interrupted, completed or failed
//!   metrics.jsonl      one line per step, the same bytes whenever the run is repeated; an evaluated step has the keys
//!                      `eval_frechet`, `eval_kid`, `eval_precision`, `eval_recall`, `eval_density`, `eval_coverage`
//!   timings.jsonl      durations
//!   events.out.*       the same for TensorBoard
//!   run.log
//!   samples/           step_0001000.png
//!   checkpoints/       see `checkpoint`
//!   not_finite/        see `evidence`; only after NaN or infinite values
//!   buffer/            states that a buffer has spilled, while the run is in progress
//!   export/            the averaged model of the last checkpoint
//!   best/              that of the best evaluation, if `output.checkpoints.keep_best` is set
//!   results.json       measurements
//!   report.html        a page to look at, written by the program
//! ```

use std::{
    error::Error as StdError,
    fs::{self, File},
    io::{self, ErrorKind, Read, Seek},
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use ddil_files::{
    TEMPORARY,
    fault::{self, Point},
    first_version, parent, read_versioned,
    settings::{Settings, differences, to_toml},
    sync_folder, with_causes, write_atomic, write_json,
};
use fs4::fs_std::FileExt;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Error, Result, checkpoint, evidence::NOT_FINITE};

pub use crate::holder::Holder;

pub(crate) const LOCK: &str = ".lock";
pub(crate) const CONFIG: &str = "config.toml";
const STATUS: &str = "status.json";
/// The only version of a run folder so far.
const FORMAT_VERSION: u32 = 1;

/// A run folder that is locked for this process.
///
/// The lock is the operating system's: it is released when the process ends, for whatever reason.
///
/// # Example
///
/// ```
/// use ddil_trainer::run_folder::{RunFolder, State, Status};
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("demo");
/// let mut run = RunFolder::create(&path, &toml::toml! { steps = 10 })?;
/// assert!(RunFolder::resume(&path).is_err(), "it is in use");
/// run.complete(10)?;
/// drop(run);
///
/// assert_eq!(Status::from_folder(&path)?.state, State::Completed);
/// let run = RunFolder::resume(&path)?;
/// run.ensure_config(&toml::toml! { steps = 10 })?;
/// assert!(run.ensure_config(&toml::toml! { steps = 20 }).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    status: Status,
    /// The lock, held while this is open.
    _lock: File,
}

/// The status of a run, in `status.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// The state.
    pub state: State,
    /// The last step that is done.
    pub step: u64,
    /// The error with its causes; only if the run failed.
    pub error: Option<String>,
}

/// `status.json`, whose version is that of the whole folder, including `metrics.jsonl` and `timings.jsonl`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StatusFile {
    #[serde(default = "first_version")]
    format_version: u32,
    state: State,
    step: u64,
    error: Option<String>,
}

/// The state of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// In progress or killed: the lock distinguishes the two, see [`is_in_use`].
    Running,
    /// Stopped on request, saved, and ready to be resumed.
    Interrupted,
    /// Done.
    Completed,
    /// Stopped by an error.
    Failed,
}

impl Status {
    /// Reads the status of the run in a folder; requires no lock.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if there is no readable status, and if another version of the program wrote the folder.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let file: StatusFile = read_versioned(&folder.join(STATUS), FORMAT_VERSION)?;
        let StatusFile { state, step, error, .. } = file;
        Ok(Self { state, step, error })
    }
}

impl RunFolder {
    /// Creates the folder of a new run and writes its settings.
    ///
    /// # Errors
    ///
    /// [`Error::FolderNotEmpty`] if the folder contains anything, [`Error::FolderInUse`], [`Error::Files`].
    pub fn create(path: &Path, config: &impl Serialize) -> Result<Self> {
        let config = to_toml(config)?;
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        // Files flushed below are useless if the folder's own entry is lost.
        sync_folder(parent(path))?;
        // Checked before anything is written, so that an unrelated folder stays unchanged.
        ensure_empty(path)?;
        let lock = lock(path)?;
        ensure_empty(path)?;
        checkpoint::remove_leftovers(path)?;
        write_atomic(&path.join(CONFIG), config.as_bytes())?;
        make_folders(path)?;
        Self::running(path, lock, 0)
    }

    /// Opens the folder of a run to be resumed, and removes what a crash left incomplete.
    ///
    /// # Errors
    ///
    /// [`Error::NotARun`] if there is no run, [`Error::FolderInUse`] if another process is using it, [`Error::Files`].
    pub fn resume(path: &Path) -> Result<Self> {
        if !path.join(CONFIG).is_file() {
            return Err(Error::NotARun { path: path.to_owned(), missing: CONFIG });
        }
        let lock = lock(path)?;
        for folder in ["", "samples", checkpoint::CHECKPOINTS, NOT_FINITE] {
            checkpoint::remove_leftovers(&path.join(folder))?;
        }
        // The first session may have been killed before it created them.
        make_folders(path)?;
        let step = Status::from_folder(path).map_or(0, |status| status.step);
        Self::running(path, lock, step)
    }

    fn running(path: &Path, lock: File, step: u64) -> Result<Self> {
        let status = Status { state: State::Running, step, error: None };
        let mut run = Self { path: path.to_owned(), status: status.clone(), _lock: lock };
        run.write_status(status)?;
        Ok(run)
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of a file of the run, such as `metrics.jsonl`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Folder of the checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join(checkpoint::CHECKPOINTS)
    }

    /// Path of a step's sample grid: `samples/step_0001000.png`.
    pub fn samples_of(&self, step: u64) -> PathBuf {
        self.path.join("samples").join(format!("step_{step:07}.png"))
    }

    /// Path of the teacher's sample grid: `samples/teacher.png`.
    pub fn teacher_samples(&self) -> PathBuf {
        self.path.join("samples").join("teacher.png")
    }

    /// The settings that the run was started with.
    ///
    /// # Errors
    ///
    /// Those of [`Settings::from_file`].
    pub fn settings(&self) -> Result<Settings> {
        Ok(Settings::from_file(&self.path.join(CONFIG))?)
    }

    /// Checks that the run was started with these settings.
    ///
    /// # Errors
    ///
    /// [`Error::OtherConfig`] with every setting that differs, and those of [`Settings::build`].
    pub fn ensure_config<T: Serialize + DeserializeOwned>(&self, config: &T) -> Result<()> {
        Self::ensure_config_at(&self.path, config)
    }

    /// As [`ensure_config`](Self::ensure_config), for a folder that is not locked and stays unchanged.
    ///
    /// # Errors
    ///
    /// As there, and [`Error::NotARun`] if there is no run.
    pub fn ensure_config_at<T>(path: &Path, config: &T) -> Result<()>
    where
        T: Serialize + DeserializeOwned,
    {
        let file = path.join(CONFIG);
        if !file.is_file() {
            return Err(Error::NotARun { path: path.to_owned(), missing: CONFIG });
        }
        let own: T = Settings::from_file(&file)?.build()?;
        let differences = differences(&own, config)?;
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::OtherConfig { path: path.to_owned(), differences })
    }

    /// The status.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Records the last step done.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the status cannot be written.
    pub fn progress(&mut self, step: u64) -> Result<()> {
        self.write_status(Status { step, ..self.status.clone() })
    }

    /// Records that the run is completed, unless it has failed.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the status cannot be written.
    pub fn complete(&mut self, step: u64) -> Result<()> {
        self.end(State::Completed, step)
    }

    /// Records that the run was stopped on request and is saved, unless it has failed.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the status cannot be written.
    pub fn interrupt(&mut self, step: u64) -> Result<()> {
        self.end(State::Interrupted, step)
    }

    /// Records the error that stopped the run, with all its causes.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the status cannot be written.
    pub fn fail(&mut self, step: u64, error: &dyn StdError) -> Result<()> {
        let error = Some(with_causes(error));
        self.write_status(Status { state: State::Failed, step, error })
    }

    fn end(&mut self, state: State, step: u64) -> Result<()> {
        match self.status.state {
            State::Failed => Ok(()),
            _ => self.write_status(Status { state, step, error: None }),
        }
    }

    fn write_status(&mut self, status: Status) -> Result<()> {
        self.status = status;
        let Status { state, step, error } = self.status.clone();
        let file = StatusFile { format_version: FORMAT_VERSION, state, step, error };
        Ok(write_json(&self.path.join(STATUS), &file)?)
    }
}

impl Drop for RunFolder {
    /// A run that is dropped while its state is running was ended by an error or a panic.
    fn drop(&mut self) {
        if self.status.state == State::Running {
            let error = Some("the run ended without recording a reason".to_owned());
            // The cause has already been reported.
            let _ =
                self.write_status(Status { state: State::Failed, error, ..self.status.clone() });
        }
    }
}

/// Whether a process is using a run folder. Nothing is written, so the folder need only be readable.
///
/// # Errors
///
/// [`Error::Files`] if the lock cannot be queried.
pub fn is_in_use(path: &Path) -> Result<bool> {
    let path = path.join(LOCK);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("open", &path)(error)),
    };
    // Shared: two processes that only look do not take each other for the run.
    match FileExt::try_lock_shared(&file) {
        Ok(is_free) => Ok(!is_free),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(Error::io("query", &path)(error)),
    }
}

/// Checks that a folder is empty, except for a lock and for settings that a killed process left half-written.
fn ensure_empty(path: &Path) -> Result<()> {
    let half = format!("{TEMPORARY}{CONFIG}-");
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let name = entry.map_err(Error::io("list", path))?.file_name();
        if name != LOCK && !name.to_string_lossy().starts_with(&half) {
            return Err(Error::FolderNotEmpty { path: path.to_owned() });
        }
    }
    Ok(())
}

fn make_folders(path: &Path) -> Result<()> {
    for folder in ["samples", checkpoint::CHECKPOINTS] {
        let folder = path.join(folder);
        fault::reach(Point::RunCreate, &folder)
            .and_then(|()| fs::create_dir_all(&folder))
            .map_err(Error::io("create", &folder))?;
    }
    Ok(())
}

/// Locks a folder for this process while the returned file is open.
///
/// The lock file is never removed, since another process might hold its lock.
///
/// # Errors
///
/// [`Error::FolderInUse`] if another process holds the lock, [`Error::Files`].
pub fn lock(folder: &Path) -> Result<File> {
    lock_file(&folder.join(LOCK), folder)
}

/// Locks the folder `locked` through the lock file `path`, for this process while the returned file is open.
///
/// # Errors
///
/// As [`lock`].
pub fn lock_file(path: &Path, locked: &Path) -> Result<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false).open(path);
    let mut file = file.map_err(Error::io("open", path))?;
    if !try_lock(&file).map_err(Error::io("lock", path))? {
        // A process that only looks, in `is_in_use`, holds it for less than this.
        sleep(Duration::from_millis(100));
        if !try_lock(&file).map_err(Error::io("lock", path))? {
            return Err(in_use(locked, &mut file));
        }
    }
    let own = format!("{}\n", Holder::here().to_line());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| fault::write_all(Point::LockWrite, path, &mut file, own.as_bytes()))
        .map_err(Error::io("write", path))?;
    Ok(file)
}

/// False if another process holds the lock.
fn try_lock(file: &File) -> io::Result<bool> {
    match FileExt::try_lock_exclusive(file) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        locked => locked,
    }
}

fn in_use(folder: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    let read = file.read_to_string(&mut text).ok();
    let holder = read.and_then(|_| Holder::from_line(&text));
    Error::FolderInUse { path: folder.to_owned(), holder }
}
