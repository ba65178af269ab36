//! `ddil compare`: its work, the work that it skips, and its results.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{TestResult, Workshop, json, num_lines, snapshot, status};

/// Two arms, the first of which has no states but the dataset's, with two seeds.
const PRIORS: &str = r#"[[axes]]
name = "priors"
baseline = "forward"
values = [
    { name = "forward", set = { "mixing.priors" = { kind = "constant", priors = { forward = 1.0 } } } },
    { name = "mixed" },
]
"#;

/// Few updates, and figures that take no time.
const HEAD: &str = r#"name = "tiny"
base = "distill.toml"
seeds = [0, 1]

[set]
"student.updates_per_stage" = 3
"data.batch_size" = 7

[evaluate]
samples = 20
steps = [2]
samples_off_steps = 12
shift_samples = 6
teacher_steps = 6
extractor = "raw_pixels"
"#;

/// The same with a teacher that is measured in one way only, for tests of other things.
fn quick() -> String {
    HEAD.replace("[set]", "[set]\n\"teacher.guidance\" = { kind = \"baked_in\" }")
        .replace("teacher_steps = 6", "teacher_steps = 4")
        .replace("steps = [2]\n", "")
}

fn write_matrix(workshop: &Workshop, text: &str) {
    fs::write(workshop.path("matrix.toml"), text).expect("it is writable");
}

/// A workshop with a matrix of two arms and two seeds.
fn prepared(head: &str) -> Workshop {
    let workshop = Workshop::with_teacher();
    write_matrix(&workshop, &format!("{head}\n{PRIORS}"));
    workshop
}

fn cells(workshop: &Workshop) -> PathBuf {
    workshop.run("tiny").join("cells")
}

fn entries(workshop: &Workshop) -> Vec<Value> {
    let found = json(&workshop.run("tiny").join("results.json"));
    found.as_array().expect("it is an array").clone()
}

fn of_kind<'a>(entries: &'a [Value], kind: &str) -> Vec<&'a Value> {
    entries.iter().filter(|entry| entry["kind"] == kind).collect()
}

/// When each checkpoint and record of the cells was written.
fn times(folder: &Path) -> Vec<(PathBuf, std::time::SystemTime)> {
    let time = |name: &PathBuf| fs::metadata(folder.join(name)).and_then(|m| m.modified());
    snapshot(folder)
        .into_keys()
        .map(|name| (name.clone(), time(&name).expect("it was just listed")))
        .collect()
}

#[test]
fn a_complete_comparison_is_not_repeated() -> TestResult {
    let workshop = prepared(HEAD);
    let listed = workshop.ddil(&["compare", "matrix.toml", "--dry-run"]).succeeded();
    for words in ["forward_seed0  new", "mixed_seed1    new", "4 cells, 4 to do"] {
        assert!(listed.stdout.contains(words), "{words}: {}", listed.stdout);
    }
    assert!(!workshop.run("tiny").exists());

    let ended = workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    for words in ["Mean ± standard error", "priors: mixed - forward", "two halves", "at timestep"]
    {
        assert!(ended.stdout.contains(words), "{words}: {}", ended.stdout);
    }
    assert!(ended.stderr.contains("mixed_seed1: done"), "{}", ended.stderr);
    let found = entries(&workshop);
    assert_eq!(of_kind(&found, "data").len(), 1, "nothing is held out");
    // Guided and unguided in full, guided in 4 and in 2.
    assert_eq!(of_kind(&found, "teacher").len(), 4);
    let of_cells = of_kind(&found, "cell");
    assert_eq!(of_cells.len(), 8);
    for entry in of_cells {
        let own = entry["steps"] == 4;
        assert_eq!(entry["own_steps"], own);
        let measurement = &entry["measurement"];
        assert_eq!(measurement["samples"], if own { 20 } else { 12 });
        assert!(measurement["frechet_to_teacher"].as_f64().ok_or("a number")? >= 0.0);
        assert_eq!(measurement["shift"].as_array().map_or(0, Vec::len), if own { 4 } else { 0 });
        assert_eq!(measurement["updates"], 3);
        assert_eq!(measurement["seed"], entry["seed"]);
    }
    let folder = workshop.run("tiny");
    // Two panels: coverage of 20 samples and of 12 is not comparable.
    for (name, bars) in [("quality.svg", 8), ("shift.svg", 8)] {
        let svg = fs::read_to_string(folder.join(name))?;
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{name}");
        // Each bar has its mean in its middle.
        assert_eq!(svg.matches("<circle").count(), bars, "{name}");
    }
    // Four rows of teachers, at the students' numbers of steps and in full, then one per arm.
    let picture = fs::read(folder.join("side_by_side.png"))?;
    assert!(picture.starts_with(b"\x89PNG"));
    assert!(fs::read_to_string(folder.join("table.md"))?.contains("| priors | steps |"));

    // The cell's config is one of `ddil distill`, and its run is one.
    let run = cells(&workshop).join("mixed_seed1");
    assert_eq!(status(&run)["state"], "completed");
    assert_eq!(
        fs::read(run.join("config.toml"))?,
        fs::read(cells(&workshop).join("mixed_seed1.toml"))?
    );

    let (before, results) = (times(&cells(&workshop)), entries(&workshop));
    fs::remove_file(folder.join("quality.svg"))?;
    let again = workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    assert_eq!(again.stdout, ended.stdout);
    assert!(!again.stderr.contains("started"), "{}", again.stderr);
    assert_eq!((times(&cells(&workshop)), entries(&workshop)), (before, results));
    assert!(folder.join("quality.svg").is_file());
    Ok(())
}

