//! `NetworkDenoiser`: an adapter as a student on its teacher's own weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ddil_core::{Conditioning, Denoiser};
use ddil_models::{
    LoraConfig, Model, NetworkConfig, NetworkDenoiser, Placement, Precision, UNet2DConfig, weights,
};
use ddil_pipelines::{Card, Pipeline, Scheduler};
use ddil_schedulers::{
    ConsistencyBoundary, NoiseScheduleConfig, PredictionType, SamplerConfig, Thresholding,
};
use ddil_tests::small_unet;
use ddil_trainer::{AdamWConfig, EmaConfig};
use tch::{Kind, Tensor, kind};

use crate::common::TestResult;

fn pixels() -> UNet2DConfig {
    UNet2DConfig {
        // So that training mode would show.
        dropout: 0.5,
        ..small_unet()
    }
}

fn network(precision: Precision) -> Result<NetworkDenoiser, Box<dyn std::error::Error>> {
    let model = Model::UNet2D(pixels().build(Placement::default(), 5)?);
    model.parameters().set_trainable(false);
    let schedule = NoiseScheduleConfig::default().build()?;
    let network = NetworkDenoiser::new(model, PredictionType::VPrediction, schedule)?;
    Ok(network.with_precision(precision))
}

fn pair(
    precision: Precision,
) -> Result<(NetworkDenoiser, NetworkDenoiser), Box<dyn std::error::Error>> {
    let whole = network(precision)?;
    let config = LoraConfig { rank: 2, alpha: 4.0, ..LoraConfig::default_for(whole.parameters()) };
    Ok(whole.with_adapter(&config, 1)?)
}

fn predict(network: &NetworkDenoiser) -> Result<Tensor, ddil_models::Error> {
    let waves = Tensor::arange(3 * 64, kind::FLOAT_CPU).sin().view([3, 1, 8, 8]);
    let conditioning = Conditioning::class_labels(Tensor::from_slice(&[0_i64, 2, 3]));
    network.output(&waves, &Tensor::from_slice(&[10_i64, 500, 999]), &conditioning)
}

fn copies(named: Vec<(String, Tensor)>) -> BTreeMap<String, Tensor> {
    named.into_iter().map(|(name, tensor)| (name, tensor.copy())).collect()
}

fn error(value: &Tensor, expected: &Tensor) -> f64 {
    ((value - expected).abs().max() / expected.abs().max()).double_value(&[])
}

/// Some updates of the student towards another output than the teacher's.
fn train(student: &NetworkDenoiser, updates: u32) -> TestResult {
    let mut optimizer = AdamWConfig::default().build(student.parameters().learned())?;
    for _ in 0..updates {
        optimizer.zero_grad()?;
        (predict(student)? - 1.0).square().mean(Kind::Float).backward();
        let _ = optimizer.clip()?;
        optimizer.step(0.01)?;
    }
    Ok(())
}

#[test]
fn an_adapter_starts_as_its_teacher() -> TestResult {
    for precision in [Precision::Float32, Precision::Bfloat16] {
        let expected = predict(&network(precision)?)?;
        let (teacher, student) = pair(precision)?;
        assert_eq!(predict(&teacher)?, expected);
        assert_eq!(predict(&student)?, expected);
        assert!(teacher.adapter().is_none() && student.adapter().is_some());
    }
    Ok(())
}

#[test]
fn networks_built_from_a_checkpointed_one_are_checkpointed() -> TestResult {
    let whole = network(Precision::Float32)?;
    assert!(!whole.duplicate(true)?.model().activation_checkpointing());
    whole.model().set_activation_checkpointing(true)?;
    let (derived, _) = whole.derive(&whole.config(), 3)?;
    assert!(derived.model().activation_checkpointing());
    assert!(whole.duplicate(true)?.duplicate(false)?.model().activation_checkpointing());
    let config = LoraConfig { rank: 2, ..LoraConfig::default_for(whole.parameters()) };
    let (teacher, student) = whole.with_adapter(&config, 1)?;
    assert!(
        teacher.model().activation_checkpointing() && student.model().activation_checkpointing()
    );
    Ok(())
}

