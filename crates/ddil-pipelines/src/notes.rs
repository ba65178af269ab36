//! Remarks about files, each made once: a model is opened several times in a run.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Logs a warning, unless the process has logged the same one before.
pub(crate) fn warn_once(message: &str) {
    if is_new(message) {
        tracing::warn!("{message}");
    }
}

/// As [`warn_once`], for what is as it should be.
pub(crate) fn note_once(message: &str) {
    if is_new(message) {
        tracing::info!("{message}");
    }
}

fn is_new(message: &str) -> bool {
    static LOGGED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    LOGGED.lock().unwrap_or_else(PoisonError::into_inner).insert(message.to_owned())
}
