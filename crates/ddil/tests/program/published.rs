//! Files as other programs publish them: old settings, keys of other classes, variants, lone networks, adapters.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::support::{TestResult, Workshop, copy_folder, json, snapshot};
use crate::text_teacher::Family;

const SCHEDULER: &str = "scheduler/scheduler_config.json";
const PROMPT: [&str; 6] = ["--prompt", "a cat", "--steps", "3", "--threads", "1"];

/// Changes keys of a JSON file; null removes one.
fn change(file: &Path, changes: &Value) -> TestResult {
    let mut keys: Map<String, Value> = serde_json::from_slice(&fs::read(file)?)?;
    for (key, value) in changes.as_object().ok_or("an object")? {
        match value {
            Value::Null => drop(keys.remove(key)),
            value => drop(keys.insert(key.clone(), value.clone())),
        }
    }
    Ok(fs::write(file, Value::Object(keys).to_string())?)
}

/// Samples a model, and returns the image and what was logged.
#[track_caller]
fn sampled(workshop: &Workshop, model: &str) -> (Vec<u8>, String) {
    let ended = workshop.ddil(&[&["sample", model, "-o", "a.png"], &PROMPT[..]].concat());
    let ended = ended.succeeded();
    (fs::read(workshop.path("a.png")).expect("it was written"), ended.stderr)
}

/// As diffusers' `StableDiffusionPipeline` corrects it: `clip_sample` off, `steps_offset` 1.
#[test]
fn old_schedulers_of_latent_models_are_corrected_and_written_so() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let file = workshop.path("teacher").join(SCHEDULER);
    change(
        &file,
        &serde_json::json!({ "timestep_spacing": "leading", "clip_sample": false, "steps_offset": 1 }),
    )?;
    let (right, log) = sampled(&workshop, "teacher");
    assert!(!log.contains("WARN"), "{log}");
    change(
        &file,
        &serde_json::json!({ "clip_sample": null, "steps_offset": null, "skip_prk_steps": true }),
    )?;
    let (corrected, log) = sampled(&workshop, "teacher");
    assert!(right == corrected);
    for words in [
        "`clip_sample` is absent; false is used",
        "`steps_offset` is absent; 1 is used",
        "DDIMScheduler has no `skip_prk_steps`",
    ] {
        assert_eq!(log.matches(words).count(), 1, "{words}: {log}");
    }
    workshop.ddil(&["import", "teacher", "imported"]).succeeded();
    let written = json(&workshop.path("imported").join(SCHEDULER));
    assert_eq!((&written["clip_sample"], &written["steps_offset"]), (&false.into(), &1.into()));
    let (again, log) = sampled(&workshop, "imported");
    assert!(right == again && !log.contains("is used"), "{log}");

    // The pipeline of XL corrects nothing.
    let workshop = Workshop::of_text(Family::StableDiffusionXl);
    let file = workshop.path("teacher").join(SCHEDULER);
    change(&file, &serde_json::json!({ "clip_sample": true }))?;
    let (_, log) = sampled(&workshop, "teacher");
    assert!(!log.contains("clip_sample"), "{log}");
    Ok(())
}