#[test]
fn updates_change_the_adapter_and_nothing_else() -> TestResult {
    let (teacher, student) = pair(Precision::Float32)?;
    let (base, own) = (copies(teacher.parameters().named()), copies(student.parameters().named()));
    assert!(own.keys().all(|name| name.contains(".lora_")));
    let (of_teacher, at_first) = (predict(&teacher)?, predict(&student)?);
    train(&student, 2)?;
    for (name, tensor) in student.parameters().learned() {
        assert!(tensor.grad().abs().max().double_value(&[]) > 0.0, "{name} has no gradient");
        assert_ne!(tensor, own[&name], "{name} has not moved");
    }
    for (name, tensor) in teacher.parameters().named() {
        assert!(!tensor.requires_grad() && !tensor.grad().defined(), "{name} has a gradient");
        assert_eq!(tensor, base[&name], "{name} has moved");
    }
    assert_ne!(predict(&student)?, at_first);
    assert_eq!(predict(&teacher)?, of_teacher);
    Ok(())
}

#[test]
fn an_average_is_an_adapter_on_the_same_base() -> TestResult {
    let (teacher, student) = pair(Precision::Float32)?;
    let average = student.duplicate(false)?;
    let mut ema = EmaConfig::default()
        .with(|config| {
            config.decay = 0.5;
            config.warmup = false;
        })
        .build(student.parameters().learned())?;
    train(&student, 2)?;
    let at_first = predict(&average)?;
    assert_eq!(at_first, predict(&teacher)?);
    ema.update()?;
    ema.copy_to(&average.parameters().learned())?;
    let output = predict(&average)?;
    assert!(error(&output, &at_first) > 1e-4 && error(&output, &predict(&student)?) > 1e-4);
    assert!(!output.requires_grad());
    // There is one copy of the base: changes are visible to all.
    let before = [predict(&teacher)?, predict(&student)?, output];
    let mut bias = teacher.parameters().get("conv_out.bias").ok_or("absent")?.shallow_clone();
    let _ = bias.g_add_scalar_(1.0);
    for (network, before) in [&teacher, &student, &average].into_iter().zip(before) {
        assert!(error(&(predict(network)? - 1.0), &before) < 1e-5);
    }
    // A copy of the teacher consists of the base alone.
    let copy = teacher.duplicate(true)?;
    assert_eq!(predict(&copy.duplicate(false)?)?, predict(&teacher)?);
    assert!(copy.adapter().is_none());
    assert_eq!(copy.parameters().num_values(), teacher.parameters().num_values());
    Ok(())
}

#[test]
fn a_network_rebuilt_from_its_weights_returns_the_same() -> TestResult {
    let (teacher, student) = pair(Precision::Float32)?;
    train(&student, 3)?;
    let (expected, of_teacher) = (predict(&student)?, predict(&teacher)?);
    let weights: BTreeMap<_, _> = student.weights()?.into_iter().collect();
    let whole = network(Precision::Float32)?;
    for (name, mut tensor) in whole.parameters().named() {
        let _no_grad = tch::no_grad_guard();
        tensor.copy_(&weights[&name]);
    }
    assert_eq!(weights.len(), whole.parameters().named().len());
    let output = predict(&whole)?;
    assert!(error(&output, &expected) <= 1e-5, "{}", error(&output, &expected));
    assert!(error(&output, &of_teacher) > 1e-3);
    assert_eq!(predict(&teacher)?, of_teacher);
    Ok(())
}

