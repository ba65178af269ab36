//! Jobs in processes of their own, some at a time.
//!
//! libtorch has one number of threads, one allocator and one global generator a process; a process a job keeps them
//! apart, and a job that is killed for its memory takes no other with it. A process reads its job from its standard
//! input, which then stays open: when it closes, because whoever started it wants it to stop or is gone, the process
//! saves and ends.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use super::job::{Job, Task};
use super::record::{CellRecord, Outcome};
use crate::error::{Error, Result, with_causes};
use crate::interrupt::Interrupt;
use crate::logging::Logging;

/// How often it is looked whether a process has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// What it leaves is there.
    Done,
    /// It was asked to stop and goes on another time.
    Stopped,
    /// It failed.
    Failed(String),
}

/// What happens to a job.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Its process was started.
    Started,
    /// Its process has ended, after so many seconds.
    Ended(End, f64),
}

/// Does jobs, `workers` at a time, each in a process that `command` starts.
///
/// A cell that fails leaves the others alone; of other jobs one that fails ends all, since what follows needs them.
/// After `interrupt` no job is begun and those at work are asked to stop. Returns how each ended that was begun.
///
/// # Errors
///
/// What the system refuses when a process is started.
pub fn run(
    jobs: Vec<Job>,
    workers: u32,
    interrupt: &Interrupt,
    command: &(dyn Fn() -> io::Result<Command> + Sync),
    on_event: &(dyn Fn(&Job, Event) + Sync),
) -> Result<Vec<(Job, End)>> {
    let queue = Mutex::new(VecDeque::from(jobs));
    let (ended, given_up) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || -> Result<()> {
        while !interrupt.is_requested() && !given_up.load(Ordering::SeqCst) {
            let Some(job) = next() else { break };
            on_event(&job, Event::Started);
            let started = Instant::now();
            let stops = || interrupt.is_requested() || given_up.load(Ordering::SeqCst);
            let end = done_in_a_process(&job, command, &stops).inspect_err(|_| {
                given_up.store(true, Ordering::SeqCst);
            })?;
            if matches!(end, End::Failed(_)) && !matches!(job.task, Task::Cell { .. }) {
                given_up.store(true, Ordering::SeqCst);
            }
            on_event(&job, Event::Ended(end.clone(), started.elapsed().as_secs_f64()));
            ended.lock().unwrap_or_else(PoisonError::into_inner).push((job, end));
        }
        Ok(())
    };
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers.max(1)).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    Ok(ended.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn done_in_a_process(
    job: &Job,
    command: &dyn Fn() -> io::Result<Command>,
    stops: &dyn Fn() -> bool,
) -> Result<End> {
    job.forget_failure()?;
    let (mut child, input) = start(job, command)?;
    let mut input = Some(input);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(error) => return Err(setup("wait for a process", &error)),
        }
        if stops() {
            // Closes it, which asks the process to stop.
            input = None;
        }
        sleep(POLL_INTERVAL);
    };
    end_of(job, status, input.is_none())
}

/// Starts the process and hands it the job.
fn start(job: &Job, command: &dyn Fn() -> io::Result<Command>) -> Result<(Child, ChildStdin)> {
    let path = job.log();
    let log = OpenOptions::new().append(true).create(true).open(&path);
    let log = log.map_err(Error::io("open", &path))?;
    let errors = log.try_clone().map_err(Error::io("open", &path))?;
    let mut child = command()
        .and_then(|mut command| command.stdin(Stdio::piped()).stdout(log).stderr(errors).spawn())
        .map_err(|error| setup("start a process", &error))?;
    let Some(mut input) = child.stdin.take() else {
        return Err(Error::Setup { action: "start a process", reason: "no input".to_owned() });
    };
    let mut line = serde_json::to_vec(job).map_err(Error::json("write", Path::new("a job")))?;
    line.push(b'\n');
    // A process that ended before it read its job says why by how it ended.
    let _ = input.write_all(&line).and_then(|()| input.flush());
    Ok((child, input))
}

fn end_of(job: &Job, status: ExitStatus, was_asked_to_stop: bool) -> Result<End> {
    if job.is_done()? {
        return Ok(End::Done);
    }
    if let Some(CellRecord { outcome: Outcome::Failed { message }, .. }) = job.cell_record()? {
        return Ok(End::Failed(message));
    }
    // One that is in the midst of a computation when it is told to end may stumble on its way out.
    if status.success() || was_asked_to_stop {
        return Ok(End::Stopped);
    }
    let said = last_line(job).map_or(String::new(), |line| format!(": {line}"));
    let message = format!("its process ended with {status}{said}");
    job.record(Outcome::Failed { message: message.clone() })?;
    Ok(End::Failed(message))
}

/// The last thing that the job's process said.
fn last_line(job: &Job) -> Option<String> {
    let text = fs::read(job.log()).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().rev().find(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
}

fn setup(action: &'static str, error: &io::Error) -> Error {
    Error::Setup { action, reason: error.to_string() }
}

/// The other side: reads a job from the standard input, does it, and stops when the input closes.
///
/// # Errors
///
/// What reading the job and doing it bring; of a cell they are recorded too.
pub fn serve(logging: &Logging, interrupt: &Interrupt) -> Result<()> {
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line);
    read.map_err(|error| setup("read a job", &error))?;
    let job: Job = serde_json::from_str(&line).map_err(Error::json("read", Path::new("a job")))?;
    ddil_libtorch::set_num_threads(job.setting.threads as usize)?;
    let at_once = Arc::new(AtomicBool::new(job.can_end_at_once()));
    end_with_the_input(interrupt.clone(), at_once.clone());
    let result = job.perform(logging, interrupt, &|| {
        at_once.store(true, Ordering::SeqCst);
        if interrupt.is_requested() {
            std::process::exit(0);
        }
    });
    if let Err(error) = &result {
        tracing::error!("{}", with_causes(error));
    }
    result
}

fn end_with_the_input(interrupt: Interrupt, at_once: Arc<AtomicBool>) {
    thread::spawn(move || {
        // An input that cannot be read is as good as closed.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        interrupt.request();
        if at_once.load(Ordering::SeqCst) {
            std::process::exit(0);
        }
    });
}
