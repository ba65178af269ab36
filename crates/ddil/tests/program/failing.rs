//! Failures during a run: it stops, reports the reason, and can be resumed.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{
    Ended, TestResult, UPDATES, Workshop, arguments, assert_same_end, checkpoints, num_lines,
    snapshot, status,
};

#[test]
fn a_loss_that_is_not_finite_stops_before_the_weights() -> TestResult {
    let workshop = Workshop::new();
    let settings =
        ["learning_rate.peak=1e30", "learning_rate.warmup_steps=0", "output.checkpoint_interval=1"];
    let ended = workshop.ddil(&arguments("train", "wild", &settings));
    let run = workshop.run("wild");
    let step = status(&run)["step"].as_u64().ok_or("a number")?;
    let saved = format!("not_finite/step_{:07}", step + 1);
    let words = ["NaN", "output of the network, timestep", "ddil train --resume", &saved];
    ended.refused(&words).refused(&[&format!("step {}", step + 1)]);
    assert!(run.join(saved).join("batch.safetensors").is_file());
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

/// A small mounted disk under a folder, if the user may mount one.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(folder: &'a Path, kib: u32) -> Option<Self> {
        fs::create_dir_all(folder).ok()?;
        let size = format!("size={kib}k");
        let options = ["-t", "tmpfs", "-o", &size, "tmpfs"];
        let mounted = Command::new("mount").args(options).arg(folder).output().ok()?;
        mounted.status.success().then_some(Self(folder))
    }

    fn remount(&self, option: &str) {
        let remount = ["-o", &format!("remount,{option}")];
        let done = Command::new("mount").args(remount).arg(self.0).status();
        assert!(done.is_ok_and(|status| status.success()), "what is mounted can be mounted again");
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_disk_that_is_really_full_or_cannot_be_written_loses_nothing() -> TestResult {
    let workshop = Workshop::new();
    let runs = workshop.path("runs");
    let Some(disk) = SmallDisk::mount(&runs, 16 << 10) else {
        eprintln!("SKIPPED: only root can mount a small disk");
        return Ok(());
    };
    let whole = workshop.complete("train", "whole", &[]);
    let run = workshop.rewound(&whole, "full", 3);
    let resume = ["train", "--resume", &run.display().to_string()];
    let saved = snapshot(&checkpoints(&run)[&3]);
    // Less than a checkpoint is left.
    let rest = runs.join("filler");
    let size = saved.values().map(Vec::len).sum::<usize>() / 2;
    fill(&rest, size)?;
    workshop.ddil(&resume).refused(&["could not write", "No space left on device", "--resume"]);
    assert_ne!(status(&run)["state"], "completed");
    assert!(snapshot(&checkpoints(&run)[&3]) == saved);

    fs::remove_file(&rest)?;
    disk.remount("ro");
    workshop.ddil(&resume).refused(&["could not open", ".lock", "Read-only file system"]);
    assert!(snapshot(&checkpoints(&run)[&3]) == saved);

    disk.remount("rw");
    workshop.ddil(&resume).succeeded();
    assert_same_end(&whole, &run);
    Ok(())
}

/// Fills a disk until this many bytes are left.
fn fill(path: &Path, left: usize) -> TestResult {
    let mut file = fs::File::create(path)?;
    while file.write_all(&[0; 1 << 12]).is_ok() {}
    let length = file.metadata()?.len() as usize;
    Ok(file.set_len(length.saturating_sub(left) as u64)?)
}

/// As root nothing is forbidden, so it is another user who tries, where there is one to become.
#[test]
fn a_read_only_folder_is_reported_and_left_unchanged() -> TestResult {
    let workshop = Workshop::new();
    let run = workshop.complete("train", "run", &[]);
    let before = snapshot(&run);
    let path = run.display().to_string();
    let readable = ["a+rX,a-w", &workshop.path("").display().to_string()].map(str::to_owned);
    assert!(Command::new("chmod").arg("-R").args(readable).status()?.success());
    let mut command = workshop.command(&["train", "--resume", &path]);
    if fs::write(run.join("probe"), "").is_ok() {
        use std::os::unix::process::CommandExt;
        fs::remove_file(run.join("probe"))?;
        command.uid(65534).gid(65534);
    }
    let refused = command.output();
    let restored = Command::new("chmod").args(["-R", "u+w"]).arg(workshop.path("")).status()?;
    assert!(restored.success());
    let Ok(refused) = refused.map(Ended::of) else {
        eprintln!("SKIPPED: this user may write everywhere and become nobody else");
        return Ok(());
    };
    if refused.code == Some(127) || refused.stderr.contains("error while loading") {
        eprintln!("SKIPPED: nobody else can run the program: {}", refused.stderr);
        return Ok(());
    }
    refused.refused(&["could not open", ".lock", "Permission denied"]);
    assert!(snapshot(&run) == before);
    Ok(())
}

/// The output stream is closed or full: the run is not lost, and nothing panics.
#[test]
fn a_full_output_stream_is_not_a_panic() -> TestResult {
    let workshop = Workshop::new();
    let full = || fs::File::options().write(true).open("/dev/full");
    let mut command = workshop.command(&arguments("train", "deaf", &[]));
    let ended = Ended::of(command.stderr(full()?).stdout(Stdio::piped()).output()?).succeeded();
    assert!(ended.stdout.contains("done: the model is in"), "{}", ended.stdout);
    assert_eq!(status(&workshop.run("deaf"))["state"], "completed");

    let mut command = workshop.command(&["train", "nowhere.toml"]);
    assert_eq!(command.stderr(full()?).output()?.status.code(), Some(1));

    let mut command = workshop.command(&arguments("train", "mute", &[]));
    let ended = Ended::of(command.stdout(full()?).output()?);
    ended.refused(&["No space left on device"]);
    assert_eq!(status(&workshop.run("mute"))["state"], "completed");
    // The reader has closed the pipe, which is not an error.
    let arguments = arguments("train", "unheard", &[]);
    let mut command = workshop.command(&arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    drop(child.stdout.take());
    assert!(child.wait()?.success());
    for arguments in [vec!["init"], vec!["init", "fashion-mnist-pd-ddil"], vec!["doctor"]] {
        let mut command = workshop.command(&arguments);
        Ended::of(command.stdout(full()?).output()?).refused(&["No space left on device"]);
    }
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
    // The lock file of a killed process does not affect the next one.
    assert!(fs::read_to_string(run.join(".lock"))?.starts_with(&id));
    let inspected = workshop.ddil(&["inspect", &path, "--json"]).succeeded();
    let found: serde_json::Value = serde_json::from_str(&inspected.stdout)?;
    assert_eq!((&found["status"]["state"], &found["in_use"]), (&"running".into(), &false.into()));
    Ok(())
}

/// A full disk is detected when space for states is reserved, and the error names the place: no write ends the process.
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

/// A spill folder can be used by one run only.
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
