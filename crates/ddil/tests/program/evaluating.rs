//! Evaluation during training, and measurements that are stopped.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::evaluate::{INPUT, network};
use crate::support::{
    CHECKPOINT_INTERVAL, TestResult, UPDATES, Workshop, assert_same_end, checkpoints, copy_folder,
    json, status,
};
use crate::text_teacher::Family;

const EVALUATE: &str = "evaluate={ interval = 4, samples = 20, extractor = \"raw_pixels\" }";
const BEST: &str = "output.checkpoints.keep_best=\"frechet\"";

/// Lines of `metrics.jsonl`.
fn lines(run: &Path) -> Result<Vec<Value>, Box<dyn std::error::Error>> {
    let text = fs::read_to_string(run.join("metrics.jsonl"))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// The lines with an evaluation, without their other figures.
fn evaluations(run: &Path) -> Result<Vec<(u64, f64)>, Box<dyn std::error::Error>> {
    let evaluation =
        |line: &Value| Some((line["step"].as_u64()?, line.get("eval_frechet")?.as_f64()?));
    Ok(lines(run)?.iter().filter_map(evaluation).collect())
}

fn evaluation_changes_nothing(workshop: &Workshop, verb: &str) -> TestResult {
    let plain = workshop.complete(verb, "plain", &[]);
    let evaluated = workshop.complete(verb, "evaluated", &[EVALUATE]);
    let found = evaluations(&evaluated)?;
    assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [4, 8, 12]);
    assert!(found.iter().all(|(_, frechet)| *frechet > 0.0), "{found:?}");
    assert_eq!(evaluations(&plain)?, []);
    // The same weights to the bit, in the checkpoint and in the export, and the same losses.
    let last = |run: &Path| checkpoints(run).into_values().next_back().ok_or("it was saved");
    for file in ["parameters.safetensors", "ema.safetensors", "optimizer.safetensors"] {
        let [left, right] = [&plain, &evaluated].map(|run| last(run).map(|path| path.join(file)));
        assert!(fs::read(left?)? == fs::read(right?)?, "{file}");
    }
    let losses = |run: &Path| -> Result<Vec<Value>, Box<dyn std::error::Error>> {
        let all = lines(run)?;
        Ok(all.iter().filter_map(|line| line.get("loss")).cloned().collect())
    };
    assert_eq!(losses(&plain)?, losses(&evaluated)?);
    // The last evaluation is what `ddil evaluate` finds in the exported model.
    let run = evaluated.display().to_string();
    let steps = if verb == "train" { ["--steps", "2"] } else { ["--steps", "4"] };
    let guidance = if verb == "train" { ["--guidance-scale", "2"] } else { ["--seed", "0"] };
    let arguments = ["evaluate", &run, "--extractor", "raw_pixels", "-n", "20", "--json", "rows"];
    workshop.ddil(&[&arguments[..], &steps, &guidance, &["--threads", "1"]].concat()).succeeded();
    let row = &json(&workshop.path("rows"))[0];
    let measured = row["frechet"].as_f64().ok_or("a number")?;
    let last = found.last().ok_or("the last update is evaluated")?.1;
    assert!((measured / last - 1.0).abs() < 1e-5, "{measured}, in the run {last}");
    Ok(())
}

#[test]
fn training_is_evaluated_without_a_change() -> TestResult {
    evaluation_changes_nothing(&Workshop::new(), "train")
}

#[test]
fn distillation_is_evaluated_without_a_change() -> TestResult {
    evaluation_changes_nothing(&Workshop::with_teacher(), "distill")
}

#[test]
fn text_to_image_students_are_evaluated_without_a_change() -> TestResult {
    for family in [Family::StableDiffusion, Family::StableDiffusionXl] {
        let workshop = Workshop::of_text(family);
        network(&workshop)?;
        let table = format!(
            "evaluate={{ interval = 4, samples = 10, extractor = \"network.pt\", extractor_input = '{INPUT}' }}"
        );
        let plain = workshop.complete("distill", "plain", &[]);
        let run = workshop.complete("distill", "evaluated", &[&table]);
        let steps: Vec<u64> = evaluations(&run)?.iter().map(|(step, _)| *step).collect();
        assert!(steps.starts_with(&[4]) && steps.last() == status(&run)["step"].as_u64().as_ref());
        let weights = "export/unet/diffusion_pytorch_model.safetensors";
        assert!(fs::read(plain.join(weights))? == fs::read(run.join(weights))?);
        // Without images there is nothing to compare with.
        fs::write(workshop.path("prompts.txt"), "a cat\na dog\na cat\na fish\n")?;
        let prompts = "data={ kind = \"prompts\", path = \"prompts.txt\", batch_size = 2 }";
        let priors = "mixing.priors={ kind = \"constant\", priors = { teacher = 1.0 } }";
        let settings = [&*table, prompts, priors];
        let refused = workshop.ddil(&crate::support::arguments("distill", "none", &settings));
        refused.refused(&["evaluate.reference", "not set", "prompts"]);
    }
    Ok(())
}

