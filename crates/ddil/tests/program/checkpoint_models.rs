//! The model of a checkpoint: the one that the run exported after that update.

use std::fs;
use std::path::{Path, PathBuf};

use ddil_models::{Placement, Precision};
use ddil_pipelines::{Card, Pipeline};
use ddil_trainer::RunCheckpoint;
use serde_json::Value;

use crate::support::{
    Ended, TestResult, UPDATES, Workshop, arguments, checkpoints, copy_folder, json, status,
};
use crate::text_teacher::Family;

const LCM: [&str; 2] = [
    "objective={ method = \"lcm\", num_ddim_timesteps = 10 }",
    "mixing.student.policy={ kind = \"buffer\" }",
];

/// A run to its end, and the same run stopped at its second checkpoint, so that its export is the model of that.
fn whole_and_stopped(workshop: &Workshop, verb: &str, settings: &[&str]) -> [PathBuf; 2] {
    let whole = workshop.complete(verb, "whole", settings);
    let mut command = workshop.command(&arguments(verb, "stopped", settings));
    command.env("DDIL_FAULT", "file.rename@latest:term:2");
    Ended::of(command.output().expect("the program is there")).succeeded();
    let stopped = workshop.run("stopped");
    assert_eq!(status(&stopped)["state"], "interrupted");
    [whole, stopped]
}

/// The bytes of a model's samples.
fn samples(workshop: &Workshop, model: &Path, more: &[&str]) -> Vec<u8> {
    let model = model.display().to_string();
    let fixed = ["-n", "6", "--output", "samples.safetensors", "--threads", "1"];
    workshop.ddil(&[&["sample", &model], &fixed[..], more].concat()).succeeded();
    fs::read(workshop.path("samples.safetensors")).expect("it was just written")
}

/// Every part of the checkpoint's model is that of the export, to the bit.
#[track_caller]
fn assert_same_model(checkpoint: &Path, export: &Path) {
    let (placement, precision) = (Placement::default(), Precision::Float32);
    let found = RunCheckpoint::find(checkpoint).expect("it is sound").expect("it is one");
    let [left, right] = [
        found.open(placement, precision).expect("it is whole"),
        Pipeline::open(export, placement, precision).expect("it is a model"),
    ];
    let named = |model: &Pipeline| model.network.parameters().named();
    assert_eq!(named(&left), named(&right));
    assert_eq!((&left.timesteps, &left.sampler), (&right.timesteps, &right.sampler));
    assert_eq!((&left.thresholding, &left.scheduler), (&right.thresholding, &right.scheduler));
    // The stopped run was timed on its own.
    let without_time = |card: &Card| Card { seconds: 0.0, ..card.clone() };
    assert_eq!(without_time(&left.card), without_time(&right.card));
    assert!(left.card.seconds > 0.0);
}

fn models_are_exports(workshop: &Workshop, verb: &str, settings: &[&str], prompts: &[&str]) {
    let [whole, stopped] = whole_and_stopped(workshop, verb, settings);
    let steps: Vec<u64> = checkpoints(&whole).into_keys().collect();
    let middle = status(&stopped)["step"].as_u64().expect("a number");
    let last = *steps.last().expect("it was saved");
    assert!(middle < last && steps.contains(&middle), "{middle} of {steps:?}");
    for (step, run) in [(middle, &stopped), (last, &whole)] {
        let checkpoint = &checkpoints(&whole)[&step];
        assert_same_model(checkpoint, run);
        assert!(samples(workshop, checkpoint, prompts) == samples(workshop, run, prompts));
    }
    let [first, second] =
        [middle, last].map(|step| samples(workshop, &checkpoints(&whole)[&step], prompts));
    assert!(first != second, "the checkpoints are different models");
}

#[test]
fn checkpoints_of_a_teacher_are_its_exports() {
    models_are_exports(&Workshop::new(), "train", &[], &["--steps", "3"]);
}

