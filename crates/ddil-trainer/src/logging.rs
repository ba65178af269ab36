//! The log: on the screen, coordinated with the progress bar, and in the run folder.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, fmt, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::{
    Error, Result,
    progress::{Screen, TARGET},
};

/// The destinations of all log messages of the program.
#[derive(Clone, Debug)]
pub struct Logging {
    file: LogFile,
}

impl Logging {
    /// Starts logging to the screen; once per program.
    ///
    /// `filter` has the syntax of `tracing-subscriber`, such as `info` or `ddil_trainer=debug`.
    ///
    /// # Errors
    ///
    /// [`Error::Setup`] if the filter is invalid or another logger is installed.
    pub fn start(filter: &str) -> Result<Self> {
        let refused = |reason: String| Error::Setup { action: "start the log", reason };
        let filter = EnvFilter::try_new(filter).map_err(|error| refused(error.to_string()))?;
        let (file, bar) = (LogFile::default(), Screen::stderr().is_terminal());
        let to_file = file.clone();
        let on_screen = fmt::layer()
            .with_writer(|| ScreenWriter)
            .with_ansi(bar)
            .without_time()
            .with_target(false)
            .with_filter(filter_fn(move |about| !bar || about.target() != TARGET));
        let in_file = fmt::layer().with_writer(move || to_file.clone()).with_ansi(false);
        tracing_subscriber::registry()
            .with(filter)
            .with(on_screen)
            .with(in_file)
            .try_init()
            .map_err(|error| refused(error.to_string()))?;
        Ok(Self { file })
    }

    /// Appends messages to a file as well.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the file cannot be opened.
    pub fn also_to(&self, path: &Path) -> Result<()> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        let file = file.map_err(Error::io("open", path))?;
        *self.file.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        Ok(())
    }
}

#[derive(Clone, Debug, Default)]
struct LogFile(Arc<Mutex<Option<File>>>);

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(file) => file.write(bytes),
            None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct ScreenWriter;

impl Write for ScreenWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A closed terminal must not end the run before it is saved: a failed write of the log is a panic.
        let _ = Screen::stderr().suspend(|| io::stderr().write_all(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}
