use std::fs;

use ddil_trainer::{Logging, Progress};

use crate::{TestResult, child, folder_of_child};

/// In a separate process, because a program has one log; its standard error stream is not a terminal.
#[test]
fn messages_and_progress_go_to_screen_and_file() -> TestResult {
    const TEST: &str = "logging::messages_and_progress_go_to_screen_and_file";
    if let Some(folder) = folder_of_child() {
        let logging = Logging::start("info")?;
        tracing::info!("before there is a folder");
        logging.also_to(&folder.join("run.log"))?;
        let mut progress = Progress::new("train", 10, 1000);
        for step in 11..=1000 {
            progress.update(step, &[("loss".to_owned(), 0.5)]);
        }
        progress.finish();
        tracing::debug!("too much");
        tracing::warn!("a last word");
        assert!(Logging::start("info").is_err(), "there is one already");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let output = child(TEST, folder.path())?.output()?;
    assert!(output.status.success());
    let screen = String::from_utf8(output.stderr)?;
    let lines: Vec<&str> = screen.lines().map(str::trim).collect();
    assert_eq!(lines.len(), 4, "{screen}");
    assert_eq!(lines[0], "INFO before there is a folder");
    assert!(lines[1].starts_with("INFO train 11/1000  "), "{screen}");
    assert!(lines[2].starts_with("INFO train 1000/1000  "), "{screen}");
    assert!(lines[2].ends_with("  0s left  loss 0.5000"), "{screen}");
    assert_eq!(lines[3], "WARN a last word");

    let file = fs::read_to_string(folder.path().join("run.log"))?;
    assert_eq!(file.lines().count(), 3, "{file}");
    for (line, shown) in file.lines().zip(&lines[1..]) {
        let text = shown.split_once(' ').ok_or("a level and a text")?.1;
        assert!(line.ends_with(text), "{line}");
    }
    Ok(())
}