/// The students of two stages have other numbers of steps; the checkpoint between them belongs to the first.
#[test]
fn checkpoints_of_stages_have_their_own_timesteps() {
    let stages = ["student.stages=[4, 2]", "student.updates_per_stage=6"];
    let workshop = Workshop::with_teacher();
    models_are_exports(&workshop, "distill", &stages, &[]);
    let steps = |step: u64| {
        let model = checkpoints(&workshop.run("whole"))[&step].display().to_string();
        let sampled = ["sample", &model, "-n", "1", "--output", "a.png"];
        workshop.ddil(&sampled).succeeded().stdout
    };
    assert!(steps(6).contains("in 4 steps") && steps(9).contains("in 2 steps"), "{}", steps(9));
}

/// An adapter, or one that is merged when it is exported; thresholding that only the card can represent.
#[test]
fn checkpoints_of_adapters_are_merged_with_their_base() {
    let lopsided = "thresholding={ kind = \"clamp\", low = -2.0, high = 1.0 }";
    for export in ["adapter", "merged"] {
        let lora = format!("student.lora={{ rank = 2, alpha = 4.0, export = \"{export}\" }}");
        let workshop = Workshop::with_teacher();
        let teacher = format!("teacher.path={}", workshop.path("teacher").display());
        let settings = [LCM[0], LCM[1], &lora, lopsided, &teacher];
        models_are_exports(&workshop, "distill", &settings, &[]);
    }
}

#[test]
fn checkpoints_of_text_to_image_students_take_prompts() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let settings = ["output.checkpoint_interval=1", "output.checkpoints={ keep_last = 9 }"];
    models_are_exports(&workshop, "distill", &settings, &["--prompt", "a cat"]);
    fs::write(workshop.path("prompts.txt"), "a cat\na red dog\n")?;
    let rows = |subject: &Path| {
        let subject = subject.display().to_string();
        let prompts =
            ["--prompts", "prompts.txt", "--images-per-prompt", "2", "--extractor", "raw_pixels"];
        evaluated(&workshop, &[&[&*subject], &prompts[..]].concat())
    };
    let checkpoint = &checkpoints(&workshop.run("whole"))[&2];
    assert_eq!(rows(checkpoint), rows(&workshop.run("stopped")));
    Ok(())
}

/// The rows of an evaluation, without times.
fn evaluated(workshop: &Workshop, arguments: &[&str]) -> Value {
    let _ = fs::remove_file(workshop.path("rows.json"));
    let fixed = ["--json", "rows.json", "--threads", "1"];
    workshop.ddil(&[&["evaluate"], arguments, &fixed].concat()).succeeded();
    let mut rows = json(&workshop.path("rows.json"));
    for row in rows.as_array_mut().expect("an array") {
        row.as_object_mut().expect("an object").remove("seconds");
    }
    rows
}

/// With the data of the run, as the run itself; under each name that a checkpoint has.
#[test]
fn a_checkpoint_is_evaluated_as_its_export() {
    let workshop = Workshop::with_teacher();
    let [whole, stopped] = whole_and_stopped(&workshop, "distill", &[]);
    let rows = |subject: &Path| {
        let subject = subject.display().to_string();
        evaluated(
            &workshop,
            &[&subject, "--extractor", "raw_pixels", "-n", "20", "--shift-samples", "4"],
        )
    };
    let middle = rows(&checkpoints(&whole)[&6]);
    assert_eq!(middle, rows(&stopped));
    assert_eq!((&middle[0]["updates"], &middle[0]["samples"]), (&6.into(), &20.into()));
    let last = rows(&whole);
    assert_ne!(middle, last);
    for name in ["checkpoints", "checkpoints/latest"] {
        assert_eq!(rows(&whole.join(name)), last, "{name}");
    }
    fs::write(whole.join("checkpoints/best"), "step_0000006\n").expect("it is writable");
    assert_eq!(rows(&whole.join("checkpoints/best")), middle);
}

