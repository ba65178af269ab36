//! Killed, resumed, and the same to the bit.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{
    CHECKPOINT_INTERVAL, Ended, TestResult, UPDATES, Workshop, arguments, assert_same_end,
    checkpoints, json, num_lines, status,
};

const BUFFER: &str = "mixing.student.policy={ kind = \"buffer\", new_fraction = 0.25, buffer = \
                      { capacity = 16, max_age = 4 } }";
/// As many states as with `BUFFER`, of which one per grid index is in memory: each has 8x8 halves and a label.
const SPILLED: &str = "mixing.student.policy={ kind = \"buffer\", new_fraction = 0.25, buffer = { \
                       capacity = 16, max_age = 4, byte_budget = 500, spill = { byte_budget = 200_000 } } }";
const TWO_STAGES: [&str; 2] = ["student.stages=[4, 2]", "student.updates_per_stage=6"];
const LCM: [&str; 3] = [
    "objective={ method = \"lcm\", num_ddim_timesteps = 10 }",
    "mixing.teacher={ pool = 8, substeps = 1 }",
    BUFFER,
];
/// The student is updated every third time only, so that checkpoints fall between its updates.
const DMD2: &str = "objective={ method = \"dmd2\", critic_ratio = 3, critic_sees_source = true, \
    critic_sees_timestep = true, dm_timesteps = \"up_to_state\" }";
/// An adapter instead of a whole student.
const LORA: &str = "student.lora={ rank = 2, alpha = 4.0 }";
/// Long enough for several kills.
const LONG: u64 = 40;

/// From every checkpoint of a run, the border of two stages among them, the same end is reached.
fn every_checkpoint_leads_to_the_same_end(workshop: &Workshop, verb: &str, settings: &[&str]) {
    let whole = workshop.complete(verb, "whole", settings);
    let steps: Vec<u64> = checkpoints(&whole).into_keys().collect();
    let expected: Vec<u64> = (1..=UPDATES / CHECKPOINT_INTERVAL).map(|i| i * 3).collect();
    assert_eq!(steps, expected);
    // From 0: killed before the first checkpoint.
    for step in std::iter::once(0).chain(steps) {
        let run = workshop.rewound(&whole, &format!("from_{step}"), step);
        let resumed = workshop.ddil(&[verb, "--resume", &run.display().to_string()]).succeeded();
        assert!(!resumed.stderr.contains("WARN"), "{}", resumed.stderr);
        assert_same_end(&whole, &run);
    }
}

#[test]
fn train_resumes_from_every_checkpoint() {
    every_checkpoint_leads_to_the_same_end(&Workshop::new(), "train", &[]);
}

#[test]
fn chains_resume_from_every_checkpoint() {
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &[]);
}

#[test]
fn a_buffer_resumes_from_every_checkpoint() {
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &[BUFFER]);
}

#[test]
fn a_spilled_buffer_resumes_from_every_checkpoint() {
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &[SPILLED]);
}

#[test]
fn two_stages_with_a_spilled_buffer_resume_from_every_checkpoint() {
    let settings = [TWO_STAGES[0], TWO_STAGES[1], SPILLED];
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &settings);
}

