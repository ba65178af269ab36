//! `UNet2DModel` against what diffusers answered, and its refusals.

use std::collections::BTreeMap;

use ddil_libtorch::Autocast;
use ddil_models::{Error, Placement, UNet2DConfig, UNet2DModel, UnknownKeys, weights};
use tch::{Device, Kind, Tensor};

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
    unet.forward(&recorded["sample"], &recorded["timesteps"], recorded.get("class_labels"))
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
    let features = unet.features(&recorded["sample"], &recorded["timesteps"], labels)?;
    assert!(relative_error(&features, &recorded["features"]) <= TOLERANCE);
    Ok(())
}

#[test]
fn double_and_half_precision_follow_the_placement() -> TestResult {
    let recorded = expected("unet_unconditional")?;
    for (kind, tolerance) in [(Kind::Double, 1e-5), (Kind::BFloat16, 0.05)] {
        let unet = load("unet_unconditional", Placement { kind, ..Placement::default() })?;
        let sample = recorded["sample"].to_kind(kind);
        let output = unet.forward(&sample, &recorded["timesteps"], None)?;
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
    let each = unet.forward(sample, &Tensor::from_slice(&[7_i64; 3]), None)?;
    assert_eq!(unet.forward(sample, &Tensor::from(7_i64), None)?, each);
    assert_eq!(unet.forward(sample, &Tensor::from_slice(&[7.0_f32; 3]), None)?, each);
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
    unet.forward(&sample, &recorded["timesteps"], None)?.sum(Kind::Float).backward();
    assert!(sample.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
    assert!(unet.parameters().named().iter().all(|(_, parameter)| !parameter.grad().defined()));
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
        unet.forward(sample, t, labels).expect_err("it does not fit").to_string()
    };
    assert!(unet.forward(&sample, &t, Some(&labels)).is_ok());

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
    assert!(refusal(&sample, &t, None).contains("`class_labels` is None"));
    assert!(refusal(&sample, &t, Some(&two)).contains("`class_labels` has shape [2]"));
    let floats = labels.to_kind(Kind::Float);
    assert!(refusal(&sample, &t, Some(&floats)).contains("`class_labels` has kind Float"));
    for wrong in [-1_i64, 11] {
        let message = refusal(&sample, &t, Some(&Tensor::from_slice(&[0, wrong, 1])));
        assert!(message.contains(&format!("holds {wrong}; expected 0 to 10")), "{message}");
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
    let error = unet.forward(&recorded["sample"], &recorded["timesteps"], Some(&labels));
    assert!(matches!(error, Err(Error::UnexpectedClassLabels { .. })));

    let identity = load("unet_identity_classes", Placement::default())?;
    let recorded = expected("unet_identity_classes")?;
    let error = identity.forward(&recorded["sample"], &recorded["timesteps"], Some(&labels));
    assert!(matches!(error, Err(Error::InvalidShape { name: "class_labels", .. })));
    Ok(())
}
