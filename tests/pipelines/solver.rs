//! Teachers sampled with a multistep solver: their file's, or one of the caller's.

use std::fs;
use std::path::{Path, PathBuf};

use ddil_models::Placement;
use ddil_pipelines::{
    ClassToImage, Guidance, Pipeline, Precision, SamplePlan, class_conditioning, generate,
    initial_noise, with_published_solver,
};
use ddil_schedulers::{SamplerConfig, SolverConfig};
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::TestResult;

const FILE: &str = "scheduler/scheduler_config.json";

fn asset() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/fashion-mnist-teacher"))
}

/// The teacher with keys of its scheduler file changed.
fn teacher_with(folder: &Path, keys: &Value) -> Result<(), Box<dyn std::error::Error>> {
    for part in ["unet", "scheduler"] {
        fs::create_dir_all(folder.join(part))?;
    }
    for file in [
        "model_index.json",
        "ddil.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ] {
        fs::copy(asset().join(file), folder.join(file))?;
    }
    let mut config: Value = serde_json::from_str(&fs::read_to_string(asset().join(FILE))?)?;
    for (key, value) in keys.as_object().ok_or("an object")? {
        config[key] = value.clone();
    }
    Ok(fs::write(folder.join(FILE), config.to_string())?)
}

fn open(folder: &Path) -> ddil_pipelines::Result<ClassToImage> {
    ClassToImage::open(folder, Placement::default())
}

#[test]
fn a_model_of_few_timesteps_is_sampled_in_all_of_them() -> TestResult {
    let folder = tempfile::tempdir()?;
    teacher_with(folder.path(), &json!({ "num_train_timesteps": 6 }))?;
    let model = open(folder.path())?;
    let plan = SamplePlan::of(model.pipeline(), None);
    assert_eq!((plan.steps, plan.timesteps(6)?.as_slice()), (6, &[5, 4, 3, 2, 1, 0][..]));
    assert_eq!(model.samples(1).images()?.size()[0], 1);
    // A number that was chosen is not changed.
    assert_eq!(SamplePlan::of(model.pipeline(), Some(7)).steps, 7);
    assert!(model.samples(1).steps(7).images().is_err());
    Ok(())
}

#[test]
fn the_solver_in_the_file_samples_the_model() -> TestResult {
    let folder = tempfile::tempdir()?;
    teacher_with(folder.path(), &json!({ "_class_name": "UniPCMultistepScheduler" }))?;
    let model = open(folder.path())?;
    let images = model.samples(2).steps(3).seed(4).images()?;

    let pipeline = model.pipeline();
    assert_eq!(pipeline.sampler, SamplerConfig::Ddim { eta: 0.0 });
    let plan = SamplePlan { seed: 4, ..SamplePlan::of(pipeline, Some(3)) };
    assert_eq!(plan.solver, None);
    let plan = with_published_solver(pipeline, plan)?;
    let expected = SolverConfig::uni_pc().spaced_as(pipeline.scheduler.common());
    assert_eq!(plan.solver.as_ref(), Some(&expected));
    let noise = initial_noise(4, 2, pipeline.card.image_shape, Device::Cpu)?;
    let conditioning = class_conditioning(&pipeline.card, 2, None, Device::Cpu);
    let guidance = Guidance::of_classes(&pipeline.card);
    assert_eq!(images, generate(&pipeline.network, &plan, &guidance, &noise, &conditioning)?);

    // The same solver, named by the caller for a folder of DDIM.
    let named = open(&asset())?.samples(2).steps(3).seed(4).solver(expected).images()?;
    assert_eq!(images, named);
    assert_ne!(images, open(&asset())?.samples(2).steps(3).seed(4).images()?);
    Ok(())
}

#[test]
fn a_setting_that_is_not_supported_is_named_when_sampling_alone() -> TestResult {
    let folder = tempfile::tempdir()?;
    let keys = json!({ "_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous" });
    teacher_with(folder.path(), &keys)?;
    let model = open(folder.path())?;
    let message = model.samples(1).steps(1).images().expect_err("not supported").to_string();
    for part in ["timestep_type in", FILE, "is \"continuous\"; expected discrete"] {
        assert!(message.contains(part), "{message}");
    }
    let dpm = SolverConfig::dpm_solver();
    assert_eq!(model.samples(1).steps(1).solver(dpm).images()?.size(), [1, 1, 32, 32]);
    let pipeline = Pipeline::open(folder.path(), Placement::default(), Precision::Float32)?;
    assert!(pipeline.published_solver().is_err());
    Ok(())
}

#[test]
fn a_latent_consistency_model_takes_no_solver() -> TestResult {
    let folder = tempfile::tempdir()?;
    teacher_with(folder.path(), &json!({ "_class_name": "LCMScheduler" }))?;
    let request = open(folder.path())?;
    let request = request.samples(1).steps(1).solver(SolverConfig::euler());
    let message = request.images().expect_err("it has its own").to_string();
    assert!(message.contains("`solver` is set; expected left out"), "{message}");
    Ok(())
}

/// Eight network calls of a solver come closer to the end of the teacher's path than eight of DDIM.
#[test]
fn solvers_are_closer_to_the_path_of_the_teacher_than_ddim() -> TestResult {
    let model = open(&asset())?;
    let request = |steps| model.samples(4).class("Bag").steps(steps).seed(1);
    let path = request(200).images()?;
    let distance = |images: Tensor| (images - &path).square().mean(tch::Kind::Float).sqrt();
    let ddim = distance(request(8).images()?).double_value(&[]);
    for solver in [SolverConfig::dpm_solver(), SolverConfig::uni_pc()] {
        let found = distance(request(8).solver(solver.clone()).images()?).double_value(&[]);
        println!("{:?}: {found:.4}, DDIM: {ddim:.4}", solver.method);
        assert!(found < 0.7 * ddim, "{solver:?}: {found} and {ddim}");
    }
    Ok(())
}
