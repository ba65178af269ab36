//! The planned memory of a distillation, against the counts in the files of its teacher.

use std::path::{Path, PathBuf};

use ddil_files::settings::Settings;
use ddil_models::{Lora, LoraConfig, ModelConfig, UnknownKeys, weights};
use ddil_trainer::config::DistillConfig;
use ddil_trainer::memory::{MemoryPlan, Row};

use crate::TestResult;

/// Latents of 8 by 8 from images of 16 by 16.
const CONFIG: &str = r#"
[run]
device = "cpu"

[data]
kind = "captions"
path = "captions"
batch_size = 4

[teacher]
guidance = { kind = "cfg", scale = 3.0 }

[student]
stages = [4]

[mixing.priors]
kind = "constant"
priors = { forward = 0.5, student = 0.5 }

[mixing.student]
policy = { kind = "chain", refresh_fraction = 0.25 }
"#;

const DMD2: &str = "objective={ method = \"dmd2\" }";

/// A pipeline that `tools/record/record_pipelines.py` wrote, with two text encoders.
fn teacher() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/pipelines/sdxl")
}

fn plan(settings: &[&str]) -> Result<MemoryPlan, Box<dyn std::error::Error>> {
    let mut config = Settings::parse("distill.toml", CONFIG.to_owned())?;
    config.set(&format!("teacher.path={}", teacher().display()))?;
    for setting in settings {
        config.set(setting)?;
    }
    let config: DistillConfig = config.build()?;
    Ok(MemoryPlan::of(&config)?)
}

/// The number of values in a part's file.
fn count(part: &str) -> Result<u64, ddil_models::Error> {
    let values = weights::read_all(teacher().join(part))?;
    Ok(values.values().map(|tensor| tensor.numel() as u64).sum())
}

fn network() -> Result<u64, ddil_models::Error> {
    count("unet/diffusion_pytorch_model.safetensors")
}

#[track_caller]
fn row<'a>(rows: &'a [Row], name: &str) -> &'a Row {
    rows.iter().find(|row| row.name == name).expect("there is such a row")
}

#[test]
fn every_weight_is_counted_for_everyone_who_has_it() -> TestResult {
    let (held, n) = (plan(&[DMD2])?.held, network()?);
    let values = |name: &str| row(&held, name).values;
    assert_eq!(values("teacher"), Some(n));
    for (role, times) in [
        ("student", 1),
        ("student: gradients", 1),
        ("student: optimizer", 2),
        ("student: moving average", 1),
        ("student: network of the moving average", 1),
    ] {
        assert_eq!(values(role), Some(times * n), "{role}");
    }
    let critic = values("critic with head").ok_or("it has weights")?;
    assert!(critic > n, "the head is more than the network");
    assert_eq!(values("critic with head: gradients"), Some(critic));
    assert_eq!(values("critic with head: optimizer"), Some(2 * critic));
    assert!(held.iter().all(|row| row.values.is_none_or(|values| row.bytes == 4 * values)));
    Ok(())
}

#[test]
fn an_adapter_is_as_large_as_the_one_that_is_attached() -> TestResult {
    let config = ModelConfig::from_file(teacher().join("unet/config.json"), UnknownKeys::Refuse)?;
    let network = config.without_values()?;
    let lora = LoraConfig { rank: 3, ..LoraConfig::default() };
    let attached = Lora::attach(network.parameters(), &lora, 0)?.parameters().num_values() as u64;
    let held = plan(&["student.lora={ rank = 3 }"])?.held;
    assert_eq!(row(&held, "student's adapter").values, Some(attached));
    assert_eq!(row(&held, "student's adapter: optimizer").values, Some(2 * attached));
    Ok(())
}

const COLLECTED: &str = "in rollouts";

#[test]
fn a_guided_teacher_is_evaluated_twice() -> TestResult {
    let collected = |guidance: &str| -> Result<u64, Box<dyn std::error::Error>> {
        Ok(row(&plan(&[&format!("teacher.guidance={guidance}")])?.phases, COLLECTED).bytes)
    };
    let once = collected("{ kind = \"cfg\", scale = 1.0 }")?;
    assert_eq!(collected("{ kind = \"baked_in\" }")?, once);
    for twice in
        ["{ kind = \"cfg\", scale = 3.0 }", "{ kind = \"cfg_range\", min = 1.0, max = 4.0 }"]
    {
        assert_eq!(collected(twice)?, 2 * once, "{twice}");
    }
    Ok(())
}

#[test]
fn half_precision_halves_activations_and_copies_weights() -> TestResult {
    let collected = |precision: &str| -> Result<u64, Box<dyn std::error::Error>> {
        Ok(row(&plan(&[&format!("run.precision={precision}")])?.phases, COLLECTED).bytes)
    };
    assert_eq!(collected("bfloat16")?, collected("float32")? / 2 + 2 * network()?);
    Ok(())
}

#[test]
fn images_of_another_size_have_other_latents() -> TestResult {
    assert_eq!(plan(&[])?.sample_shape, [4, 8, 8]);
    let larger = plan(&["data.resolution=32"])?;
    assert_eq!(larger.sample_shape, [4, 16, 16]);
    Ok(())
}

#[test]
fn encoders_and_stores_are_counted() -> TestResult {
    let buffer = "mixing.student.policy={ kind = \"buffer\", new_fraction = 0.25, \
                  buffer = { capacity = 10, storage = \"f16\" } }";
    let plan = plan(&[buffer])?;
    let parts = [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ];
    let values: u64 = parts.map(count).into_iter().sum::<Result<_, _>>()?;
    let encoded = row(&plan.phases, "in encoding the data, before the first update");
    assert_eq!(encoded.bytes, 4 * values);
    // 77 tokens of 16 and 16 numbers, and what becomes of the second encoder's 10 with 36 of sizes.
    let state = 2 * (4 * 8 * 8) + 4 * (77 * 32 + 46);
    assert_eq!(row(&plan.held, "buffer of the student's states").bytes, 10 * state);
    Ok(())
}
