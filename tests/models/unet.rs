//! `UNet2DModel` against recorded outputs of diffusers, and its errors.

use std::collections::BTreeMap;

use ddil_libtorch::ArgumentError;
use ddil_libtorch::Autocast;
use ddil_models::{
    DownBlockType, Error, NetworkConfig, Placement, UNet2DConfig, UNet2DModel, UnknownKeys,
    UpBlockType, weights,
};
use tch::{Device, Kind, Tensor, kind};

use crate::common::{GOLDEN, TestResult, golden, relative_error};

/// Relative to the largest value, in `Float`.
const TOLERANCE: f64 = 1e-5;

fn load(name: &str, placement: Placement) -> ddil_models::Result<UNet2DModel> {
    let folder = golden(name);
    UNet2DConfig::from_file(folder.join("config.json"), UnknownKeys::Refuse)?
        .build_from(placement, folder.join("diffusion_pytorch_model.safetensors"))
}

fn expected(name: &str) -> ddil_models::Result<BTreeMap<String, Tensor>> {
    weights::read_all(golden(name).join("expected.safetensors"))
}

fn forward(unet: &UNet2DModel, recorded: &BTreeMap<String, Tensor>) -> ddil_models::Result<Tensor> {
    let (labels, weight) = (recorded.get("class_labels"), recorded.get("guidance_weight"));
    unet.forward(&recorded["sample"], &recorded["timesteps"], labels, weight)
}

#[test]
fn outputs_are_those_of_diffusers() -> TestResult {
    for channels_last in [false, true] {
        for name in GOLDEN {
            let placement = Placement { channels_last, ..Placement::default() };
            let unet = load(name, placement)?;
            let recorded = expected(name)?;
            let output = unet.forward_with_features(
                &recorded["sample"],
                &recorded["timesteps"],
                recorded.get("class_labels"),
                recorded.get("guidance_weight"),
            )?;
            for (part, found) in [("output", &output.sample), ("features", &output.features)] {
                let error = relative_error(found, &recorded[part]);
                println!("{name} {part}, channels last {channels_last}: {error:.1e}");
                assert!(error <= TOLERANCE, "{name} {part}: {error}");
            }
        }
    }
    Ok(())
}

/// The names of attention in files of 2022, alone or with the newer ones.
#[test]
fn names_of_2022_are_read_and_written_as_newer_ones() -> TestResult {
    let (folder, name) = (tempfile::tempdir()?, "unet_unconditional");
    let unet = load(name, Placement::default())?;
    let new = unet.parameters().named();
    let pairs = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
    let old: Vec<_> = new
        .iter()
        .map(|(name, tensor)| {
            let old = pairs.iter().fold(name.clone(), |name, (new, old)| {
                name.replace(&format!(".attentions.0.{new}."), &format!(".attentions.0.{old}."))
            });
            (old, tensor.shallow_clone())
        })
        .collect();
    assert!(old.iter().any(|(name, _)| name.ends_with("mid_block.attentions.0.proj_attn.weight")));
    let path = folder.path().join("old.safetensors");
    weights::save(&old, &path, &BTreeMap::new())?;
    let read = unet.config().build_from(Placement::default(), &path)?;
    let recorded = expected(name)?;
    assert!(forward(&read, &recorded)?.equal(&forward(&unet, &recorded)?));
    let mut names: Vec<_> =
        unet.config().read_weights(&path)?.into_iter().map(|(n, _)| n).collect();
    let mut expected: Vec<_> = new.iter().map(|(name, _)| name.clone()).collect();
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
    // A name that occurs twice is an error.
    let both: Vec<_> = old
        .into_iter()
        .chain(new.into_iter().filter(|(n, _)| n.contains(".attentions.0.to_q")))
        .collect();
    weights::save(&both, &path, &BTreeMap::new())?;
    let refused = unet.config().build_from(Placement::default(), &path).expect_err("both");
    assert!(refused.to_string().contains("query.weight"), "{refused}");
    Ok(())
}

#[test]
fn gradients_are_those_of_diffusers() -> TestResult {
    for name in GOLDEN {
        let unet = load(name, Placement::default())?;
        let recorded = expected(name)?;
        forward(&unet, &recorded)?.square().sum(Kind::Float).backward();
        let mut compared = 0;
        for (key, gradient) in &recorded {
            let Some(parameter) = key.strip_prefix("grad.") else { continue };
            let found = unet.parameters().get(parameter).expect("a recorded parameter").grad();
            let error = relative_error(&found, gradient);
            println!("{name} {parameter}: {error:.1e}");
            assert!(error <= TOLERANCE, "{name} {parameter}: {error}");
            compared += 1;
        }
        assert!(compared >= 3, "{name}: {compared} gradients");
    }
    Ok(())
}

