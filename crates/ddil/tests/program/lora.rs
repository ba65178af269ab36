//! Students that are adapters: the files of a run, its export, and its readers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_models::{Lora, Placement, Precision, weights};
use ddil_pipelines::Pipeline;
use tch::Tensor;

use crate::support::{TestResult, Workshop, checkpoints, copy_folder, json, snapshot};

const WEIGHTS: &str = "pytorch_lora_weights.safetensors";
const LCM: [&str; 2] = [
    "objective={ method = \"lcm\", num_ddim_timesteps = 10 }",
    "mixing.student.policy={ kind = \"buffer\" }",
];
const LORA: &str = "student.lora={ rank = 2, alpha = 4.0 }";
const MERGED: &str = "student.lora={ rank = 2, alpha = 4.0, export = \"merged\" }";

fn tensors(path: &Path) -> Result<BTreeMap<String, Tensor>, ddil_models::Error> {
    Ok(weights::read_all(path)?.into_iter().collect())
}

fn folder(run: &Path) -> String {
    run.join("export").display().to_string()
}

#[test]
fn a_run_saves_and_exports_only_the_adapter() -> TestResult {
    let workshop = Workshop::with_teacher();
    let teacher = snapshot(&workshop.path("teacher"));
    let run = workshop.complete("distill", "run", &[LCM[0], LCM[1], LORA]);
    assert_eq!(snapshot(&workshop.path("teacher")), teacher);

    let last = checkpoints(&run).into_values().next_back().ok_or("it was saved")?;
    let kept = tensors(&last.join("parameters.safetensors"))?;
    assert!(!kept.is_empty() && kept.keys().all(|name| name.contains(".lora_")));
    for file in ["ema.safetensors", "target.safetensors"] {
        let same = tensors(&last.join(file))?;
        assert!(same.keys().eq(kept.keys()), "{file}");
    }
    let moments = tensors(&last.join("optimizer.safetensors"))?;
    assert_eq!(moments.len(), 2 * kept.len() + 1);
    let base = tensors(&workshop.path("teacher/unet/diffusion_pytorch_model.safetensors"))?;
    let values = |tensors: &BTreeMap<_, Tensor>| tensors.values().map(Tensor::numel).sum::<usize>();
    assert!(2 * values(&kept) < values(&base), "{} {}", values(&kept), values(&base));

    let export = run.join("export");
    let mut files: Vec<String> =
        snapshot(&export).into_keys().map(|path| path.display().to_string()).collect();
    files.sort();
    assert_eq!(files, ["README.md", "ddil.json", WEIGHTS, "scheduler/scheduler_config.json"]);
    let given = tensors(&export.join(WEIGHTS))?;
    let average = tensors(&last.join("ema.safetensors"))?;
    for (name, tensor) in &average {
        assert_eq!(given[&format!("unet.{name}")], *tensor, "{name}");
    }
    let card = json(&export.join("ddil.json"));
    assert_eq!((&card["adapter"]["rank"], &card["adapter"]["alpha"]), (&2.into(), &4.0.into()));
    let recorded = card["adapter"]["base"].as_str().ok_or("a path")?;
    assert_eq!(fs::canonicalize(recorded)?, fs::canonicalize(workshop.path("teacher"))?);
    let text = fs::read_to_string(export.join("README.md"))?;
    assert!(text.starts_with("---\nbase_model: \"teacher\"\n"), "{text}");
    assert!(text.contains("Rank 2, alpha 4."), "{text}");
    let scheduler = json(&export.join("scheduler/scheduler_config.json"));
    assert_eq!(scheduler["_class_name"], "LCMScheduler");
    Ok(())
}

/// A network's weights as they are read from an export.
fn read(path: &Path) -> Result<Vec<(String, Tensor)>, ddil_trainer::Error> {
    let pipeline = Pipeline::open(path, Placement::default(), Precision::Float32)?;
    Ok(pipeline.network.parameters().named())
}

#[test]
fn an_adapter_on_its_base_is_the_merged_pipeline() -> TestResult {
    let workshop = Workshop::with_teacher();
    let apart = workshop.complete("distill", "apart", &[LCM[0], LCM[1], LORA]);
    let merged = workshop.complete("distill", "merged", &[LCM[0], LCM[1], MERGED]);
    assert!(merged.join("export/model_index.json").is_file());
    assert!(!merged.join("export").join(WEIGHTS).exists());
    assert!(json(&merged.join("export/ddil.json"))["adapter"].is_null());
    let base: BTreeMap<_, _> = read(&workshop.path("teacher"))?.into_iter().collect();
    let mut changed = 0;
    for ((name, one), (_, other)) in read(&apart)?.into_iter().zip(read(&merged.join("export"))?) {
        assert_eq!(one, other, "{name}");
        changed += usize::from(one != base[&name]);
    }
    let pipeline =
        Pipeline::open(&workshop.path("teacher"), Placement::default(), Precision::Float32)?;
    let lora = Lora::from_file(pipeline.network.parameters(), apart.join("export").join(WEIGHTS))?;
    assert_eq!(changed, lora.layers().len());

    // Both can be sampled; they agree with each other and differ from the teacher; and `inspect` shows both.
    for (name, path) in [("apart", folder(&apart)), ("merged", folder(&merged))] {
        let output = format!("{name}.png");
        workshop.ddil(&["sample", &path, "--output", &output, "--seed", "1"]).succeeded();
        let shown = workshop.ddil(&["inspect", &path, "--json"]).succeeded().stdout;
        assert!(shown.contains("\"method\": \"lcm\""), "{shown}");
    }
    assert_eq!(fs::read(workshop.path("apart.png"))?, fs::read(workshop.path("merged.png"))?);
    Ok(())
}