/// As in an update: teacher and student by turns, then one backward pass.
#[test]
fn a_teacher_evaluation_within_a_loss_does_not_change_its_gradient() -> TestResult {
    let (teacher, student) = pair(Precision::Float32)?;
    train(&student, 2)?;
    let gradients = |label: &Tensor| -> Result<Vec<Tensor>, Box<dyn std::error::Error>> {
        for (_, mut tensor) in student.parameters().learned() {
            tensor.zero_grad();
        }
        let output = predict(&student)?;
        let again = {
            let _no_grad = tch::no_grad_guard();
            predict(&teacher)?
        };
        assert_eq!(&again, label);
        (output - again).square().sum(Kind::Float).backward();
        let learned = student.parameters().learned();
        Ok(learned.iter().map(|(_, tensor)| tensor.grad().copy()).collect())
    };
    let label = predict(&teacher)?;
    assert!(!label.requires_grad());
    let first = gradients(&label)?;
    // Without the teacher between pass and backward pass.
    for (_, mut tensor) in student.parameters().learned() {
        tensor.zero_grad();
    }
    (predict(&student)? - &label).square().sum(Kind::Float).backward();
    let learned = student.parameters().learned();
    let second: Vec<Tensor> = learned.iter().map(|(_, tensor)| tensor.grad().copy()).collect();
    assert_eq!(first, second);
    Ok(())
}

#[test]
fn only_a_part_that_is_named_is_ignored() -> TestResult {
    let (teacher, student) = pair(Precision::Float32)?;
    let x_t = Tensor::zeros([2, 1, 8, 8], kind::FLOAT_CPU);
    let t = Tensor::from_slice(&[10_i64, 20]);
    let labels = || Conditioning::class_labels(Tensor::from_slice(&[0_i64, 1]));
    let conditioning = labels().with_guidance_weight(Tensor::from_slice(&[3_f32, 7.0]));
    for network in [&teacher, &student] {
        let refused =
            network.predict(&x_t, &t, &conditioning).expect_err("the base has no input for it");
        let field = "guidance_weight";
        assert!(
            matches!(&refused, ddil_core::Error::Conditioning { field: f, .. } if f == field),
            "{refused}"
        );
    }
    let expected = student.predict(&x_t, &t, &labels())?.x0;
    let student = student.ignoring("guidance_weight").duplicate(false)?;
    assert_eq!(student.predict(&x_t, &t, &conditioning)?.x0, expected);
    let text = labels().with("encoder_hidden_states", Tensor::zeros([2, 3, 4], kind::FLOAT_CPU));
    assert!(student.predict(&x_t, &t, &text).is_err());
    Ok(())
}

#[test]
fn targets_without_a_layer_are_refused() -> TestResult {
    let targets = vec!["to_q".to_owned(), "ff.net.2".to_owned()];
    let config = LoraConfig { targets, ..LoraConfig::default() };
    let refused = network(Precision::Float32)?.with_adapter(&config, 0);
    assert!(matches!(refused, Err(ddil_models::Error::InvalidConfig { .. })));
    let (teacher, _student) = pair(Precision::Float32)?;
    let again = teacher.with_adapter(&LoraConfig { targets: vec!["to_q".into()], ..config }, 0);
    assert!(matches!(again, Err(ddil_models::Error::AdapterAttached { .. })));
    Ok(())
}

/// A text-to-image pipeline as far as a student needs it: an index, a U-Net that diffusers wrote, a scheduler.
fn write_text_to_image(folder: &Path) -> TestResult {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    for part in ["unet", "scheduler"] {
        fs::create_dir_all(folder.join(part))?;
    }
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let from = golden.join("models/unet_condition_sd15").join(file);
        fs::copy(from, folder.join("unet").join(file))?;
    }
    let scheduler = golden.join("schedulers/ddim_scheduler_config.json");
    fs::copy(scheduler, folder.join("scheduler/scheduler_config.json"))?;
    let index = r#"{"_class_name": "StableDiffusionPipeline", "vae": [null, null],
        "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}"#;
    Ok(fs::write(folder.join("model_index.json"), index)?)
}