#[test]
fn evaluated_runs_resume_from_every_checkpoint() -> TestResult {
    let workshop = Workshop::with_teacher();
    for (verb, name) in [("train", "taught"), ("distill", "distilled")] {
        let whole = workshop.complete(verb, name, &[EVALUATE, BEST]);
        for step in (0..=UPDATES / CHECKPOINT_INTERVAL).map(|i| i * CHECKPOINT_INTERVAL) {
            let run = workshop.rewound(&whole, &format!("{name}_from_{step}"), step);
            workshop.ddil(&[verb, "--resume", &run.display().to_string()]).succeeded();
            assert_same_end(&whole, &run);
            assert_eq!(
                fs::read(run.join("best/unet/diffusion_pytorch_model.safetensors"))?,
                fs::read(whole.join("best/unet/diffusion_pytorch_model.safetensors"))?,
            );
        }
    }
    Ok(())
}

#[test]
fn the_best_model_is_kept_and_has_a_name() -> TestResult {
    let workshop = Workshop::with_teacher();
    let settings = [EVALUATE, BEST, "output.checkpoints.keep_last=1", "learning_rate.peak=0.5"];
    let run = workshop.complete("distill", "run", &settings);
    let found = evaluations(&run)?;
    let best = found.iter().copied().fold((0, f64::INFINITY), |a, b| if b.1 < a.1 { b } else { a });
    let name = fs::read_to_string(run.join("checkpoints/best"))?;
    assert_eq!(name, format!("step_{:07}\n", best.0));
    assert!(run.join("checkpoints").join(name.trim()).is_dir());
    assert!(checkpoints(&run).len() <= 2);
    let place = run.join("best").display().to_string();
    assert_eq!(json(&run.join("best/ddil.json"))["updates"], best.0);
    workshop.ddil(&["sample", &place, "-n", "4", "--output", "a.png"]).succeeded();
    workshop.ddil(&["export", &place, "exported"]).succeeded();
    // The data of its run, and the distance that the run recorded.
    let evaluate = ["evaluate", &place, "--extractor", "raw_pixels", "-n", "20", "--json", "rows"];
    workshop.ddil(&[&evaluate[..], &["--threads", "1"]].concat()).succeeded();
    let measured = json(&workshop.path("rows"))[0]["frechet"].as_f64().ok_or("a number")?;
    assert!((measured / best.1 - 1.0).abs() < 1e-5, "{measured}, in the run {}", best.1);
    let checkpoint = run.join("checkpoints/best").display().to_string();
    let shown = workshop.ddil(&["inspect", &checkpoint]).succeeded().stdout;
    assert!(shown.contains(&format!("step: {}", best.0)), "{shown}");
    Ok(())
}

#[test]
fn what_cannot_be_evaluated_is_refused_before_the_run() -> TestResult {
    let workshop = Workshop::with_teacher();
    fs::create_dir(workshop.path("empty"))?;
    fs::write(workshop.path("no.npz"), "no archive")?;
    let refused = |table: &str, words: &[&str]| {
        let table = format!("evaluate={{ interval = 4, {table} }}");
        for verb in ["train", "distill"] {
            for more in [&[][..], &["--dry-run"]] {
                let arguments = crate::support::arguments(verb, "run", &[&table]);
                let ended = workshop.ddil(&[&arguments[..], more].concat());
                ended.refused(words);
                assert!(!workshop.run("run").exists());
            }
        }
    };
    let pixels = "extractor = \"raw_pixels\"";
    refused("samples = 20", &["evaluate.extractor", "fashion_classifier"]);
    refused("extractor = \"gone.pt\"", &["evaluate.extractor", "gone.pt", "TorchScript"]);
    refused(&format!("{pixels}, samples = 3"), &["evaluate.samples", "at least 10"]);
    refused(&format!("{pixels}, reference = \"gone\""), &["evaluate.reference", "gone"]);
    refused(&format!("{pixels}, reference = \"empty\""), &["empty"]);
    refused(&format!("{pixels}, reference = \"no.npz\""), &["no.npz"]);
    refused(&format!("{pixels}, sample = 3"), &["sample", "samples"]);
    let best = crate::support::arguments("train", "run", &[BEST]);
    workshop.ddil(&best).refused(&["output.checkpoints.keep_best", "evaluate.interval"]);
    Ok(())
}