/// The recorded environment of a run equals `ddil doctor`'s, and the differences of later sessions are appended.
#[test]
fn a_run_records_its_environment() -> TestResult {
    let workshop = Workshop::new();
    let with_threads = |threads: &str, arguments: &[&str]| {
        let mut command = workshop.command(arguments);
        Ended::of(command.env("OMP_NUM_THREADS", threads).output().expect("the program is there"))
    };
    with_threads("1", &arguments("train", "run", &["run.threads=0"])).succeeded();
    let (run, file) = (workshop.run("run"), "environment.json");
    let begun = json(&run.join(file));
    let doctor = with_threads("1", &["doctor", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(&doctor.stdout)?;
    for (name, fact) in doctor["environment"].as_object().ok_or("an object")? {
        assert_eq!(&begun["first"][name], fact, "{name}");
    }
    assert_eq!((&begun["first"]["device"], &begun["first"]["step"]), (&"cpu".into(), &0.into()));
    assert_eq!(begun["first"]["keeps_freed_pages"], cfg!(target_env = "gnu"));
    assert_eq!((&begun["format_version"], &begun["later"]), (&1.into(), &serde_json::Value::Null));

    // The same machine again has nothing to add.
    let rewound = workshop.rewound(&run, "rewound", 3);
    let resume = ["train", "--resume", &rewound.display().to_string()];
    with_threads("1", &resume).succeeded();
    assert_eq!(fs::read(rewound.join(file))?, fs::read(run.join(file))?);
    let moved = workshop.rewound(&run, "moved", 6);
    let resume = ["train", "--resume", &moved.display().to_string()];
    let said = with_threads("2", &resume).succeeded();
    assert!(said.stderr.contains("number of threads: 1 then, 2 now"), "{}", said.stderr);
    let known = json(&moved.join(file));
    assert_eq!(known["first"], begun["first"]);
    assert_eq!(known["later"], serde_json::json!([{ "step": 6, "num_threads": 2 }]));

    // One from before there was such a file gets it now, and one that is damaged is not written over.
    for (name, content) in [("older", None), ("damaged", Some("{"))] {
        let other = workshop.rewound(&run, name, 6);
        fs::remove_file(other.join(file))?;
        let resume = ["train", "--resume", &other.display().to_string()];
        if let Some(content) = content {
            fs::write(other.join(file), content)?;
            with_threads("1", &resume).refused(&[file]);
            assert_eq!(fs::read_to_string(other.join(file))?, content);
            assert_eq!(status(&other)["state"], "failed");
        } else {
            with_threads("1", &resume).succeeded();
            assert_eq!(json(&other.join(file))["first"]["step"], 6);
        }
    }
    Ok(())
}

/// Names and numbers of links of the files of spilled states in a folder.
fn spilled(folder: &Path) -> Vec<(String, u64)> {
    let Ok(entries) = fs::read_dir(folder) else { return vec![] };
    let entries = entries.map(|entry| entry.expect("it can be listed"));
    let named = entries.map(|entry| {
        let links = entry.metadata().expect("it can be looked at").nlink();
        (entry.file_name().to_string_lossy().into_owned(), links)
    });
    let mut found: Vec<_> = named.filter(|(name, _)| name.contains("ring_")).collect();
    found.sort();
    found
}

/// The place of states changes no result, and after a run the spilled states are only in its checkpoints.
#[test]
fn a_spilled_buffer_trains_as_one_in_memory() -> TestResult {
    let workshop = Workshop::with_teacher();
    let in_memory = workshop.complete("distill", "in_memory", &[BUFFER]);
    let run = workshop.complete("distill", "spilled", &[SPILLED]);
    for file in ["metrics.jsonl", "export/unet/diffusion_pytorch_model.safetensors"] {
        assert!(fs::read(in_memory.join(file))? == fs::read(run.join(file))?, "{file}");
    }
    assert_eq!(spilled(&run.join("buffer")), []);
    let last = checkpoints(&run).into_values().next_back().ok_or("it was saved")?;
    let found = spilled(&last);
    assert!(found.iter().any(|(name, _)| name == "student.ring_01_000000.rows"), "{found:?}");
    // Two consecutive checkpoints share their common files.
    assert!(found.iter().any(|(_, links)| *links > 1), "{found:?}");
    Ok(())
}

#[test]
fn damage_to_a_spilled_file_is_detected() -> TestResult {
    let workshop = Workshop::with_teacher();
    let whole = workshop.complete("distill", "whole", &[SPILLED]);
    let run = workshop.rewound(&whole, "damaged", 9);
    let (name, _) = spilled(&checkpoints(&run)[&9]).remove(0);
    // A copy of the run has no links: the earlier checkpoint has separate files.
    flip_a_byte(&checkpoints(&run)[&9].join(&name))?;
    let resumed = workshop.ddil(&["distill", "--resume", &run.display().to_string()]).succeeded();
    for words in ["step_0000009 is damaged and was skipped", &name, "at step 6"] {
        assert!(resumed.stderr.contains(words), "{words}: {}", resumed.stderr);
    }
    assert_same_end(&whole, &run);
    Ok(())
}

#[test]
fn two_stages_resume_from_every_checkpoint() {
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &TWO_STAGES);
}

#[test]
fn two_stages_with_a_buffer_resume_from_every_checkpoint() {
    let settings = [TWO_STAGES[0], TWO_STAGES[1], BUFFER];
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &settings);
}