#[test]
fn features_alone_are_those_of_a_whole_pass() -> TestResult {
    let unet = load("unet_class_labels", Placement::default())?;
    let recorded = expected("unet_class_labels")?;
    let labels = recorded.get("class_labels");
    let features = unet.features(&recorded["sample"], &recorded["timesteps"], labels, None)?;
    assert!(relative_error(&features, &recorded["features"]) <= TOLERANCE);
    Ok(())
}

#[test]
fn double_and_half_precision_follow_the_placement() -> TestResult {
    let recorded = expected("unet_unconditional")?;
    for (kind, tolerance) in [(Kind::Double, 1e-5), (Kind::BFloat16, 0.05)] {
        let unet = load("unet_unconditional", Placement { kind, ..Placement::default() })?;
        let sample = recorded["sample"].to_kind(kind);
        let output = unet.forward(&sample, &recorded["timesteps"], None, None)?;
        assert_eq!(output.kind(), kind);
        let error = relative_error(&output.to_kind(Kind::Float), &recorded["output"]);
        assert!(error <= tolerance, "{kind:?}: {error}");
    }
    Ok(())
}

#[test]
fn autocast_to_bfloat16_stays_close() -> TestResult {
    for name in ["unet_class_labels", "unet_fourier_scale_shift"] {
        for channels_last in [false, true] {
            let unet = load(name, Placement { channels_last, ..Placement::default() })?;
            let recorded = expected(name)?;
            let output = {
                let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16)?;
                forward(&unet, &recorded)?
            };
            let error = relative_error(&output.to_kind(Kind::Float), &recorded["output"]);
            assert!(error <= 0.05, "{name}: {error}");
            output.sum(Kind::Float).backward();
            let gradient = unet.parameters().get("conv_in.weight").expect("it has one").grad();
            assert_eq!(gradient.kind(), Kind::Float);
        }
    }
    Ok(())
}

#[test]
fn one_timestep_serves_the_whole_batch() -> TestResult {
    let unet = load("unet_unconditional", Placement::default())?;
    let sample = &expected("unet_unconditional")?["sample"];
    let each = unet.forward(sample, &Tensor::from_slice(&[7_i64; 3]), None, None)?;
    assert_eq!(unet.forward(sample, &Tensor::from(7_i64), None, None)?, each);
    assert_eq!(unet.forward(sample, &Tensor::from_slice(&[7.0_f32; 3]), None, None)?, each);
    Ok(())
}

#[test]
fn dropout_drops_in_training_alone() -> TestResult {
    let unet = load("unet_class_labels", Placement::default())?;
    let recorded = expected("unet_class_labels")?;
    let evaluated = forward(&unet, &recorded)?;
    unet.set_training(true);
    assert_ne!(forward(&unet, &recorded)?, evaluated);
    unet.set_training(false);
    assert_eq!(forward(&unet, &recorded)?, evaluated);
    Ok(())
}

