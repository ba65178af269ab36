//! Ctrl-C: once asks the run to stop, twice ends it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

use crate::{Error, Result};

/// Whether the run was asked to stop.
///
/// The first Ctrl-C (or SIGTERM) sets a flag that the loop reads between two steps, so that it can save. The
/// second does what it would have done without us: it ends the process at once. An exact resume from the
/// last checkpoint is possible after either.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Starts to listen to signals, for the rest of the process's life.
    ///
    /// # Errors
    ///
    /// [`Error::Setup`] if the system refuses a handler.
    pub fn listen() -> Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first one runs before the second has set the flag.
            flag::register_conditional_default(signal, interrupt.0.clone())
                .and_then(|_| flag::register(signal, interrupt.0.clone()))
                .map_err(|error| Error::Setup {
                    action: "listen to signals",
                    reason: error.to_string(),
                })?;
        }
        Ok(interrupt)
    }

    /// Whether the loop should save and stop now.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks for the stop as a signal would; for programs with other ways of being asked.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
