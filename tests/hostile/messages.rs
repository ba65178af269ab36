//! Collects the error messages that the tests provoke.

use std::fs::OpenOptions;
use std::io::Write;

/// Appends a message to the file that `DDIL_MESSAGES` names, if it is set.
pub(crate) fn collect(origin: &str, message: &str) {
    let Some(path) = std::env::var_os("DDIL_MESSAGES") else { return };
    let file = OpenOptions::new().append(true).create(true).open(&path);
    // One write per line: several tests append at once.
    let line = format!("{origin}: {}\n", message.replace('\n', "\\n"));
    file.and_then(|mut file| file.write_all(line.as_bytes())).expect("DDIL_MESSAGES is writable");
}
