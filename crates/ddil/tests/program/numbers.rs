//! Non-finite numbers: the run stops before they reach the weights, names their origin, and saves the batch.

use std::fs;
use std::path::Path;

use ddil_trainer::checkpoint::{Checkpoint, CheckpointWriter};
use serde_json::Value;

use crate::methods::Method;
use crate::support::{
    Ended, TestResult, Workshop, arguments, checkpoints, copy_folder, json, num_lines, status,
};
use crate::text_teacher::Family;

/// Puts a value into every element of a tensor of a safetensors file.
pub(crate) fn poison(path: &Path, tensor: &str, value: f32) -> TestResult {
    let mut bytes = fs::read(path)?;
    let header = u64::from_le_bytes(bytes[..8].try_into()?) as usize;
    let about: Value = serde_json::from_slice(&bytes[8..8 + header])?;
    let offset = |place: usize| about[tensor]["data_offsets"][place].as_u64().map(|at| at as usize);
    let (start, end) = offset(0).zip(offset(1)).ok_or("there is no such tensor")?;
    for element in bytes[8 + header..][start..end].chunks_exact_mut(4) {
        element.copy_from_slice(&value.to_le_bytes());
    }
    Ok(fs::write(path, bytes)?)
}

const WEIGHTS: &str = "teacher/unet/diffusion_pytorch_model.safetensors";

/// A run whose teacher has a value in one of its weights.
fn with_teacher_of(weight: &str, value: f32, method: &str, more: &[&str]) -> (Workshop, Ended) {
    let method = Method::named(method);
    let workshop = method.workshop();
    poison(&workshop.path(WEIGHTS), weight, value).expect("the teacher was just written");
    let arguments = method.arguments("run", 12, more);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = workshop.ddil(&arguments);
    (workshop, ended)
}

/// The saved batch.
fn saved(workshop: &Workshop, step: u64) -> Value {
    let folder = workshop.run("run").join(format!("not_finite/step_{step:07}"));
    let tensors = fs::read(folder.join("batch.safetensors")).expect("it was saved");
    let tensors = safetensors::SafeTensors::deserialize(&tensors).expect("they are tensors");
    let x_t = tensors.tensor("states.x_t").expect("the states are there");
    let about = json(&folder.join("batch.json"));
    assert_eq!(x_t.shape()[0], about["rows"].as_array().map_or(0, Vec::len));
    about
}

#[test]
fn a_teacher_with_nan_weights_is_named_before_the_first_update() {
    let (workshop, ended) = with_teacher_of("conv_in.bias", f32::NAN, "lcm", &[]);
    ended.refused(&[
        "step 1: loss is NaN",
        "weights of the teacher",
        "the first: `conv_in.bias`",
        "not_finite",
    ]);
    assert_eq!(status(&workshop.run("run"))["state"], "failed");
    assert_eq!(num_lines(&workshop.run("run")), 0);
    let about = saved(&workshop, 1);
    let what = about["findings"][0]["what"].as_str().unwrap_or_default().to_owned();
    assert!(what.contains("weights of the teacher"), "{about}");
    assert!(about["of_rows"][0]["timestep"].is_number(), "{about}");
}

/// Image files always contain numbers; encoded data may contain anything.
#[test]
fn nan_data_are_named() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    workshop.complete("distill", "whole", &[]);
    let bad = [
        ("latents.safetensors", "mean", "not finite: data, timestep"),
        ("prompts.safetensors", "encoder_hidden_states", "encoder_hidden_states of the data"),
    ];
    for (file, tensor, words) in bad {
        let folder = workshop.path(tensor);
        copy_folder(&workshop.path("cache"), &folder);
        poison(&folder.join(file), tensor, f32::NAN)?;
        let data = format!("data={{ kind = \"latents\", path = {tensor:?}, batch_size = 4 }}");
        let ended = workshop.ddil(&arguments("distill", tensor, &[&data]));
        ended.refused(&["step 1: loss is NaN", words, "in 4 of 4 rows"]);
        assert!(checkpoints(&workshop.run(tensor)).is_empty());
    }
    Ok(())
}

/// Rewrites a checkpoint with a value in one of its tensors.
fn poison_checkpoint(path: &Path, file: &str, tensor: &str, value: f64) -> TestResult {
    let old = Checkpoint::open(path)?;
    let folder = path.parent().ok_or("it has one")?;
    let mut new = CheckpointWriter::new(folder, old.step(), &old.manifest().kind)?;
    for name in old.manifest().members.keys() {
        if let Ok(value) = old.json::<Value>(name) {
            new.json(name, &value)?;
            continue;
        }
        let mut tensors = old.tensors(name)?;
        let poisoned = tensors.iter_mut().filter(|(own, _)| name == file && own == tensor);
        poisoned.for_each(|(_, tensor)| drop(tensor.fill_(value)));
        new.tensors(name, &tensors)?;
    }
    new.commit()?;
    Ok(())
}

/// Clipped to the range of the data, an infinite output looks valid, and so does the loss.
#[test]
fn an_overflowing_teacher_is_detected_despite_its_threshold() -> TestResult {
    let method = Method::named("progressive");
    let workshop = method.workshop();
    let arguments = method.arguments("whole", 12, &["output.log_interval=1"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    workshop.ddil(&arguments).succeeded();
    let run = workshop.rewound(&workshop.run("whole"), "run", 9);
    // The last bias of the second stage's teacher; the student has its own.
    let checkpoint = &checkpoints(&run)[&9];
    poison_checkpoint(checkpoint, "teacher.safetensors", "conv_out.bias", f64::INFINITY)?;
    let ended = workshop.ddil(&["distill", "--resume", &run.display().to_string()]);
    ended.refused(&["step 10: the sum of the networks' outputs is", "weights of the teacher"]);
    assert_eq!((num_lines(&run), status(&run)["step"].as_u64()), (9, Some(9)));
    let about = saved(&workshop, 10);
    let found = about["findings"].as_array().ok_or("a list")?;
    let output = found.iter().find(|finding| finding["what"] == "output of the teacher");
    let output = output.ok_or("the teacher's output is among them")?;
    for field in ["rows", "timesteps", "sources"] {
        assert!(output[field].as_array().is_some_and(|values| !values.is_empty()), "{about}");
    }
    Ok(())
}