#[test]
fn no_gradient_reaches_a_frozen_network_and_one_reaches_its_input() -> TestResult {
    let unet = load("unet_fourier_scale_shift", Placement::default())?;
    unet.parameters().set_trainable(false);
    let recorded = expected("unet_fourier_scale_shift")?;
    let sample = recorded["sample"].copy().set_requires_grad(true);
    unet.forward(&sample, &recorded["timesteps"], None, None)?.sum(Kind::Float).backward();
    assert!(sample.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
    assert!(unet.parameters().named().iter().all(|(_, parameter)| !parameter.grad().defined()));
    Ok(())
}

/// Sampling and training give the same output, in either memory layout and precision.
#[test]
fn recording_gradients_changes_no_bit() -> TestResult {
    for name in ["unet_class_labels", "unet_fourier_scale_shift"] {
        for channels_last in [false, true] {
            let unet = load(name, Placement { channels_last, ..Placement::default() })?;
            let recorded = expected(name)?;
            for autocast in [false, true] {
                let kind = autocast.then_some(Kind::BFloat16);
                let _autocast = kind.map(|kind| Autocast::new(Device::Cpu, kind)).transpose()?;
                let with = forward(&unet, &recorded)?;
                assert!(with.requires_grad());
                let without = tch::no_grad(|| forward(&unet, &recorded))?;
                assert_eq!(with, without, "{name} {channels_last} {autocast}");
            }
        }
    }
    Ok(())
}

#[test]
fn frequencies_are_saved_and_never_learned() -> TestResult {
    let unet = load("unet_fourier_scale_shift", Placement::default())?;
    unet.parameters().set_trainable(true);
    let frequencies = unet.parameters().get("time_proj.weight").expect("it is saved");
    assert!(!frequencies.requires_grad());
    assert!(unet.parameters().learned().iter().all(|(name, _)| name != "time_proj.weight"));
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name() -> TestResult {
    let unet = load("unet_class_labels", Placement::default())?;
    let float = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let (sample, t) = (float(&[3, 3, 8, 4]), Tensor::from_slice(&[1_i64; 3]));
    let labels = Tensor::from_slice(&[0_i64, 1, 10]);
    let refusal = |sample: &Tensor, t: &Tensor, labels: Option<&Tensor>| {
        unet.forward(sample, t, labels, None).expect_err("it does not fit").to_string()
    };
    assert!(unet.forward(&sample, &t, Some(&labels), None).is_ok());

    for shape in [&[3, 3, 8][..], &[3, 1, 8, 4], &[3, 3, 7, 4], &[3, 3, 8, 3], &[3, 3, 0, 4]] {
        let message = refusal(&float(shape), &t, Some(&labels));
        assert!(message.contains("`sample`") && message.contains("multiples of 2"), "{message}");
    }
    let integers = sample.to_kind(Kind::Int64);
    assert!(refusal(&integers, &t, Some(&labels)).contains("`sample` has kind Int64"));
    let two = Tensor::from_slice(&[1_i64; 2]);
    assert!(refusal(&sample, &two, Some(&labels)).contains("`timesteps` has shape [2]"));
    let flags = t.to_kind(Kind::Bool);
    assert!(refusal(&sample, &flags, Some(&labels)).contains("`timesteps` has kind Bool"));
    assert!(refusal(&sample, &t, None).contains("requires `class_labels`, which is missing"));
    assert!(refusal(&sample, &t, Some(&two)).contains("`class_labels` has shape [2]"));
    let floats = labels.to_kind(Kind::Float);
    assert!(refusal(&sample, &t, Some(&floats)).contains("`class_labels` has kind Float"));
    for wrong in [-1_i64, 11] {
        let message = refusal(&sample, &t, Some(&Tensor::from_slice(&[0, wrong, 1])));
        assert!(message.contains(&format!("contains {wrong}; expected 0 to 10")), "{message}");
    }
    // Another kind than the parameters: libtorch's reason, not its stack trace.
    let message = refusal(&sample.to_kind(Kind::Double), &t, Some(&labels));
    assert!(message.starts_with("UNet2DModel::forward: ") && !message.contains('\n'), "{message}");
    Ok(())
}

#[test]
fn labels_for_a_network_without_classes_are_refused() -> TestResult {
    let unet = load("unet_unconditional", Placement::default())?;
    let recorded = expected("unet_unconditional")?;
    let labels = Tensor::from_slice(&[0_i64; 3]);
    let error = unet.forward(&recorded["sample"], &recorded["timesteps"], Some(&labels), None);
    assert!(matches!(error, Err(Error::UnexpectedPart { part: "class_labels", .. })));

    let identity = load("unet_identity_classes", Placement::default())?;
    let recorded = expected("unet_identity_classes")?;
    let error = identity.forward(&recorded["sample"], &recorded["timesteps"], Some(&labels), None);
    assert!(matches!(
        error,
        Err(Error::Argument(ArgumentError::Shape { name: "class_labels", .. }))
    ));
    Ok(())
}

fn with_guidance_embedding() -> UNet2DConfig {
    UNet2DConfig { time_cond_proj_dim: Some(16), ..untold() }
}

fn untold() -> UNet2DConfig {
    UNet2DConfig {
        in_channels: 1,
        out_channels: 1,
        down_block_types: vec![DownBlockType::DownBlock2D; 2],
        up_block_types: vec![UpBlockType::UpBlock2D; 2],
        block_out_channels: vec![8, 8],
        layers_per_block: 1,
        norm_num_groups: 4,
        add_attention: false,
        ..UNet2DConfig::default()
    }
}

/// At first the weight has no effect, but its gradient is not zero.
#[test]
fn a_fresh_guidance_embedding_changes_nothing() -> TestResult {
    let placement = Placement { kind: Kind::Double, ..Placement::default() };
    let (student, teacher) =
        (with_guidance_embedding().build(placement, 3)?, untold().build(placement, 3)?);
    let (x_t, t) =
        (Tensor::randn([2, 1, 4, 4], kind::DOUBLE_CPU), Tensor::from_slice(&[999_i64, 3]));
    let weight = Tensor::from_slice(&[7.5, 0.3]);
    let output = student.forward(&x_t, &t, None, Some(&weight))?;
    assert_eq!(output, teacher.forward(&x_t, &t, None, None)?);

    output.square().sum(Kind::Double).backward();
    let projection =
        student.parameters().get("time_embedding.cond_proj.weight").expect("it has one");
    assert_eq!(projection.size(), [8, 16]);
    assert!(projection.grad().abs().sum(Kind::Double).double_value(&[]) > 0.0);

    let _no_grad = tch::no_grad_guard();
    let _ = projection.shallow_clone().fill_(0.1);
    let one = student.forward(&x_t, &t, None, Some(&weight))?;
    assert_ne!(one, output);
    assert_ne!(one, student.forward(&x_t, &t, None, Some(&(weight + 1.0)))?);
    Ok(())
}

#[test]
fn a_guidance_weight_is_neither_missing_nor_ignored() -> TestResult {
    let (told, untold) = (
        with_guidance_embedding().build(Placement::default(), 0)?,
        untold().build(Placement::default(), 0)?,
    );
    let (x_t, t) = (Tensor::zeros([2, 1, 4, 4], kind::FLOAT_CPU), Tensor::from(5_i64));
    let weight = Tensor::ones([2], kind::FLOAT_CPU);
    let missing = told.forward(&x_t, &t, None, None);
    assert!(matches!(missing, Err(Error::MissingPart { part: "guidance_weight", .. })));
    let surplus = untold.features(&x_t, &t, None, Some(&weight));
    assert!(matches!(surplus, Err(Error::UnexpectedPart { part: "guidance_weight", .. })));
    let one = told.forward(&x_t, &t, None, Some(&weight.narrow(0, 0, 1)));
    assert!(matches!(
        one,
        Err(Error::Argument(ArgumentError::Shape { name: "guidance_weight", .. }))
    ));
    let integers = told.forward(&x_t, &t, None, Some(&weight.to_kind(Kind::Int64)));
    assert!(matches!(
        integers,
        Err(Error::Argument(ArgumentError::Kind { name: "guidance_weight", .. }))
    ));
    Ok(())
}

/// The features that a critic and its discriminator share: one pass, gradients from both ends.
#[test]
fn gradients_come_back_from_output_and_features_of_one_pass() -> TestResult {
    let unet = untold().build(Placement::default(), 0)?;
    let x_t = Tensor::randn([2, 1, 4, 4], kind::FLOAT_CPU).set_requires_grad(true);
    let pass = unet.forward_with_features(&x_t, &Tensor::from(5_i64), None, None)?;
    let gradient = |of: &Tensor| {
        Tensor::run_backward(&[of.square().sum(Kind::Float)], &[&x_t], true, false).remove(0)
    };
    let (output, features) = (gradient(&pass.sample), gradient(&pass.features));
    assert!(features.abs().sum(Kind::Float).double_value(&[]) > 0.0);
    (pass.sample.square().sum(Kind::Float) + pass.features.square().sum(Kind::Float)).backward();
    assert!(relative_error(&x_t.grad(), &(output + features)) < 1e-5);
    let up = unet.parameters().get("conv_out.weight").expect("it has one").grad();
    assert!(up.defined());
    Ok(())
}

/// In `Double`, so that no product is rounded to fewer bits on the way; timesteps are embedded in `Float` on both.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_matches_the_cpu_in_values_and_gradients() -> TestResult {
    for name in GOLDEN {
        for channels_last in [false, true] {
            let outcome = |device| -> Result<Vec<Tensor>, Box<dyn std::error::Error>> {
                let placement = Placement { device, kind: Kind::Double, channels_last };
                let unet = load(name, placement)?;
                let on_device = |(key, tensor): (String, Tensor)| (key, tensor.to_device(device));
                let mut recorded: BTreeMap<_, _> =
                    expected(name)?.into_iter().map(on_device).collect();
                let sample = recorded["sample"].to_kind(Kind::Double);
                recorded.insert("sample".to_owned(), sample);
                let output = forward(&unet, &recorded)?;
                output.square().sum(Kind::Double).backward();
                let learned = unet.parameters().learned();
                let grads = learned.iter().map(|(_, parameter)| parameter.grad());
                Ok(grads.chain([output]).map(|tensor| tensor.to_device(Device::Cpu)).collect())
            };
            for (found, expected) in outcome(Device::Cuda(0))?.iter().zip(outcome(Device::Cpu)?) {
                let size = expected.abs().max().double_value(&[]).max(1e-3);
                let apart = (found - expected).abs().max().double_value(&[]);
                assert!(
                    apart <= 5e-6 * size,
                    "{name}, channels last {channels_last}: {apart} of {size}"
                );
            }
        }
    }
    Ok(())
}