/// Features that a stopped measurement left are those of its checkpoint, and not of another one of the run.
#[cfg(unix)]
#[test]
fn features_of_another_checkpoint_are_not_used() {
    let workshop = Workshop::with_teacher();
    let whole = workshop.complete("distill", "whole", &[]);
    let [first, second] = [3, 6].map(|step| checkpoints(&whole)[&step].display().to_string());
    let with = |subject: &'static str| {
        let fixed = ["evaluate", subject, "-n", "2000", "--batch-size", "30", "--threads", "1"];
        [&fixed[..], &["--extractor", "raw_pixels", "--features", "features"]].concat()
    };
    let [first, second] = [first, second].map(|path| with(path.leak()));
    let has_features = || {
        let folders = fs::read_dir(workshop.path("features")).into_iter().flatten().flatten();
        let mut files = folders.map(|entry| entry.path().join("features.f32"));
        files.any(|path| fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0))
    };
    let mut running = workshop.start(&first);
    assert!(running.wait_until(has_features), "it was too fast");
    assert_eq!(running.signal("INT").code, Some(75));
    let again = |arguments: &[&str]| {
        workshop.ddil(arguments).succeeded().stderr.contains("are there already")
    };
    assert!(!again(&second) && again(&first));
}

#[test]
fn a_checkpoint_that_cannot_be_a_model_is_refused() -> TestResult {
    let workshop = Workshop::with_teacher();
    let whole = workshop.complete("distill", "whole", &[]);
    let last = &checkpoints(&whole)[&UPDATES];
    let both = |subject: &Path, words: &[&str]| {
        let subject = subject.display().to_string();
        workshop.ddil(&["sample", &subject, "--output", "no.png"]).refused(words);
        let measure = ["evaluate", &subject, "--extractor", "raw_pixels", "-n", "20"];
        workshop.ddil(&measure).refused(words);
    };
    // Another name.
    for name in ["step_0000005", "best"] {
        let path = whole.join("checkpoints").join(name);
        both(&path, &[name, "does not exist", "step_0000009, step_0000012", "keep_best"]);
    }
    // Somewhere else.
    copy_folder(last, &workshop.path("step_0000012"));
    both(&workshop.path("step_0000012"), &["step_0000012", "outside of the folder of its run"]);
    // Of another run: an adapter where the run has a whole network.
    let lora = workshop.complete("distill", "lora", &["student.lora={ rank = 2, alpha = 4.0 }"]);
    let foreign = whole.join("checkpoints/step_0000003");
    fs::remove_dir_all(&foreign)?;
    copy_folder(&checkpoints(&lora)[&3], &foreign);
    both(&foreign, &["moving average", "lora_", "not expected"]);
    // The teacher of a merged adapter is gone.
    fs::rename(workshop.path("teacher"), workshop.path("moved"))?;
    fs::remove_dir_all(lora.join("export"))?;
    copy_folder(&whole.join("export"), &lora.join("export"));
    both(&checkpoints(&lora)[&3], &["teacher.path", "in which the run was started"]);

    // Damaged: refused by name, and skipped in favour of an older one if the newest is requested.
    let file = last.join("ema.safetensors");
    let mut bytes = fs::read(&file)?;
    *bytes.last_mut().ok_or("it is not empty")? ^= 1;
    fs::write(&file, bytes)?;
    both(last, &["step_0000012 is damaged", "ema.safetensors"]);
    let latest = whole.join("checkpoints/latest").display().to_string();
    let ended = workshop.ddil(&["sample", &latest, "-n", "1", "--output", "older.png"]).succeeded();
    assert!(ended.stderr.contains("step_0000012 is damaged and was skipped"), "{}", ended.stderr);
    fs::remove_file(last.join("manifest.json"))?;
    both(last, &["step_0000012 is damaged", "manifest"]);

    fs::remove_dir_all(whole.join("export"))?;
    both(&checkpoints(&whole)[&6], &["no exported model", "resuming the run writes it"]);
    // A folder of a run without checkpoints is no model, and no folder of images.
    fs::remove_dir_all(whole.join("checkpoints"))?;
    fs::create_dir(whole.join("checkpoints"))?;
    both(&whole.join("checkpoints"), &["checkpoints"]);
    assert!(!workshop.path("no.png").exists());
    Ok(())
}
