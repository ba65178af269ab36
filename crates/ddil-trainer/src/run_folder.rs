//! The folder of one run: who may write in it, what lies where, and how the run stands.
//!
//! ```text
//! runs/<name>/
//!   config.toml        the settings, every one of them, as the run uses them
//!   environment.json   versions and machine
//!   status.json        running, interrupted, completed or failed
//!   metrics.jsonl      one line a step, the same bytes whenever the same run is done again
//!   timings.jsonl      what took how long
//!   events.out.*       the same for TensorBoard
//!   run.log
//!   samples/           step_0001000.png
//!   checkpoints/       see `checkpoint`
//!   not_finite/        see `evidence`; only if numbers stopped being numbers
//!   buffer/            states that a buffer has spilled, while the run is at work
//!   results.json       measurements
//! ```

use std::{
    error::Error as StdError,
    fs::{self, File},
    io::{ErrorKind, Read, Seek},
    path::{Path, PathBuf},
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
const CONFIG: &str = "config.toml";
const STATUS: &str = "status.json";
/// The only version of a run folder so far.
const FORMAT_VERSION: u32 = 1;

/// A run folder that this process alone writes in.
///
/// The lock is the operating system's: it ends with the process, however that ends.
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
/// assert_eq!(Status::read(&path)?.state, State::Completed);
/// let run = RunFolder::resume(&path)?;
/// run.ensure_config(&toml::toml! { steps = 10 })?;
/// assert!(run.ensure_config(&toml::toml! { steps = 20 }).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    status: Status,
    /// Locked as long as it is open.
    _lock: File,
}

/// How a run stands, in `status.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// In one word.
    pub state: State,
    /// The last step that is done.
    pub step: u64,
    /// What went wrong, with its causes; only if the run failed.
    pub error: Option<String>,
}

/// `status.json`, whose version is that of the whole folder: of `metrics.jsonl` and `timings.jsonl` too.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StatusFile {
    #[serde(default = "first_version")]
    format_version: u32,
    state: State,
    step: u64,
    error: Option<String>,
}

/// How a run stands, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// At work, or killed: the lock tells, see [`is_in_use`].
    Running,
    /// Asked to stop, saved, and ready to be resumed.
    Interrupted,
    /// Done.
    Completed,
    /// Stopped by an error.
    Failed,
}

impl Status {
    /// Reads how the run in a folder stands; needs no lock.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if there is no status to be read, and if another version of
    /// the program wrote the folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let file: StatusFile = read_versioned(&folder.join(STATUS), FORMAT_VERSION)?;
        let StatusFile { state, step, error, .. } = file;
        Ok(Self { state, step, error })
    }
}

impl RunFolder {
    /// Makes the folder of a new run and writes its settings there.
    ///
    /// # Errors
    ///
    /// [`Error::FolderNotEmpty`] if anything is in it, [`Error::FolderInUse`], [`Error::Files`],
    /// [`Error::Files`].
    pub fn create(path: &Path, config: &impl Serialize) -> Result<Self> {
        let config = to_toml(config)?;
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        // All that will be flushed to disk below is of no use if its name is lost.
        sync_folder(parent(path))?;
        // Looked at before anything is written, so that a folder of someone else's stays as it is.
        ensure_empty(path)?;
        let lock = lock(path)?;
        ensure_empty(path)?;
        checkpoint::tidy(path)?;
        write_atomic(&path.join(CONFIG), config.as_bytes())?;
        make_folders(path)?;
        Self::running(path, lock, 0)
    }