#[test]
fn every_method_has_adapters_and_drawn_guidance_is_averaged() -> TestResult {
    let workshop = Workshop::with_teacher();
    let drawn = "teacher.guidance={ kind = \"cfg_range\", min = 1.0, max = 3.0 }";
    let grids = "output.sample_interval=4";
    let run = workshop.complete("distill", "drawn", &[LCM[0], LCM[1], LORA, drawn, grids]);
    // The teacher is drawn with the guidance that the adapter has learned.
    let caption =
        ddil_pipelines::Image::description_of(&fs::read(run.join("samples/teacher.png"))?);
    assert_eq!(caption.as_deref(), Some("10 steps of the usual 50, to bound the time, guidance 3"));
    let card = json(&run.join("export/ddil.json"));
    assert_eq!(card["guidance_scale"], 3.0);
    assert!(card["guidance_range"].is_null());
    workshop.ddil(&["sample", &folder(&run), "--output", "drawn.png"]).succeeded();

    let named = "student.lora={ rank = 1, targets = [\"to_q\", \"to_v\"] }";
    // A range that diffusers' scheduler cannot represent.
    let lopsided = "thresholding={ kind = \"clamp\", low = -2.0, high = 1.0 }";
    let run = workshop.complete("distill", "progressive", &[named, lopsided]);
    assert_eq!(json(&run.join("export/ddil.json"))["thresholding"]["low"], -2.0);
    let names = tensors(&run.join("export").join(WEIGHTS))?;
    assert!(names.keys().all(|name| name.contains(".to_q.") || name.contains(".to_v.")));
    assert_eq!(
        json(&run.join("export/scheduler/scheduler_config.json"))["_class_name"],
        "DDIMScheduler"
    );

    // Its critic is whole.
    let dmd2 = "objective={ method = \"dmd2\", critic_ratio = 3 }";
    let run = workshop.complete("distill", "dmd2", &[dmd2, LORA]);
    let last = checkpoints(&run).into_values().next_back().ok_or("it was saved")?;
    let critic = tensors(&last.join("critic.safetensors"))?;
    assert!(critic.contains_key("fake_score.conv_in.weight"));
    assert!(!critic.keys().any(|name| name.contains("lora_")));
    Ok(())
}

#[test]
fn an_adapter_without_its_base_is_refused() -> TestResult {
    let workshop = Workshop::with_teacher();
    let run = workshop.complete("distill", "run", &[LCM[0], LCM[1], LORA]);
    // A merged one may be the base of another, an adapter not.
    let path = format!("teacher.path={}", run.display());
    let baked_in = "teacher.guidance={ kind = \"baked_in\" }";
    let again = ["distill", "distill.toml", "--set", "run.name=again", "--set", &path];
    let again = [&again[..], &["--set", baked_in, "--set", LORA]].concat();
    workshop.ddil(&again).refused(&["student.lora", "the teacher is itself an adapter", "merged"]);
    // As a teacher of a whole student it will do.
    workshop.complete("distill", "whole", &[&path, baked_in]);

    let moved = workshop.path("moved");
    copy_folder(&workshop.path("teacher"), &moved);
    fs::remove_dir_all(workshop.path("teacher"))?;
    let sample = ["sample", &folder(&run), "--output", "x.png"];
    workshop.ddil(&sample).refused(&[
        "adapter.base",
        "teacher",
        "the folder of the complete model",
    ]);
    let card = run.join("export/ddil.json");
    let text = fs::read_to_string(&card)?;
    let mut value = json(&card);
    value["adapter"]["base"] = moved.display().to_string().into();
    fs::write(&card, value.to_string())?;
    workshop.ddil(&sample).succeeded();
    value["adapter"] = serde_json::Value::Null;
    fs::write(&card, value.to_string())?;
    workshop.ddil(&sample).refused(&["adapter in", "not set", WEIGHTS]);
    fs::write(&card, text.replace("\"rank\"", "\"rink\""))?;
    workshop.ddil(&sample).refused(&["ddil.json", "rink"]);
    Ok(())
}