/// With `DDIL_WRITE_MODELS` the folder stays there, for `tools/record/record_lora.py --check-pipeline`.
#[test]
fn an_adapter_of_a_text_u_net_is_written_and_read() -> TestResult {
    let temporary = tempfile::tempdir()?;
    let root = std::env::var_os("DDIL_WRITE_MODELS");
    let root = root.map_or_else(|| temporary.path().to_owned(), Into::into);
    let [base, folder] = ["base", "adapter"].map(|name| root.join(name));
    write_text_to_image(&base)?;
    let Pipeline { network, parts, .. } =
        Pipeline::open(&base, Placement::default(), Precision::Float32)?;
    let config = LoraConfig { rank: 2, alpha: 3.0, ..LoraConfig::default() };
    let (teacher, student) = network.with_adapter(&config, 0)?;
    let student = student.ignoring("guidance_weight");

    let wave = |shape: &[i64]| {
        Tensor::arange(shape.iter().product::<i64>(), kind::FLOAT_CPU).sin().view(shape)
    };
    let (x_t, states) = (wave(&[2, 4, 8, 8]), wave(&[2, 5, 12]));
    let timesteps = Tensor::from_slice(&[999_i64, 499]);
    let conditioning = Conditioning::none()
        .with(Conditioning::ENCODER_HIDDEN_STATES, states.shallow_clone())
        .with_guidance_weight(Tensor::from_slice(&[3_f32, 7.0]));
    let deaf = conditioning.shallow_clone().without(Conditioning::GUIDANCE_WEIGHT);
    let of_teacher = teacher.output(&x_t, &timesteps, &deaf)?;
    assert_eq!(student.output(&x_t, &timesteps, &conditioning)?, of_teacher);
    let mut optimizer = AdamWConfig::default().build(student.parameters().learned())?;
    for _ in 0..2 {
        optimizer.zero_grad()?;
        (student.output(&x_t, &timesteps, &conditioning)? - 1.0)
            .square()
            .mean(Kind::Float)
            .backward();
        optimizer.step(0.02)?;
    }
    let output = student.output(&x_t, &timesteps, &conditioning)?;
    assert!(error(&output, &of_teacher) > 0.01);
    assert_eq!(teacher.output(&x_t, &timesteps, &deaf)?, of_teacher);

    let boundary = ConsistencyBoundary::default();
    let sampler = SamplerConfig::Lcm { original_steps: 50, boundary };
    let scheduler = Scheduler::new(&student, sampler, &Thresholding::None, None)?;
    let card = Card { method: "lcm".to_owned(), guidance_scale: Some(6.0), ..Card::default() };
    Pipeline::write_adapter(&folder, &student, &scheduler, card, &parts)?;
    let text = fs::read_to_string(folder.join("README.md"))?;
    for words in ["load_lora_weights", "LCMScheduler", "scale 6", "num_inference_steps=4"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let read = Pipeline::open(&folder, Placement::default(), Precision::Float32)?;
    assert_eq!((read.sampler, read.parts.path()), (sampler, &*fs::canonicalize(&base)?));
    let again = read.network.output(&x_t, &timesteps, &deaf)?;
    assert!(error(&again, &output) <= 1e-5, "{}", error(&again, &output));
    let refused = Pipeline::write_adapter(&folder, &teacher, &scheduler, read.card, &parts);
    assert!(matches!(refused, Err(ddil_pipelines::Error::Invalid(_))));

    let tensors = [("x_t", x_t), ("encoder_hidden_states", states), ("timesteps", timesteps)];
    let outputs = [("output", output.detach()), ("of_teacher", of_teacher)];
    let tensors = tensors.into_iter().chain(outputs);
    let tensors: Vec<_> = tensors.map(|(name, tensor)| (name.to_owned(), tensor)).collect();
    Ok(weights::save(&tensors, root.join("expected.safetensors"), &BTreeMap::new())?)
}
