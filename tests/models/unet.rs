//! `UNet2DModel` against what diffusers answered, and its refusals.

use std::collections::BTreeMap;

use ddil_models::{Placement, UNet2DConfig, UNet2DModel, UnknownKeys, weights};
use tch::{Kind, Tensor};

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
