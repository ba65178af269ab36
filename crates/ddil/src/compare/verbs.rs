//! Runs the program's own verbs, each in its own process.
//!
//! libtorch has one number of threads, one allocator and one global generator per process, so two training runs in one
//! process would not be independent; and a process that is killed for its memory use does not affect the others. A
//! child has its own process group, and its standard input is the reading end of a pipe. With `--stop-with-stdin` it
//! saves and ends when that pipe closes, because the parent stops or has died. Ctrl-C in a terminal thus reaches only
//! the parent, and each child once.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::error::{Error, Result};

/// How often a child is checked for its end.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The executable that contains the verbs.
#[derive(Clone, Debug)]
pub(crate) struct Program(PathBuf);

/// How a verb ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Its exit code; none if it was ended by a signal.
    pub(crate) code: Option<i32>,
    /// Whether it was asked to stop.
    pub(crate) was_stopped: bool,
    /// Its error message in one line; without one, how it ended and the last line of its output.
    pub(crate) message: String,
}

impl Program {
    /// The running executable.
    ///
    /// # Errors
    ///
    /// [`Error::Process`] if the system does not return its path.
    pub(crate) fn current() -> Result<Self> {
        std::env::current_exe()
            .map(Self)
            .map_err(|error| setup("find the path of this program", &error))
    }

    /// Runs a verb to its end and appends its output to `log`; once `should_stop` returns true, the verb receives a stop request.
    ///
    /// # Errors
    ///
    /// [`Error::Process`] if the process cannot be started, [`Error::Files`] for the log.
    pub(crate) fn run(
        &self,
        arguments: &[OsString],
        log: &Path,
        should_stop: &dyn Fn() -> bool,
    ) -> Result<Ended> {
        let output = OpenOptions::new().append(true).create(true).open(log);
        let output = output.map_err(Error::io("open", log))?;
        let log_start = output.metadata().map_err(Error::io("open", log))?.len();
        let mut child = self.start(arguments, output).map_err(|e| setup("start a process", &e))?;
        let (mut input, mut was_stopped) = (child.stdin.take(), false);
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(error) => return Err(setup("wait for a process", &error)),
            }
            if should_stop() {
                (input, was_stopped) = (None, true);
            }
            sleep(POLL_INTERVAL);
        };
        drop(input);
        let message = message(log, log_start).unwrap_or_default();
        let message = match message.as_str() {
            "" => format!("its process ended with {status}"),
            line if line.starts_with("error: ") => line["error: ".len()..].to_owned(),
            line => format!("its process ended with {status}: {line}"),
        };
        Ok(Ended { code: status.code(), was_stopped, message })
    }

    fn start(&self, arguments: &[OsString], output: File) -> std::io::Result<Child> {
        let errors = output.try_clone()?;
        let mut command = Command::new(&self.0);
        command.args(arguments).arg("--stop-with-stdin");
        command.stdin(Stdio::piped()).stdout(output).stderr(errors);
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command.spawn()
    }
}

/// The error that a process printed, with its causes in one line, or else its last line of output.
fn message(log: &Path, log_start: u64) -> Option<String> {
    const CAUSE: &str = "\n  because ";
    let mut file = File::open(log).ok()?;
    file.seek(SeekFrom::Start(log_start)).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let error = text.rfind("\nerror: ").map(|at| at + 1);
    match error.or_else(|| text.starts_with("error: ").then_some(0)) {
        Some(at) => Some(text[at..].trim_end().replace(CAUSE, ": ")),
        None => text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned),
    }
}

/// A file for a verb's result, removed when dropped.
pub(super) struct ResultFile(PathBuf);

impl ResultFile {
    /// Removes a file that an earlier process left at this path.
    pub(super) fn at(path: PathBuf) -> Self {
        let _ = fs::remove_file(&path);
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ResultFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn setup(action: &'static str, error: &std::io::Error) -> Error {
    Error::Process { action, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = folder.path().join("log");
        fs::write(&log, format!("error: an older one\n{text}")).expect("it is writable");
        message(&log, "error: an older one\n".len() as u64)
    }

    #[test]
    fn the_last_error_is_found_with_its_causes() {
        let text = " INFO step 1\nerror: the run stopped\n  because step 2: loss is NaN\n";
        assert_eq!(of(text).as_deref(), Some("error: the run stopped: step 2: loss is NaN"));
        assert_eq!(of("error: one\nerror: two\n").as_deref(), Some("error: two"));
        assert_eq!(of(" INFO step 1\n\n").as_deref(), Some("INFO step 1"));
        assert_eq!(of(""), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_child_gets_its_arguments_and_ends_when_its_input_closes() -> Result<()> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = folder.path().join("log");
        let shell = Program("sh".into());
        let script = |text: &str| ["-c".into(), text.into(), "sh".into()];
        let ended =
            shell.run(&script("echo \"$1\"; echo error: no >&2; exit 3"), &log, &|| false)?;
        assert_eq!((ended.code, ended.was_stopped, ended.message.as_str()), (Some(3), false, "no"));
        assert!(fs::read_to_string(&log).expect("a log").starts_with("--stop-with-stdin\n"));
        // `cat` ends when its standard input closes.
        let ended = shell.run(&script("cat; echo bye"), &log, &|| true)?;
        assert_eq!((ended.code, ended.was_stopped), (Some(0), true));
        assert!(ended.message.ends_with(": bye"), "{}", ended.message);
        Ok(())
    }
}
