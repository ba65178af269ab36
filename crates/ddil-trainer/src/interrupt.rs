//! Ctrl-C, SIGTERM and a closed terminal: the first requests a stop, the second ends the process.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::{Error, Result};

/// Whether a stop of the run was requested.
///
/// The first Ctrl-C (or SIGTERM, or SIGHUP when the terminal closes) sets a flag that the loop reads between two steps, so that it can save. The second has
/// its default effect: it ends the process at once. Either way, the run can be resumed exactly from the last
/// checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    /// Set by signals, the second of which ends the process.
    signalled: Arc<AtomicBool>,
    /// Set by other means. Separate, because a first signal that follows must not end the process.
    requested: Arc<AtomicBool>,
}

impl Interrupt {
    /// Handles signals for the rest of the process's life. The first is acknowledged in the log at once: the step in
    /// progress may take long.
    ///
    /// # Errors
    ///
    /// [`Error::Setup`] if the system rejects a handler.
    pub fn listen() -> Result<Self> {
        let refused = |error: io::Error| Error::Setup {
            action: "listen to signals",
            reason: error.to_string(),
        };
        let interrupt = Self::default();
        for &signal in stop_signals() {
            // In this order: the first one runs before the second has set the flag.
            flag::register_conditional_default(signal, interrupt.signalled.clone())
                .and_then(|_| flag::register(signal, interrupt.signalled.clone()))
                .map_err(refused)?;
        }
        let mut signals = Signals::new(stop_signals()).map_err(refused)?;
        thread::spawn(move || {
            if signals.forever().next().is_some() {
                tracing::info!(
                    "stopping after the current step is finished and saved; Ctrl-C again exits at once, without saving"
                );
            }
        });
        Ok(interrupt)
    }

    /// Whether the loop should save and stop.
    pub fn is_requested(&self) -> bool {
        self.signalled.load(Ordering::Relaxed) || self.requested.load(Ordering::Relaxed)
    }

    /// Requests the stop as a signal would; for programs with other means of control.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Relaxed);
    }
}

/// The signals that request a stop. SIGHUP is left alone where it is ignored: `nohup` keeps a run going on purpose.
fn stop_signals() -> &'static [i32] {
    if is_ignored(SIGHUP) { &[SIGINT, SIGTERM] } else { &[SIGINT, SIGTERM, SIGHUP] }
}

/// Whether this process ignores a signal, by the mask that Linux shows; elsewhere none counts as ignored.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

/// Calls a function when the standard input closes: for a process that should end with its parent.
pub fn when_stdin_closes(then: impl FnOnce() + Send + 'static) {
    thread::spawn(move || {
        // An input that cannot be read counts as closed.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        then();
    });
}