#[test]
fn a_latent_consistency_model_resumes_from_every_checkpoint() {
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &LCM);
}

#[test]
fn a_student_with_a_critic_resumes_from_every_checkpoint() {
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &[DMD2]);
}

#[test]
fn an_adapter_resumes_from_every_checkpoint() {
    let settings = [LCM[0], LCM[1], LCM[2], LORA];
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &settings);
}

#[test]
fn an_adapter_with_a_critic_resumes_from_every_checkpoint() {
    every_checkpoint_leads_to_the_same_end(&Workshop::with_teacher(), "distill", &[DMD2, LORA]);
}

/// `kill -9` at random moments, again and again, until the run gets through.
fn kills_change_nothing(workshop: &Workshop, verb: &str, settings: &[&str], seed: u64) {
    let whole = workshop.complete(verb, "whole", settings);
    let run = workshop.run("killed");
    let path = run.display().to_string();
    let (first, again) = (arguments(verb, "killed", settings), [verb, "--resume", &path]);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cut_short = 0;
    for attempt in 0..5 {
        let arguments: &[&str] = if attempt == 0 { &first } else { &again };
        let mut running = workshop.start(arguments);
        let lines = 2 + attempt * LONG as usize / 6;
        running.wait_until(|| num_lines(&run) >= lines);
        sleep(Duration::from_micros(rng.random_range(0..20_000)));
        running.kill();
        cut_short += usize::from(status(&run)["state"] != "completed");
    }
    assert!(cut_short >= 3, "the kills came too late, {cut_short} of 5 in time");
    workshop.ddil(&again).succeeded();
    assert_same_end(&whole, &run);
}

#[test]
fn train_survives_kill_9() {
    let updates = format!("train.updates={LONG}");
    kills_change_nothing(&Workshop::new(), "train", &[&updates], 1);
}

#[test]
fn chains_survive_kill_9() {
    let updates = format!("student.updates_per_stage={LONG}");
    kills_change_nothing(&Workshop::with_teacher(), "distill", &[&updates], 2);
}

#[test]
fn a_buffer_survives_kill_9_in_both_stages() {
    let updates = format!("student.updates_per_stage={}", LONG / 2);
    let settings = [TWO_STAGES[0], &updates, BUFFER];
    kills_change_nothing(&Workshop::with_teacher(), "distill", &settings, 3);
}

#[test]
fn a_spilled_buffer_survives_kill_9_in_both_stages() {
    let updates = format!("student.updates_per_stage={}", LONG / 2);
    let settings = [TWO_STAGES[0], &updates, SPILLED];
    kills_change_nothing(&Workshop::with_teacher(), "distill", &settings, 5);
}

#[test]
fn a_critic_survives_kill_9() {
    let updates = format!("student.updates_per_stage={LONG}");
    kills_change_nothing(&Workshop::with_teacher(), "distill", &[&updates, DMD2], 4);
}

/// A signal saves and ends with success; the printed command resumes the run.
fn a_signal_saves(workshop: &Workshop, verb: &str, settings: &[&str], signal: &str) {
    let whole = workshop.complete(verb, "whole", settings);
    let run = workshop.run("stopped");
    let mut running = workshop.start(&arguments(verb, "stopped", settings));
    assert!(running.wait_until(|| num_lines(&run) >= 4), "the run did not get anywhere");
    let ended = running.signal(signal).succeeded();
    let step = status(&run)["step"].as_u64().expect("it is a number");
    assert_eq!(status(&run)["state"], "interrupted");
    assert!((4..LONG).contains(&step), "{step}");
    assert_eq!(checkpoints(&run).into_keys().next_back(), Some(step));
    assert!(ended.stdout.contains(&format!("saved at step {step}")), "{}", ended.stdout);
    let command = ended.stdout.lines().last().expect("the command that resumes").trim();
    let words: Vec<&str> = command.split(' ').skip(1).collect();
    assert_eq!(words[..2], [verb, "--resume"]);
    workshop.ddil(&words).succeeded();
    assert_same_end(&whole, &run);
}

