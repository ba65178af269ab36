//! What people write: the configs of runs and comparisons, and schedulers.

use std::path::Path;

use ddil::compare::Matrix;
use ddil_files::settings::{Settings, differences, to_toml};
use ddil_models::NetworkConfig;
use ddil_schedulers::{SchedulerConfig, SchedulerFile, SolverConfig};
use ddil_trainer::config::{DistillConfig, TrainConfig};
use ddil_trainer::memory::MemoryPlan;

use super::harness::{Response, Target, message_of};
use super::tree::{Tree, repository};

const CONFIG: &str = "config.toml";

/// Presets with the given verb, all under one file name.
fn presets(is_one: fn(&str) -> bool) -> Vec<Tree> {
    let all = Tree::read(&repository().join("crates/ddil/presets"));
    let chosen = all.files.into_iter().filter(|(name, _)| is_one(name));
    // A GPU that is not there would hide everything behind it.
    let on_cpu = |content: Vec<u8>| {
        String::from_utf8(content)
            .expect("a preset")
            .replace("device = \"cuda\"", "device = \"cpu\"")
    };
    chosen.map(|(_, content)| Tree::file(CONFIG, on_cpu(content))).collect()
}

fn is_distill(name: &str) -> bool {
    !name.starts_with("compare") && !name.contains("teacher")
}

#[test]
fn distill_config() {
    Target::new("distill_config", presets(is_distill), read_distill).run();
}

fn read_distill(folder: &Path) -> Response {
    let settings = Settings::from_file(&folder.join(CONFIG)).map_err(message_of)?;
    let mut config: DistillConfig = settings.build().map_err(message_of)?;
    config.ensure().map_err(message_of)?;
    let text = to_toml(&config).map_err(message_of)?;
    let again: DistillConfig =
        Settings::parse(CONFIG, text).and_then(|s| s.build()).map_err(message_of)?;
    assert_eq!(differences(&config, &again).map_err(message_of)?, []);
    // The next steps of a run; the teacher that the file names does not exist.
    let of_text = config.data.kind.is_text();
    let teacher = if of_text { "fashion-mnist-text-to-image" } else { "fashion-mnist-teacher" };
    config.teacher.path = repository().join("assets").join(teacher);
    let plan = MemoryPlan::of(&config).map_err(message_of)?;
    let _ = (plan.to_string(), plan.peak());
    Ok(())
}

#[test]
fn train_config() {
    Target::new("train_config", presets(|name| name.contains("teacher")), read_train).run();
}

fn read_train(folder: &Path) -> Response {
    let settings = Settings::from_file(&folder.join(CONFIG)).map_err(message_of)?;
    let config: TrainConfig = settings.build().map_err(message_of)?;
    config.ensure().map_err(message_of)?;
    let text = to_toml(&config).map_err(message_of)?;
    let again: TrainConfig =
        Settings::parse(CONFIG, text).and_then(|s| s.build()).map_err(message_of)?;
    assert_eq!(differences(&config, &again).map_err(message_of)?, []);
    config.model.parameter_shapes().map(drop).map_err(message_of)
}

#[test]
fn compare_config() {
    Target::new("compare_config", presets(|name| name.starts_with("compare")), read_compare).run();
}

fn read_compare(folder: &Path) -> Response {
    let matrix = Matrix::from_file(&folder.join(CONFIG)).map_err(message_of)?;
    // The base that an unchanged preset names; its keys depend on the method.
    let is_dmd2 = matrix.base == "fashion-mnist-dmd2-ddil";
    let method = if is_dmd2 { "dmd2" } else { "pd" };
    let base = repository().join(format!("crates/ddil/presets/fashion-mnist-{method}-ddil.toml"));
    let base = Settings::from_file(&base).map_err(message_of)?;
    matrix.cells(&base).map(drop).map_err(message_of)
}

const SCHEDULER: &str = "scheduler_config.json";

#[test]
fn scheduler_config() {
    let golden = repository().join("tests/golden/schedulers");
    let names = ["ddim", "lcm", "dpm_solver"].map(|name| format!("{name}_scheduler_config.json"));
    let mut seeds: Vec<Tree> = names
        .map(|name| Tree::file(SCHEDULER, std::fs::read(golden.join(name)).expect("a golden")))
        .into();
    let written = r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": 4,
        "trained_betas": [0.1, 0.2, 0.3, 0.4], "ddil_timesteps": [3, 1], "thresholding": true,
        "rescale_betas_zero_snr": true, "prediction_type": "v_prediction"}"#;
    seeds.push(Tree::file(SCHEDULER, written));
    let solver = r#"{"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}"#;
    seeds.push(Tree::file(SCHEDULER, solver));
    let solver = r#"{"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "use_karras_sigmas": true,
        "disable_corrector": [0, 1], "final_sigmas_type": "sigma_min", "steps_offset": 1}"#;
    seeds.push(Tree::file(SCHEDULER, solver));
    Target::new("scheduler_config", seeds, read_scheduler).run();
}

fn read_scheduler(folder: &Path) -> Response {
    let path = folder.join(SCHEDULER);
    let _ = SchedulerConfig::from_file_lenient(&path);
    if let Ok(file) = SchedulerFile::from_file(&path) {
        let _ = (file.config(), file.solver(), file.replaced_solver(), file.unknown_keys());
    }
    let (config, _) = SchedulerConfig::from_file_any(&path).map_err(message_of)?;
    let again = SchedulerConfig::from_json(&config.to_json()).map_err(message_of)?;
    assert_eq!(again, config);
    let schedule = config.schedule().map_err(message_of)?;
    if let Some(solver) = SolverConfig::from_file(&path).map_err(message_of)? {
        let _ = [0, 1, 4, u32::MAX].map(|steps| solver.levels(&schedule, steps));
    }
    let _ =
        (config.sampler().map_err(message_of)?, config.boundary(), config.thresholding().ensure());
    for steps in [None, Some(0), Some(4), Some(u32::MAX)] {
        let _ = config.timesteps(steps);
        let _ = steps.map(|steps| config.compatible_timesteps(steps));
    }
    let last = schedule.scale_at(schedule.last_timestep()).map_err(message_of)?;
    assert!(last.alpha.is_finite() && last.sigma.is_finite(), "{last:?}");
    Ok(())
}
