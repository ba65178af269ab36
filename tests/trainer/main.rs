//! The files of a run, and what happens when the disk, the user or a crash interferes.

mod checkpoint;
mod compare;
mod doctor;
mod ema;
mod evaluation;
mod fast_path;
mod interrupt;
mod logging;
mod lr_schedule;
mod memory;
mod not_finite;
mod optimizer;
mod record;
mod run_folder;
mod tensorboard;

use ddil_tests::{child, folder_of_child, small_unet};

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// As [`child`], in a process whose files cannot grow beyond 32 or 64 KiB, which simulates a full disk: writes fail
/// half-way.
#[cfg(unix)]
fn child_on_full_disk(
    test: &str,
    folder: &std::path::Path,
) -> std::io::Result<std::process::Command> {
    let child = child(test, folder)?;
    let mut shell = std::process::Command::new("sh");
    // Without the trap the process would be killed by a signal, which a full disk does not send.
    shell.args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\""]);
    shell.arg(child.get_program()).args(child.get_args());
    shell.envs(child.get_envs().filter_map(|(name, value)| Some((name, value?))));
    // Where the tests' own output goes to a file, that too would be too large for the child.
    shell.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    Ok(shell)
}
