//! What a run leaves on disk, and what happens when the disk, the user or a crash gets in its way.

mod checkpoint;
mod dataset;
mod doctor;
mod ema;
mod interrupt;
mod logging;
mod lr_schedule;
mod optimizer;
mod picture;
mod record;
mod run_folder;
mod settings;
mod tensorboard;

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// A command that runs one test of this program again, in a process of its own that finds `folder` in
/// the environment variable `DDIL_TEST_CHILD`.
fn child(test: &str, folder: &std::path::Path) -> std::io::Result<std::process::Command> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["--exact", test, "--nocapture"]).env("DDIL_TEST_CHILD", folder);
    Ok(command)
}

/// The folder that [`child`] names, in such a process.
fn folder_of_child() -> Option<std::path::PathBuf> {
    std::env::var_os("DDIL_TEST_CHILD").map(Into::into)
}
