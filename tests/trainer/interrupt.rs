#![cfg(unix)]

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use ddil_trainer::Interrupt;

use crate::{TestResult, child, folder_of_child};

fn send(signal: &str) -> std::io::Result<()> {
    let process = std::process::id().to_string();
    Command::new("kill").args([signal, &process]).status().map(drop)
}

/// In a separate process: the second signal ends it.
#[test]
fn the_first_signal_requests_a_stop_and_the_second_ends() -> TestResult {
    if let Some(folder) = folder_of_child() {
        let interrupt = Interrupt::listen()?;
        assert!(!interrupt.is_requested());
        send("-INT")?;
        let start = Instant::now();
        while !interrupt.is_requested() && start.elapsed() < Duration::from_secs(5) {
            sleep(Duration::from_millis(1));
        }
        fs::write(folder.join("saved"), interrupt.is_requested().to_string())?;
        send("-INT")?;
        sleep(Duration::from_secs(5));
        fs::write(folder.join("alive"), "")?;
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let test = "interrupt::the_first_signal_requests_a_stop_and_the_second_ends";
    let status = child(test, folder.path())?.status()?;
    assert_eq!(status.signal(), Some(2), "{status}");
    assert_eq!(fs::read_to_string(folder.path().join("saved"))?, "true");
    assert!(!folder.path().join("alive").exists());
    Ok(())
}

#[test]
fn a_program_can_request_a_stop() {
    let interrupt = Interrupt::default();
    let other = interrupt.clone();
    other.request();
    assert!(interrupt.is_requested());
}