#[test]
fn a_cell_that_diverges_leaves_the_others_alone() -> TestResult {
    let wild = r#"[[axes]]
name = "rate"
baseline = "tame"
values = [
    { name = "wild", set = { "learning_rate.peak" = 1e30, "learning_rate.warmup_steps" = 0 } },
    { name = "tame" },
]
"#;
    let workshop = Workshop::with_teacher();
    write_matrix(&workshop, &format!("{}\n{wild}", quick().replace("[0, 1]", "[5]")));
    let ended = workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    assert!(ended.stderr.contains("wild_seed5: diverged (step 2: loss is NaN"), "{}", ended.stderr);
    assert!(ended.stdout.contains("0, 1 diverged"), "{}", ended.stdout);
    let found = entries(&workshop);
    let states: Vec<(&Value, &Value)> = of_kind(&found, "cell")
        .into_iter()
        .map(|entry| (&entry["name"], &entry["state"]))
        .collect();
    assert_eq!(states[0], (&"wild_seed5".into(), &"diverged".into()));
    let tame = |(name, state): &&(&Value, &Value)| *name == "tame_seed5" && *state != "diverged";
    assert_eq!(states.iter().filter(tame).count(), 1);
    let record = json(&cells(&workshop).join("wild_seed5.json"));
    assert_eq!(
        (&record["outcome"]["state"], &record["outcome"]["step"]),
        (&"diverged".into(), &2.into())
    );
    let message = record["outcome"]["message"].as_str().ok_or("words")?;
    assert!(message.contains("NaN"), "{message}");

    // It is a result, and not tried again.
    let again = workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    assert!(!again.stderr.contains("started"), "{}", again.stderr);
    Ok(())
}