/// Ctrl-C keeps what was computed; the same command goes on and ends with the same numbers.
#[cfg(unix)]
#[test]
fn a_measurement_that_is_stopped_continues() -> TestResult {
    let workshop = Workshop::with_teacher();
    let common = ["--data", "data", "--extractor", "raw_pixels", "--threads", "1"];
    let drawn = ["evaluate", "teacher", "-n", "1000", "--steps", "10", "--batch-size", "30"];
    let with = |more: &[&'static str]| [&drawn[..], &common, more].concat();
    workshop.ddil(&with(&["--json", "whole.json", "--features", "other"])).succeeded();
    assert!(fs::read_dir(workshop.path("other"))?.next().is_none(), "nothing is left");

    let stopped = with(&["--json", "parts.json", "--features", "features"]);
    let state = || {
        let folders = fs::read_dir(workshop.path("features")).ok()?;
        let mut states = folders.flatten().map(|entry| entry.path().join("features.f32"));
        states.find_map(|path| fs::metadata(path).ok().map(|metadata| metadata.len()))
    };
    let mut running = workshop.start(&stopped);
    assert!(running.wait_until(|| state().is_some_and(|bytes| bytes > 0)), "it was too fast");
    let ended = running.signal("INT");
    assert_eq!(ended.code, Some(75), "{}", ended.stderr);
    assert!(ended.stderr.contains("the same command continues"), "{}", ended.stderr);
    assert!(!workshop.path("parts.json").exists());
    assert!(state().is_some_and(|bytes| bytes > 0 && bytes < 1000 * 64 * 4));

    // Another plan has other features.
    let other = [&drawn[..5], &["2", "--features", "features"], &common].concat();
    workshop.ddil(&other).succeeded();
    let continued = workshop.ddil(&stopped).succeeded();
    assert!(continued.stderr.contains("are there already"), "{}", continued.stderr);
    assert_eq!(json(&workshop.path("parts.json")), json(&workshop.path("whole.json")));
    assert_eq!(state(), None);
    Ok(())
}

/// A model that changed under the same name has other features than those that a stopped measurement left.
#[cfg(unix)]
#[test]
fn features_of_another_model_are_not_used() -> TestResult {
    let workshop = Workshop::with_teacher();
    let run = workshop.complete("train", "run", &[]);
    let drawn = ["evaluate", "teacher", "-n", "1000", "--steps", "10", "--batch-size", "30"];
    let common = ["--data", "data", "--extractor", "raw_pixels", "--threads", "1"];
    let arguments = [&drawn[..], &common, &["--features", "features"]].concat();
    let has_features = || {
        let folders = fs::read_dir(workshop.path("features")).into_iter().flatten().flatten();
        let mut files = folders.map(|entry| entry.path().join("features.f32"));
        files.any(|path| fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0))
    };
    let mut running = workshop.start(&arguments);
    assert!(running.wait_until(has_features), "it was too fast");
    assert_eq!(running.signal("INT").code, Some(75));
    fs::remove_dir_all(workshop.path("teacher"))?;
    fs::rename(run.join("export"), workshop.path("teacher"))?;
    let ended = workshop.ddil(&arguments).succeeded();
    assert!(!ended.stderr.contains("are there already"), "{}", ended.stderr);
    Ok(())
}

/// Samples, training images and reference have the size of the config: in the run, of the run, and of its model alone.
#[test]
#[ignore = "needs Fashion-MNIST: `make setup`"]
fn fashion_mnist_is_scaled_for_a_run_and_its_reference() -> TestResult {
    let workshop = Workshop::new();
    let data = "data={ kind = \"fashion_mnist\", resolution = 8, batch_size = 4 }";
    let evaluate = "evaluate={ interval = 12, samples = 50 }";
    let run = workshop.complete("train", "small", &[data, "model.num_class_embeds=11", evaluate]);
    let in_run = evaluations(&run)?.last().ok_or("the last update is evaluated")?.1;
    let model = workshop.path("model");
    copy_folder(&run.join("export"), &model);

    let options = ["-n", "50", "--steps", "2", "--guidance-scale", "2", "--threads", "1"];
    let (run, model) = (run.display().to_string(), model.display().to_string());
    let subjects: [&[&str]; 3] =
        [&[&run], &[&model], &[&model, "--reference", "fashion_mnist", "--shift-samples", "0"]];
    for (number, subject) in subjects.into_iter().enumerate() {
        let rows = format!("rows{number}.json");
        let arguments = [&["evaluate"], subject, &options, &["--json", &rows]].concat();
        workshop.ddil(&arguments).succeeded();
        let row = &json(&workshop.path(&rows))[0];
        assert_eq!(row["dataset"], "fashion_mnist/test-8x8");
        assert_eq!(row["input"]["resize"], "bicubic-antialias-32x32");
        let measured = row["frechet"].as_f64().ok_or("a number")?;
        assert!((measured / in_run - 1.0).abs() < 1e-5, "{measured}, in the run {in_run}");
    }
    Ok(())
}
