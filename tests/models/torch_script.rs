//! `TorchScript`: a recorded program, trained and saved.

use ddil_models::{Error, TorchScript, TorchScriptConfig, weights};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::common::{TestResult, golden, relative_error};

fn load() -> ddil_models::Result<TorchScript> {
    let config = TorchScriptConfig { class_labels: true, ..TorchScriptConfig::default() };
    TorchScript::from_file(golden("torch_script").join("model.pt"), &config, Device::Cpu)
}

fn run(script: &TorchScript) -> ddil_models::Result<Tensor> {
    let recorded = weights::read_all(golden("torch_script").join("expected.safetensors"))?;
    script.forward(&recorded["x_t"], &recorded["timesteps"], Some(&recorded["class_labels"]))
}

#[test]
fn a_torch_script_program_returns_outputs_and_gradients() -> TestResult {
    let script = load()?;
    let recorded = weights::read_all(golden("torch_script").join("expected.safetensors"))?;
    let output = run(&script)?;
    assert!(relative_error(&output, &recorded["output"]) < 1e-6);
    assert!(!output.requires_grad());

    script.parameters().set_trainable(true);
    run(&script)?.square().sum(Kind::Float).backward();
    let gradient = script.parameters().get("linear.weight").expect("it has one").grad();
    assert!(relative_error(&gradient, &recorded["grad.linear.weight"]) < 1e-6);
    Ok(())
}

#[test]
fn training_mode_drops() -> TestResult {
    let script = load()?;
    let evaluated = run(&script)?;
    script.set_training(true)?;
    assert_ne!(run(&script)?, evaluated);
    script.set_training(false)?;
    assert_eq!(run(&script)?, evaluated);
    Ok(())
}

#[test]
fn learned_values_are_saved() -> TestResult {
    let script = load()?;
    {
        let _no_grad = tch::no_grad_guard();
        let bias = script.parameters().get("linear.bias").expect("it has one");
        let _ = bias.shallow_clone().fill_(3.0);
    }
    let folder = TempDir::new()?;
    let path = folder.path().join("model.pt");
    script.save(&path)?;
    let again = TorchScript::from_file(&path, script.config(), Device::Cpu)?;
    assert_eq!(run(&again)?, run(&script)?);
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1);
    assert!(matches!(script.save(folder.path().join("no/model.pt")), Err(Error::Write { .. })));
    Ok(())
}

#[test]
fn no_program_and_wrong_inputs_are_refused() -> TestResult {
    let folder = TempDir::new()?;
    let path = folder.path().join("model.pt");
    let config = TorchScriptConfig::default();
    assert!(matches!(TorchScript::from_file(&path, &config, Device::Cpu), Err(Error::Read { .. })));
    std::fs::write(&path, "no program")?;
    assert!(matches!(TorchScript::from_file(&path, &config, Device::Cpu), Err(Error::Read { .. })));
    // A text of 4 GiB in a few kilobytes, for which libtorch would take the memory.
    let mut claims = std::fs::read(golden("torch_script").join("model.pt"))?;
    let text = claims.windows(4).position(|bytes| bytes == b"X\x08\0\0").expect("one of eight");
    claims[text + 1..text + 5].fill(0xff);
    std::fs::write(&path, &claims)?;
    let error = TorchScript::from_file(&path, &config, Device::Cpu).expect_err("it is not there");
    let cause = std::error::Error::source(&error).expect("it has one").to_string();
    assert!(cause.contains("data.pkl") && cause.contains("is truncated"), "{cause}");

    let script = load()?;
    let (x, t) =
        (Tensor::zeros([2, 2], tch::kind::FLOAT_CPU), Tensor::zeros([2], tch::kind::INT64_CPU));
    assert!(matches!(
        script.forward(&x, &t, None),
        Err(Error::MissingPart { part: "class_labels", .. })
    ));
    let wide = Tensor::zeros([2, 5], tch::kind::FLOAT_CPU);
    let error = script.forward(&wide, &t, Some(&t)).expect_err("five values a sample");
    assert!(matches!(error, Error::Torch { .. }), "{error:?}");
    let plain =
        TorchScript::from_file(golden("torch_script").join("model.pt"), &config, Device::Cpu)?;
    assert!(matches!(
        plain.forward(&x, &t, Some(&t)),
        Err(Error::UnexpectedPart { part: "class_labels", .. })
    ));
    Ok(())
}