/// In diffusers' pipelines the autoencoder's mean, deviation and shift are without effect, but for XL's two first.
#[test]
fn latents_are_scaled_as_the_pipeline_scales_them() -> TestResult {
    let statistics = serde_json::json!({ "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2, 3, 2, 3], "shift_factor": null });
    for (family, counts) in [(Family::StableDiffusion, false), (Family::StableDiffusionXl, true)] {
        let workshop = Workshop::of_text(family);
        let (plain, _) = sampled(&workshop, "teacher");
        let file = workshop.path("teacher/vae/config.json");
        change(&file, &serde_json::json!({ "shift_factor": 0.5 }))?;
        let (shifted, log) = sampled(&workshop, "teacher");
        assert!(plain == shifted && log.contains("`shift_factor`"), "{log}");
        change(&file, &statistics)?;
        let (scaled, log) = sampled(&workshop, "teacher");
        assert_eq!(plain != scaled, counts);
        assert_eq!(log.contains("`latents_mean`"), !counts, "{log}");
    }
    Ok(())
}

/// What `EMAModel.save_pretrained` of diffusers writes.
#[test]
fn the_moving_average_of_diffusers_scripts_is_imported() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    copy_folder(&workshop.path("teacher/unet"), &workshop.path("unet_ema"));
    let file = workshop.path("unet_ema/config.json");
    change(
        &file,
        &serde_json::json!({
            "decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 500, "power": 0.666,
            "update_after_step": 0, "use_ema_warmup": false, "num_train_timesteps": 1000
        }),
    )?;
    let import = ["import", "unet_ema", "whole", "--parts-from", "teacher"];
    let ended = workshop.ddil(&import).succeeded();
    assert!(ended.stderr.contains("UNet2DConditionModel has no `decay`"), "{}", ended.stderr);
    assert!(json(&workshop.path("whole/unet/config.json"))["decay"].is_null());
    let inspected = workshop.ddil(&["inspect", "unet_ema", "--json"]).succeeded();
    let found: Value = serde_json::from_str(&inspected.stdout)?;
    assert_eq!((&found["kind"], &found["ignored_keys"][0]), (&"network".into(), &"decay".into()));
    change(&file, &serde_json::json!({ "in_chanels": 4 }))?;
    workshop
        .ddil(&["import", "unet_ema", "other", "--parts-from", "teacher"])
        .refused(&["in_chanels"]);
    Ok(())
}

#[test]
fn a_folder_of_one_variant_is_sampled_and_distilled() {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let (plain, _) = sampled(&workshop, "teacher");
    workshop.ddil(&["export", "teacher", "half", "--variant", "fp16"]).succeeded();
    let (half, _) = sampled(&workshop, "half");
    assert!(plain == half);
    workshop.complete("distill", "student", &["teacher.path=\"half\""]);
}

#[test]
fn an_adapter_is_exported_as_a_whole_model() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let run = workshop.complete("distill", "adapter", &["student.lora={ rank = 2 }"]);
    let run = run.display().to_string();
    workshop.ddil(&["export", &run, "whole"]).refused(&["--lora merged"]);
    workshop.ddil(&["export", &run, "whole", "--lora", "merged"]).succeeded();
    let apart = sampled(&workshop, &run).0;
    assert!(apart == sampled(&workshop, "whole").0);
    assert!(json(&workshop.path("whole/ddil.json"))["adapter"].is_null());
    let left = fs::read_dir(workshop.path("."))?.filter_map(Result::ok);
    assert!(
        left.into_iter().all(|entry| !entry.file_name().to_string_lossy().starts_with(".tmp-"))
    );

    let file = workshop.path("adapter.safetensors").display().to_string();
    workshop.ddil(&["export", &run, &file, "--lora", "kohya"]).succeeded();
    let inspected = workshop.ddil(&["inspect", &file, "--json"]).succeeded();
    let found: Value = serde_json::from_str(&inspected.stdout)?;
    assert_eq!(found["kind"], "adapters");
    workshop.ddil(&["export", &file, "x", "--lora", "merged"]).refused(&["names its base"]);
    Ok(())
}

/// `LatentConsistencyModelPipeline` of diffusers cannot be called with DDIM.
#[test]
fn a_student_is_of_the_pipeline_that_can_be_called_and_says_how() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let range = "teacher.guidance={ kind = \"cfg_range\", min = 1.0, max = 4.0 }";
    let run = workshop.complete("distill", "range", &[range]);
    let index = json(&run.join("export/model_index.json"));
    assert_eq!(index["_class_name"], "StableDiffusionPipeline");
    assert_eq!(index["scheduler"][1], "DDIMScheduler");
    let card = fs::read_to_string(run.join("export/README.md"))?;
    assert!(
        card.contains("guidance_scale=3.5")
            && card.contains("# StableDiffusionPipeline, progressive"),
        "{card}"
    );

    let method = "objective={ method = \"lcm\", num_ddim_timesteps = 10 }";
    let substeps = "mixing.teacher={ pool = 4, substeps = 1 }";
    // Without [mixing.student]: chains, the default, are impossible between the timesteps of sampling.
    let policy = "mixing.student={ }";
    let run = workshop.complete("distill", "lcm", &[method, substeps, range, policy]);
    let index = json(&run.join("export/model_index.json"));
    assert_eq!(index["_class_name"], "LatentConsistencyModelPipeline");
    assert!(snapshot(&run).contains_key(Path::new("export/README.md")));
    Ok(())
}

#[test]
fn a_solver_that_ddim_replaces_is_named() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let file = workshop.path("teacher").join(SCHEDULER);
    change(&file, &serde_json::json!({ "_class_name": "PNDMScheduler", "skip_prk_steps": true }))?;
    let (_, log) = sampled(&workshop, "teacher");
    assert!(log.contains("DDIM is used instead of PNDMScheduler"), "{log}");
    Ok(())
}