    /// Takes over the folder of a run that is to go on, and clears away what a crash left half done.
    ///
    /// # Errors
    ///
    /// [`Error::NotARun`] if there is no run, [`Error::FolderInUse`] if another process is at work in it,
    /// [`Error::Files`].
    pub fn resume(path: &Path) -> Result<Self> {
        if !path.join(CONFIG).is_file() {
            return Err(Error::NotARun { path: path.to_owned(), missing: CONFIG });
        }
        let lock = lock(path)?;
        for folder in ["", "samples", "checkpoints", NOT_FINITE] {
            checkpoint::tidy(&path.join(folder))?;
        }
        // The first session may have been killed before it made them.
        make_folders(path)?;
        let step = Status::read(path).map_or(0, |status| status.step);
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

    /// Where a file of the run lies, such as `metrics.jsonl`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Where the checkpoints lie.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Where the sample grid of a step lies: `samples/step_0001000.png`.
    pub fn samples_of(&self, step: u64) -> PathBuf {
        self.path.join("samples").join(format!("step_{step:07}.png"))
    }

    /// The settings that the run was started with.
    ///
    /// # Errors
    ///
    /// Those of [`Settings::read`].
    pub fn settings(&self) -> Result<Settings> {
        Ok(Settings::read(&self.path.join(CONFIG))?)
    }

    /// Makes sure that the run was started with these settings.
    ///
    /// # Errors
    ///
    /// [`Error::OtherConfig`] with every setting that differs, and those of [`Settings::build`].
    pub fn ensure_config<T: Serialize + DeserializeOwned>(&self, config: &T) -> Result<()> {
        Self::ensure_config_at(&self.path, config)
    }

    /// As [`ensure_config`](Self::ensure_config), of a run that is not taken over yet and stays as it is.
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
        let own: T = Settings::read(&file)?.build()?;
        let differences = differences(&own, config)?;
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::OtherConfig { path: path.to_owned(), differences })
    }

    /// Writes a JSON file such as `environment.json` or `results.json`, whole or not at all.
    ///
    /// # Errors
    ///
    /// [`Error::Files`].
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        Ok(write_json(&self.path.join(name), value)?)
    }

    /// How the run stands.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Notes how far the run is.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the status cannot be written.
    pub fn progress(&mut self, step: u64) -> Result<()> {
        self.write_status(Status { step, ..self.status.clone() })
    }

    /// Notes that the run is done, unless it has failed.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the status cannot be written.
    pub fn complete(&mut self, step: u64) -> Result<()> {
        self.end(State::Completed, step)
    }

    /// Notes that the run was asked to stop and is saved, unless it has failed.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the status cannot be written.
    pub fn interrupt(&mut self, step: u64) -> Result<()> {
        self.end(State::Interrupted, step)
    }

    /// Notes what stopped the run, with all its causes.
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
    /// A run that is dropped while it runs was left by an error or a panic.
    fn drop(&mut self) {
        if self.status.state == State::Running {
            let error = Some("the run ended without saying how".to_owned());
            // Whatever made it end is told already.
            let _ =
                self.write_status(Status { state: State::Failed, error, ..self.status.clone() });
        }
    }
}

/// Whether a process is at work in a run folder.
///
/// # Errors
///
/// [`Error::Files`] if the lock cannot be asked for.
pub fn is_in_use(path: &Path) -> Result<bool> {
    if !path.join(LOCK).exists() {
        return Ok(false);
    }
    match lock(path) {
        Ok(_) => Ok(false),
        Err(Error::FolderInUse { .. }) => Ok(true),
        Err(error) => Err(error),
    }
}

/// A lock, and settings that a killed process was about to write, are nothing yet.
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
    for folder in ["samples", "checkpoints"] {
        let folder = path.join(folder);
        fault::reach(Point::RunCreate, &folder)
            .and_then(|()| fs::create_dir_all(&folder))
            .map_err(Error::io("create", &folder))?;
    }
    Ok(())
}

/// Takes a folder for this process alone, as long as what is returned is kept.
///
/// The lock file is never removed: who removed it could take it from under another process.
///
/// # Errors
///
/// [`Error::FolderInUse`] if another process has it, [`Error::Files`].
pub fn lock(folder: &Path) -> Result<File> {
    lock_file(&folder.join(LOCK), folder)
}

/// Takes what a lock file stands for, `locked`, for this process alone, as long as what is returned is kept.
///
/// # Errors
///
/// As [`lock`].
pub fn lock_file(path: &Path, locked: &Path) -> Result<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false).open(path);
    let mut file = file.map_err(Error::io("open", path))?;
    match FileExt::try_lock_exclusive(&file) {
        Ok(true) => {}
        Ok(false) => return Err(in_use(locked, &mut file)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            return Err(in_use(locked, &mut file));
        }
        Err(error) => return Err(Error::io("lock", path)(error)),
    }
    let own = format!("{}\n", Holder::here().to_line());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| fault::write_all(Point::LockWrite, path, &mut file, own.as_bytes()))
        .map_err(Error::io("write", path))?;
    Ok(file)
}

fn in_use(folder: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    let read = file.read_to_string(&mut text).ok();
    let holder = read.and_then(|_| Holder::from_line(&text));
    Error::FolderInUse { path: folder.to_owned(), holder }
}