#[test]
fn a_failed_cell_is_reported_and_retried() -> TestResult {
    let workshop = prepared(&quick());
    // Other files are in the place of the run.
    let run = cells(&workshop).join("mixed_seed0");
    fs::create_dir_all(&run)?;
    fs::write(run.join("notes.txt"), "mine")?;
    let ended = workshop.ddil(&["compare", "matrix.toml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("mixed_seed0: failed"), "{}", ended.stderr);
    assert!(ended.stdout.contains(", 1 failed"), "{}", ended.stdout);
    assert!(fs::read_to_string(cells(&workshop).join("mixed_seed0.log"))?.contains("not empty"));
    let found = entries(&workshop);
    let failed: Vec<_> = found.iter().filter(|entry| entry["state"] == "failed").collect();
    assert_eq!(failed.len(), 1);
    assert!(failed[0]["message"].to_string().contains("not empty"));

    fs::remove_file(run.join("notes.txt"))?;
    let again = workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    assert_eq!(again.stderr.matches(": started").count(), 1, "{}", again.stderr);
    assert_eq!(of_kind(&entries(&workshop), "cell").len(), 4);
    Ok(())
}

/// Stops a comparison in the midst of its cells, takes it up again, and compares with one that was never stopped.
fn goes_on_after(stop: impl Fn(crate::support::Running)) {
    let long = quick().replace("updates_per_stage\" = 3", "updates_per_stage\" = 24");
    let one_arm = "[[axes]]\nname = \"priors\"\nvalues = [{ name = \"mixed\" }]\n";
    let workshop = Workshop::with_teacher();
    write_matrix(&workshop, &format!("{}\n{one_arm}", long.replace("\"tiny\"", "\"whole\"")));
    workshop.ddil(&["compare", "matrix.toml"]).succeeded();

    write_matrix(&workshop, &format!("{long}\n{one_arm}"));
    let run = cells(&workshop).join("mixed_seed0");
    let mut running = workshop.start(&["compare", "matrix.toml"]);
    assert!(running.wait_until(|| num_lines(&run) >= 5), "it did not get anywhere");
    stop(running);
    assert!(!cells(&workshop).join("mixed_seed0.json").exists(), "it was stopped too late");
    let ended = workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    assert!(!ended.stderr.contains("failed"), "{}", ended.stderr);
    let lines = |name: &str| {
        let run = workshop.run(name).join("cells/mixed_seed0");
        fs::read(run.join("metrics.jsonl")).expect("it was written")
    };
    assert!(lines("tiny") == lines("whole"));
    let scores = |name: &str| {
        let found = json(&workshop.run(name).join("results.json"));
        let found = found.as_array().expect("it is an array").clone();
        found.iter().map(|entry| entry["measurement"]["frechet"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(scores("tiny"), scores("whole"));
}

#[test]
fn ctrl_c_saves_every_cell() {
    goes_on_after(|running| {
        let ended = running.signal("INT").succeeded();
        assert!(ended.stdout.contains("run the same command to continue"), "{}", ended.stdout);
    });
}

#[test]
fn kill_9_of_the_comparison_loses_no_cell() {
    goes_on_after(|running| drop(running.kill()));
}

#[test]
fn other_settings_are_refused_without_fresh() {
    let workshop = prepared(&quick());
    workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    let before = times(&cells(&workshop));
    let faster = PRIORS
        .replace("{ name = \"mixed\" }", "{ name = \"mixed\", set = { \"ema.decay\" = 0.5 } }");
    write_matrix(&workshop, &format!("{}\n{faster}", quick()));
    let refused = workshop.ddil(&["compare", "matrix.toml"]);
    refused.refused(&["mixed_seed0", "mixed_seed1", "ema.decay: 0.9 there, 0.5 here", "--fresh"]);
    let listed = workshop.ddil(&["compare", "matrix.toml", "--dry-run"]).succeeded();
    assert!(
        listed.stdout.contains("mixed_seed0    made with other settings: ema.decay"),
        "{}",
        listed.stdout
    );
    assert_eq!(times(&cells(&workshop)), before);

    let fresh = workshop.ddil(&["compare", "matrix.toml", "--fresh"]).succeeded();
    assert_eq!(fresh.stderr.matches("_seed0: started").count(), 1, "{}", fresh.stderr);
    assert!(!fresh.stderr.contains("forward_seed"), "{}", fresh.stderr);

    // Measured on more samples, nothing is trained again.
    write_matrix(
        &workshop,
        &format!("{}\n{faster}", quick().replace("samples = 20", "samples = 24")),
    );
    let checkpoints = cells(&workshop).join("mixed_seed0/checkpoints");
    let before = times(&checkpoints);
    workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    assert_eq!(times(&checkpoints), before);
    let own: Vec<Value> = entries(&workshop)
        .into_iter()
        .filter(|entry| entry["kind"] == "cell" && entry["steps"] == 4)
        .map(|entry| entry["measurement"]["samples"].clone())
        .collect();
    assert_eq!(own, [24; 4]);
}

#[test]
fn without_measurements_nothing_is_trained() {
    let workshop = prepared(&quick());
    write_matrix(
        &workshop,
        &format!("{}\n{PRIORS}", quick().replace("raw_pixels", "fashion_classifier")),
    );
    // The classifier is for Fashion-MNIST, which the dry run already knows.
    let words = ["`evaluate.extractor`", "fashion_classifier", "image_folder", "raw_pixels"];
    workshop.ddil(&["compare", "matrix.toml"]).refused(&words);
    workshop.ddil(&["compare", "matrix.toml", "--dry-run"]).refused(&words);
    assert!(!cells(&workshop).join("mixed_seed0").exists());
}

#[test]
fn invalid_comparisons_are_refused_before_any_work() {
    let workshop = Workshop::with_teacher();
    let refused = |text: &str, words: &[&str]| {
        write_matrix(&workshop, text);
        workshop.ddil(&["compare", "matrix.toml"]).refused(words);
        let written = snapshot(&workshop.path("runs")).len();
        assert_eq!(written, 0, "{text}");
    };
    fs::create_dir_all(workshop.path("runs")).expect("it is writable");
    let plain = format!("{HEAD}\n{PRIORS}");
    refused(&plain.replace("seeds =", "seed ="), &["matrix.toml:3:1", "`seed`", "`seeds`"]);
    refused(&plain.replace("\"distill.toml\"", "\"nowhere\""), &["nowhere", "neither a preset"]);
    refused(&plain.replace("\"distill.toml\"", "\"fashion-mnist-teacher\""), &["ddil train"]);
    // All that is wrong with any cell, each thing once.
    let wrong = plain.replace("updates_per_stage\" = 3", "updates_per_stage\" = 0");
    refused(&wrong, &["forward_seed0 and 3 more", "student.updates_per_stage", "at least 1"]);
    let wrong = plain.replace("updates_per_stage\" = 3", "updates\" = 3");
    refused(&wrong, &["and 3 more", "student.updates", "updates_per_stage"]);
    let large = plain.replace("\"data.batch_size\" = 7", "\"data.batch_size\" = 25");
    refused(&large, &["forward and 1 more", "data.batch_size", "at most 24"]);
    refused(
        &plain.replace("\"data.batch_size\" = 7", "\"teacher.path\" = \"data\""),
        &["no model"],
    );
    refused(
        &plain.replace("samples = 20", "samples = 9"),
        &["evaluate.samples", "evaluate.samples_off_steps", "at least 10"],
    );
}

#[test]
fn the_list_has_one_cell_per_line_and_needs_no_teacher() {
    let workshop = prepared(HEAD);
    fs::remove_dir_all(workshop.path("teacher")).expect("it was just written");
    let listed = workshop.ddil(&["compare", "matrix.toml", "--list"]).succeeded();
    assert_eq!(listed.stdout, "forward_seed0\nforward_seed1\nmixed_seed0\nmixed_seed1\n");
    assert!(!workshop.run("tiny").exists());
}

/// Cell by cell, as a queue would run them, in another order.
#[test]
fn cells_one_by_one_come_to_the_same_as_all_at_once() {
    let workshop = prepared(&quick().replace("\"tiny\"", "\"whole\""));
    workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    write_matrix(&workshop, &format!("{}\n{PRIORS}", quick()));
    let one = |cell: &str| workshop.ddil(&["compare", "matrix.toml", "--cell", cell]);
    one("mixed_seed2").refused(&["no cell `mixed_seed2`", "did you mean `mixed_seed", "--list"]);
    assert!(!workshop.run("tiny").exists());
    for cell in ["mixed_seed1", "forward_seed0", "mixed_seed0"] {
        let ended = one(cell).succeeded();
        assert!(ended.stdout.contains(&format!("{cell}: done")), "{}", ended.stdout);
        assert!(!workshop.run("tiny").join("results.json").exists(), "not all cells are done");
    }
    let before = times(&cells(&workshop));
    let again = one("mixed_seed1").succeeded();
    assert!(again.stdout.contains("mixed_seed1: done"), "{}", again.stdout);
    assert_eq!(times(&cells(&workshop)), before, "what is done is left alone");
    let last = one("forward_seed1").succeeded();
    assert!(last.stdout.contains("the tables are in"), "{}", last.stdout);
    assert_eq!(of_kind(&entries(&workshop), "cell").len(), 4);
    // Only the rows of real images and of teachers are missing.
    let ended = workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    assert!(!ended.stderr.contains("seed"), "{}", ended.stderr);
    let scores = |name: &str| {
        let found = json(&workshop.run(name).join("results.json"));
        let found = found.as_array().expect("it is an array").clone();
        let score =
            |entry: &Value| (entry["name"].clone(), entry["measurement"]["frechet"].clone());
        found.iter().map(score).collect::<Vec<_>>()
    };
    assert_eq!(scores("tiny"), scores("whole"));
}

#[test]
fn two_comparisons_at_once_share_the_cells() -> TestResult {
    let workshop = prepared(&quick());
    let both =
        [workshop.start(&["compare", "matrix.toml"]), workshop.start(&["compare", "matrix.toml"])];
    let both = both.map(|running| running.ended().succeeded());
    let begun = |cell: &str| {
        both.iter().filter(|ended| ended.stderr.contains(&format!("{cell}: done,"))).count()
    };
    for cell in ["forward_seed0", "forward_seed1", "mixed_seed0", "mixed_seed1"] {
        assert!(begun(cell) >= 1, "{cell}: {both:?}");
        let log = fs::read_to_string(cells(&workshop).join(format!("{cell}.log")))?;
        assert_eq!(
            log.matches("done: the model is in").count(),
            1,
            "{cell} was trained twice: {log}"
        );
    }
    assert_eq!(of_kind(&entries(&workshop), "cell").len(), 4);
    Ok(())
}

#[test]
fn a_cell_in_use_by_another_process_is_refused_by_name() {
    let long = quick().replace("updates_per_stage\" = 3", "updates_per_stage\" = 2000");
    let workshop = prepared(&long);
    let run = cells(&workshop).join("mixed_seed0");
    let one = ["compare", "matrix.toml", "--cell", "mixed_seed0"];
    let mut running = workshop.start(&one);
    assert!(running.wait_until(|| num_lines(&run) >= 2), "it did not get anywhere");
    let refused = workshop.ddil(&one);
    assert_eq!(refused.code, Some(75), "{}", refused.stderr);
    let holder = format!("mixed_seed0: process {} is working", running.id());
    assert!(refused.stderr.contains(&holder), "{}", refused.stderr);

    // Stopped as a queue does it: saved, with an exit code that differs from those of success and failure.
    let stopped = running.signal("TERM");
    assert_eq!(stopped.code, Some(75), "{}", stopped.stderr);
    assert!(stopped.stderr.contains("Ctrl-C again exits at once"), "{}", stopped.stderr);
    assert_eq!(status(&run)["state"], "interrupted");
    assert!(!cells(&workshop).join("mixed_seed0.json").exists());
}

/// The process of the cell and not only that of the comparison, as when memory runs out.
#[test]
fn a_cell_whose_training_is_killed_fails_and_then_resumes() -> TestResult {
    let long = quick().replace("updates_per_stage\" = 3", "updates_per_stage\" = 60");
    let workshop = prepared(&long);
    let run = cells(&workshop).join("mixed_seed0");
    let one = ["compare", "matrix.toml", "--cell", "mixed_seed0"];
    let mut running = workshop.start(&one);
    assert!(running.wait_until(|| num_lines(&run) >= 7), "it did not get anywhere");
    let lock = fs::read_to_string(run.join(".lock"))?;
    let child = lock.split_whitespace().next().ok_or("a process")?;
    assert_ne!(child, running.id().to_string(), "the training has a process of its own");
    assert!(std::process::Command::new("kill").args(["-KILL", child]).status()?.success());
    let ended = running.ended();
    ended.clone().refused(&["mixed_seed0", "signal: 9"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert_eq!(json(&cells(&workshop).join("mixed_seed0.json"))["outcome"]["state"], "failed");

    workshop.ddil(&one).succeeded();
    let log = fs::read_to_string(cells(&workshop).join("mixed_seed0.log"))?;
    assert!(log.contains("resumed from"), "{log}");
    assert_eq!(num_lines(&run), 60);
    Ok(())
}

#[test]
fn a_cell_that_fails_has_an_exit_code_and_one_that_diverges_none() -> TestResult {
    let workshop = prepared(&quick());
    let run = cells(&workshop).join("mixed_seed0");
    fs::create_dir_all(&run)?;
    fs::write(run.join("notes.txt"), "mine")?;
    let failed = workshop.ddil(&["compare", "matrix.toml", "--cell", "mixed_seed0"]);
    assert_eq!(failed.code, Some(1));
    failed.refused(&["mixed_seed0", "not empty", "mixed_seed0.log"]);

    let wild = "\"learning_rate.peak\" = 1e30\n\"learning_rate.warmup_steps\" = 0\n";
    write_matrix(
        &workshop,
        &format!("{}\n{PRIORS}", quick().replace("[set]\n", &format!("[set]\n{wild}"))),
    );
    let diverged =
        workshop.ddil(&["compare", "matrix.toml", "--cell", "forward_seed0"]).succeeded();
    assert!(diverged.stdout.contains("forward_seed0: diverged (step 2"), "{}", diverged.stdout);
    // The verb itself has a separate exit code.
    let config = cells(&workshop).join("forward_seed0.toml").display().to_string();
    assert_eq!(workshop.ddil(&["distill", &config, "--set", "run.name=alone"]).code, Some(3));
    Ok(())
}
