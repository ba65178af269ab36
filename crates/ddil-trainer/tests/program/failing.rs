//! What goes wrong on the way: the run stops, says why, and can go on.

use std::fs;

use crate::support::{
    TestResult, UPDATES, Workshop, arguments, assert_same_end, checkpoints, num_lines, snapshot,
    status,
};

#[test]
fn a_loss_that_is_not_finite_stops_before_the_weights() -> TestResult {
    let workshop = Workshop::new();
    let settings =
        ["learning_rate.peak=1e30", "learning_rate.warmup_steps=0", "output.checkpoint_interval=1"];
    let ended = workshop.ddil(&arguments("train", "wild", &settings));
    let run = workshop.run("wild");
    let step = status(&run)["step"].as_u64().ok_or("a number")?;
    ended.refused(&[&format!("step {}", step + 1), "NaN", "ddil train --resume"]);
    assert!((1..UPDATES).contains(&step), "{step}");
    assert_eq!(status(&run)["state"], "failed");
    let reason = status(&run)["error"].as_str().ok_or("the reason")?.to_owned();
    assert!(reason.contains(&format!("step {}", step + 1)), "{reason}");
    // The last good state and nothing after it.
    let newest = checkpoints(&run).pop_last().ok_or("a checkpoint")?;
    assert_eq!((newest.0, num_lines(&run) as u64), (step, step));
    workshop.ddil(&["inspect", &newest.1.display().to_string()]).succeeded();
    assert_ne!(status(&run)["state"], "completed");
    Ok(())
}

#[test]
fn a_full_disk_loses_nothing_that_was_saved() -> TestResult {
    let workshop = Workshop::new();
    let whole = workshop.complete("train", "whole", &[]);
    let run = workshop.rewound(&whole, "full", 3);
    let path = run.display().to_string();
    let saved = snapshot(&checkpoints(&run)[&3]);

    // 16 to 32 KiB a file: enough for the metrics, too little for the weights.
    let resume = ["train", "--resume", &path];
    let output = workshop.command_with_file_limit(32, &resume).output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for words in ["could not write", "parameters.safetensors", "too large", "--resume"] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    assert_eq!(status(&run)["state"], "failed");
    assert_eq!(checkpoints(&run).into_keys().collect::<Vec<_>>(), [3]);
    assert!(snapshot(&checkpoints(&run)[&3]) == saved);
    let left: Vec<_> = snapshot(&run)
        .into_keys()
        .filter(|name| name.display().to_string().contains(".tmp-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");

    workshop.ddil(&resume).succeeded();
    assert_same_end(&whole, &run);
    Ok(())
}

#[test]
fn two_runs_never_share_a_folder() -> TestResult {
    let workshop = Workshop::new();
    let run = workshop.run("busy");
    let path = run.display().to_string();
    let mut running = workshop.start(&arguments("train", "busy", &["train.updates=1000000"]));
    assert!(running.wait_until(|| num_lines(&run) >= 4));
    let id = running.id().to_string();
    let other = workshop.ddil(&["train", "--resume", &path]);
    other.refused(&[&path, "in use by another process", &id]);
    workshop.ddil(&arguments("train", "busy", &[])).refused(&[&path, "already exists"]);
    assert_eq!(status(&run)["state"], "running");
    running.kill();
    let inspected = workshop.ddil(&["inspect", &path, "--json"]).succeeded();
    let found: serde_json::Value = serde_json::from_str(&inspected.stdout)?;
    assert_eq!((&found["status"]["state"], &found["in_use"]), (&"running".into(), &false.into()));
    Ok(())
}

/// A full disk is met when room for states is set aside, and the error says where: no write ends the process.
#[test]
fn a_buffer_without_room_on_disk_says_where() -> TestResult {
    let workshop = Workshop::with_teacher();
    let policy = "mixing.student.policy={ kind = \"buffer\", buffer = { capacity = 1_000_000, \
                  byte_budget = 500, spill = { byte_budget = 100_000_000 } } }";
    // 2 to 4 MiB a file: enough for all else, too little for a file of states.
    let arguments = arguments("distill", "full", &[policy]);
    let output = workshop.command_with_file_limit(4096, &arguments).output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let run = workshop.run("full");
    let folder = run.join("buffer").display().to_string();
    for words in ["could not spill states of the buffer to", &folder, "reserve room", "too large"] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    assert_eq!(status(&run)["state"], "failed");
    Ok(())
}

/// A folder that two runs would spill to is one run's alone.
#[test]
fn a_folder_is_spilled_to_by_one_run() -> TestResult {
    let workshop = Workshop::with_teacher();
    let folder = workshop.path("scratch");
    fs::create_dir(&folder)?;
    let lock = ddil_trainer::run_folder::lock(&folder)?;
    let policy = format!(
        "mixing.student.policy={{ kind = \"buffer\", buffer = {{ capacity = 16, byte_budget = 500, \
         spill = {{ folder = {folder:?}, byte_budget = 200_000 }} }} }}"
    );
    fs::write(folder.join("ring_01_000000.rows"), "left by a run that was killed")?;
    let second = arguments("distill", "second", &[&policy]);
    workshop.ddil(&second).refused(&["scratch", "in use"]);
    assert!(folder.join("ring_01_000000.rows").exists());
    drop(lock);
    workshop.complete("distill", "third", &[&policy]);
    assert!(!folder.join("ring_01_000000.rows").exists());
    Ok(())
}