#[test]
fn ctrl_c_saves_a_training() {
    let updates = format!("train.updates={LONG}");
    a_signal_saves(&Workshop::new(), "train", &[&updates], "INT");
}

#[test]
fn a_closed_terminal_saves_a_training() {
    let updates = format!("train.updates={LONG}");
    a_signal_saves(&Workshop::new(), "train", &[&updates], "HUP");
}

#[test]
fn sigterm_saves_a_distillation() {
    let updates = format!("student.updates_per_stage={LONG}");
    a_signal_saves(&Workshop::with_teacher(), "distill", &[&updates, BUFFER], "TERM");
}

#[test]
fn a_run_that_is_done_stays_as_it_is() {
    let workshop = Workshop::new();
    let run = workshop.complete("train", "done", &[]);
    let path = run.display().to_string();
    let copy = workshop.rewound(&run, "copy", UPDATES);
    workshop.ddil(&["train", "--resume", &path]).succeeded();
    workshop.ddil(&["train", "--resume", &copy.display().to_string()]).succeeded();
    assert_same_end(&run, &copy);
}

fn flip_a_byte(path: &Path) -> TestResult {
    let mut bytes = fs::read(path)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    Ok(fs::write(path, bytes)?)
}

#[test]
fn a_damaged_checkpoint_is_skipped_with_a_warning() -> TestResult {
    let workshop = Workshop::with_teacher();
    let whole = workshop.complete("distill", "whole", &[]);
    let run = workshop.rewound(&whole, "damaged", 9);
    flip_a_byte(&checkpoints(&run)[&9].join("mixer.safetensors"))?;
    let resumed = workshop.ddil(&["distill", "--resume", &run.display().to_string()]).succeeded();
    for words in ["step_0000009 is damaged and was skipped", "mixer.safetensors", "at step 6"] {
        assert!(resumed.stderr.contains(words), "{words}: {}", resumed.stderr);
    }
    assert_same_end(&whole, &run);
    Ok(())
}

#[test]
fn without_an_intact_checkpoint_nothing_is_deleted() -> TestResult {
    let workshop = Workshop::new();
    let run = workshop.complete("train", "run", &[]);
    for checkpoint in checkpoints(&run).into_values() {
        fs::write(checkpoint.join("optimizer.safetensors"), "cut short")?;
    }
    let metrics = fs::read(run.join("metrics.jsonl"))?;
    let refused = workshop.ddil(&["train", "--resume", &run.display().to_string()]);
    refused.refused(&["all 4 checkpoints", "optimizer.safetensors", "start the run over"]);
    assert_eq!(fs::read(run.join("metrics.jsonl"))?, metrics);
    assert_eq!(checkpoints(&run).len(), 4);
    assert_eq!(status(&run)["state"], "failed");
    Ok(())
}

#[test]
fn truncated_metrics_are_reported_and_not_continued() -> TestResult {
    let workshop = Workshop::new();
    let whole = workshop.complete("train", "whole", &[]);
    let run = workshop.rewound(&whole, "cut", 9);
    fs::write(run.join("metrics.jsonl"), "{\"step\":1}\n")?;
    let refused = workshop.ddil(&["train", "--resume", &run.display().to_string()]);
    refused.refused(&["metrics.jsonl", "bytes"]);
    assert_eq!(fs::read_to_string(run.join("metrics.jsonl"))?, "{\"step\":1}\n");
    assert_eq!(checkpoints(&run).into_keys().next_back(), Some(9));
    Ok(())
}
