use std::{fs, path::Path, thread::sleep, time::Duration};

use ddil_trainer::{
    Error,
    run_folder::{RunFolder, State, Status, is_in_use},
};
use serde_json::json;

use crate::{TestResult, child, folder_of_child};

fn config(steps: u32) -> serde_json::Value {
    json!({ "train": { "num_steps": steps } })
}

fn state(path: &Path) -> State {
    Status::from_folder(path).expect("there is a status").state
}

#[test]
fn a_new_run_has_its_folders_and_settings() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("runs/demo");
    let run = RunFolder::create(&path, &config(10))?;
    assert_eq!(fs::read_to_string(path.join("config.toml"))?, "[train]\nnum_steps = 10\n");
    assert!(run.checkpoints().is_dir());
    assert_eq!(run.samples_of(1000), path.join("samples/step_0001000.png"));
    assert_eq!(Status::from_folder(&path)?, Status { state: State::Running, step: 0, error: None });
    Ok(())
}

#[test]
fn a_folder_that_is_not_empty_is_left_unchanged() -> TestResult {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("thesis.tex"), "years of work")?;
    let error = RunFolder::create(folder.path(), &config(10)).expect_err("it is not empty");
    assert!(matches!(error, Error::FolderNotEmpty { .. }));
    assert_eq!(fs::read_dir(folder.path())?.count(), 1);
    let error = RunFolder::resume(folder.path()).expect_err("it is no run");
    assert!(error.to_string().ends_with("is not a run folder: it has no config.toml"), "{error}");
    assert!(RunFolder::resume(&folder.path().join("nowhere")).is_err());
    Ok(())
}

#[test]
fn settings_of_another_run_are_refused_with_what_differs() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    RunFolder::create(&path, &config(10))?.complete(0)?;
    let run = RunFolder::resume(&path)?;
    run.ensure_config(&config(10))?;
    let error = run.ensure_config(&config(20)).expect_err("they differ").to_string();
    let expected = "other settings:\n  train.num_steps: 10 there, 20 here";
    assert!(error.ends_with(expected), "{error}");
    Ok(())
}

#[test]
fn an_error_is_never_reported_as_success() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    let mut run = RunFolder::create(&path, &config(10))?;
    run.progress(3)?;
    assert_eq!(Status::from_folder(&path)?, Status { state: State::Running, step: 3, error: None });
    let source = ddil_files::Error::Io {
        action: "write",
        path: "student.safetensors".into(),
        source: std::io::Error::other("no space left"),
    };
    run.fail(4, &source)?;
    run.complete(10)?;
    run.interrupt(10)?;
    drop(run);
    let status = Status::from_folder(&path)?;
    assert_eq!((status.state, status.step), (State::Failed, 4));
    let error = status.error.ok_or("what went wrong")?;
    assert_eq!(error, "could not write student.safetensors: no space left");

    // A run that failed can be taken up again, and then succeed.
    let mut run = RunFolder::resume(&path)?;
    assert_eq!((state(&path), run.status().step), (State::Running, 4));
    run.complete(10)?;
    drop(run);
    assert_eq!(
        Status::from_folder(&path)?,
        Status { state: State::Completed, step: 10, error: None }
    );
    Ok(())
}

#[test]
fn a_run_that_ends_without_a_reason_has_failed() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    let result = std::panic::catch_unwind(|| {
        let _run = RunFolder::create(&path, &config(10)).expect("the folder is new");
        panic!("an operation panics");
    });
    assert!(result.is_err());
    assert_eq!(state(&path), State::Failed);
    RunFolder::resume(&path)?.interrupt(2)?;
    assert_eq!(state(&path), State::Interrupted);
    Ok(())
}

/// A lock is held by a process, not by a file: the file of a process that ended has no effect.
#[test]
fn a_leftover_lock_file_is_not_a_lock() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    RunFolder::create(&path, &config(10))?.complete(0)?;
    for left in ["1", "1 elsewhere", "", "not a number", &"9".repeat(10_000)] {
        fs::write(path.join(".lock"), left)?;
        assert!(!is_in_use(&path)?, "{left:.20}");
        RunFolder::resume(&path)?.complete(0)?;
    }
    let text = fs::read_to_string(path.join(".lock"))?;
    assert!(text.starts_with(&format!("{}", std::process::id())), "{text}");
    Ok(())
}

/// Killed before there was anything to resume, the same command starts again; killed a little later, the run resumes.
#[test]
fn a_run_killed_during_its_creation_can_be_started_or_resumed() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    fs::create_dir(&path)?;
    fs::write(path.join(".lock"), "4711\n")?;
    fs::write(path.join(".tmp-config.toml-4711"), "[tr")?;
    RunFolder::create(&path, &config(10))?.interrupt(0)?;
    assert!(!path.join(".tmp-config.toml-4711").exists());

    fs::remove_dir(path.join("samples"))?;
    fs::remove_dir(path.join("checkpoints"))?;
    fs::remove_file(path.join("status.json"))?;
    let run = RunFolder::resume(&path)?;
    assert!(run.checkpoints().is_dir() && path.join("samples").is_dir());
    Ok(())
}

#[test]
fn two_runs_never_share_a_folder_and_kill_9_frees_it() -> TestResult {
    if let Some(folder) = folder_of_child() {
        let _run = RunFolder::create(&folder, &config(10))?;
        fs::write(folder.join("samples/ready"), "")?;
        sleep(Duration::from_secs(60));
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    let test = "run_folder::two_runs_never_share_a_folder_and_kill_9_frees_it";
    let mut process = child(test, &path)?.spawn()?;
    for _ in 0..600 {
        if path.join("samples/ready").exists() {
            break;
        }
        sleep(Duration::from_millis(50));
    }
    let error = RunFolder::resume(&path).expect_err("it is in use");
    let expected = format!("is in use by another process ({})", process.id());
    assert!(error.to_string().ends_with(&expected), "{error}");
    assert!(matches!(RunFolder::create(&path, &config(10)), Err(Error::FolderNotEmpty { .. })));
    assert!(is_in_use(&path)?);

    // On a disk shared between machines, the process number alone would be misleading.
    fs::write(path.join(".lock"), "4711 elsewhere\n")?;
    let error = RunFolder::resume(&path).expect_err("it is in use");
    let Error::FolderInUse { holder: Some(holder), .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!((holder.process, holder.host.as_deref()), (4711, Some("elsewhere")));
    let expected = "in use by another process (process 4711 on the machine `elsewhere`)";
    assert!(error.to_string().ends_with(expected), "{error}");
    fs::write(path.join(".lock"), "")?;
    let error = RunFolder::resume(&path).expect_err("it is in use").to_string();
    assert!(error.ends_with("is in use by another process"), "{error}");

    fs::create_dir(path.join("checkpoints/.tmp-step_0000001-1"))?;
    process.kill()?;
    process.wait()?;
    assert!(!is_in_use(&path)?);
    assert_eq!(state(&path), State::Running);
    let run = RunFolder::resume(&path)?;
    assert_eq!(fs::read_dir(run.checkpoints())?.count(), 0, "what was half done is gone");
    Ok(())
}
