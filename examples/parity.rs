//! Computes the same outputs as another implementation, for `tools/check/parity.py` to compare.
//!
//! `cargo run --release --example parity -- JOBS.json`: a list of jobs, each with `inputs` and `outputs`, safetensors
//! files. Nothing is compared here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ddil_core::Conditioning;
use ddil_examples::replay::replay;
use ddil_models::{
    AutoencoderKL, ClipTextModel, Lora, Model, Placement, Precision, UnknownKeys, weights,
};
use ddil_pipelines::{Pipeline, PromptRequest, SamplePlan, Scheduler};
use ddil_schedulers::SchedulerConfig;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

type Failure = ddil_core::Report;
type Tensors = BTreeMap<String, Tensor>;

#[derive(Deserialize)]
struct Job {
    #[serde(flatten)]
    what: What,
    inputs: PathBuf,
    outputs: PathBuf,
    #[serde(default)]
    bfloat16: bool,
}

#[derive(Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
enum What {
    /// A U-Net's `output`, and the gradients of the sum of its squares.
    Unet {
        folder: PathBuf,
        #[serde(default)]
        gradients: bool,
    },
    /// An autoencoder's `mean` of `image` and `decoded` of `latent`.
    Autoencoder { folder: PathBuf },
    /// A text encoder's hidden states of `input_ids`.
    Text { folder: PathBuf },
    /// A U-Net's `output` with an adapter `apart` and `merged`.
    Lora { folder: PathBuf, adapter: PathBuf },
    /// A pipeline's `image` of prompts, from `noise` and, for LCM, `fresh` noise per step.
    Pipeline { folder: PathBuf, prompts: Vec<String>, steps: u32, guidance_scale: f64 },
    /// A pipeline, written to another folder.
    Copy { folder: PathBuf, to: PathBuf },
}

fn main() -> Result<(), Failure> {
    let path = std::env::args().nth(1).ok_or("usage: parity JOBS.json")?;
    let jobs: Vec<Job> = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    for job in &jobs {
        let inputs = weights::read_all(&job.inputs)?;
        let outputs = outputs_of(job, &inputs)
            .map_err(|error| format!("{}: {error}", job.outputs.display()))?;
        let named: Vec<(String, Tensor)> = outputs
            .into_iter()
            .map(|(name, tensor)| (name, tensor.detach().to_kind(Kind::Float).contiguous()))
            .collect();
        weights::save(&named, &job.outputs, &BTreeMap::new())?;
    }
    Ok(())
}

fn outputs_of(job: &Job, inputs: &Tensors) -> Result<Tensors, Failure> {
    let kind = if job.bfloat16 { Kind::BFloat16 } else { Kind::Float };
    let placement = Placement { device: Device::Cpu, kind, channels_last: false };
    match &job.what {
        What::Unet { folder, gradients } => unet(folder, placement, *gradients, inputs),
        What::Autoencoder { folder } => autoencoder(folder, placement, inputs),
        What::Text { folder } => text(folder, placement, inputs),
        What::Lora { folder, adapter } => lora(folder, adapter, placement, inputs),
        What::Pipeline { folder, prompts, steps, guidance_scale } => {
            pipeline(folder, placement, prompts, (*steps, *guidance_scale), inputs)
        }
        What::Copy { folder, to } => copy(folder, to, placement),
    }
}

/// An input by name, in the kind of the network.
fn part(inputs: &Tensors, name: &str, kind: Kind) -> Result<Tensor, Failure> {
    let tensor = inputs.get(name).ok_or_else(|| format!("no input `{name}`"))?;
    Ok(tensor.to_kind(kind))
}

fn named<const N: usize>(tensors: [(&str, Tensor); N]) -> Tensors {
    tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
}

/// The network's conditioning, from the inputs that are present.
fn conditioning(inputs: &Tensors, kind: Kind) -> Conditioning {
    let part = |name: &str| inputs.get(name).map(Tensor::shallow_clone);
    let embeds = |name: &str| part(name).map(|tensor| tensor.to_kind(kind));
    [Conditioning::ENCODER_HIDDEN_STATES, Conditioning::TEXT_EMBEDS]
        .map(|name| (name, embeds(name)))
        .into_iter()
        .chain(
            [Conditioning::TIME_IDS, Conditioning::GUIDANCE_WEIGHT].map(|name| (name, part(name))),
        )
        .filter_map(|(name, part)| Some((name, part?)))
        .collect()
}

fn pass(model: &Model, inputs: &Tensors, kind: Kind) -> Result<Tensor, Failure> {
    let sample = part(inputs, "sample", kind)?;
    let timesteps = part(inputs, "timesteps", Kind::Int64)?;
    Ok(model.forward(&sample, &timesteps, &conditioning(inputs, kind))?)
}

fn unet(
    folder: &Path,
    placement: Placement,
    gradients: bool,
    inputs: &Tensors,
) -> Result<Tensors, Failure> {
    let model = Model::from_folder(folder, placement, UnknownKeys::Refuse)?;
    model.parameters().set_trainable(gradients);
    let output = pass(&model, inputs, placement.kind)?;
    let mut outputs = named([("output", output.shallow_clone())]);
    if gradients {
        output.square().sum(Kind::Float).backward();
        let learned = model.parameters().learned().into_iter();
        outputs.extend(learned.map(|(name, tensor)| (format!("grad.{name}"), tensor.grad())));
    }
    Ok(outputs)
}

fn autoencoder(folder: &Path, placement: Placement, inputs: &Tensors) -> Result<Tensors, Failure> {
    let vae = AutoencoderKL::from_folder(folder, placement, UnknownKeys::Refuse, None)?;
    let _no_grad = tch::no_grad_guard();
    let mean = vae.encode(&part(inputs, "image", placement.kind)?)?.mean;
    let decoded = vae.decode(&part(inputs, "latent", placement.kind)?)?;
    Ok(named([("mean", mean), ("decoded", decoded)]))
}

fn text(folder: &Path, placement: Placement, inputs: &Tensors) -> Result<Tensors, Failure> {
    let model = ClipTextModel::from_folder(folder, placement, UnknownKeys::Refuse)?;
    let _no_grad = tch::no_grad_guard();
    let output = model.forward(&part(inputs, "input_ids", Kind::Int64)?, None)?;
    let last_but_one = output.hidden_states.len().checked_sub(2).ok_or("a single layer")?;
    let mut outputs = named([
        ("last_hidden_state", output.last_hidden_state),
        ("last_but_one", output.hidden_states[last_but_one].shallow_clone()),
        ("pooled", output.pooled),
    ]);
    outputs.extend(output.text_embeds.map(|embeds| ("text_embeds".to_owned(), embeds)));
    Ok(outputs)
}

fn lora(
    folder: &Path,
    adapter: &Path,
    placement: Placement,
    inputs: &Tensors,
) -> Result<Tensors, Failure> {
    let model = Model::from_folder(folder, placement, UnknownKeys::Refuse)?;
    let _no_grad = tch::no_grad_guard();
    let mut lora = Lora::from_file(model.parameters(), adapter)?;
    let apart = pass(&model, inputs, placement.kind)?;
    lora.merge()?;
    let merged = pass(&model, inputs, placement.kind)?;
    Ok(named([("apart", apart), ("merged", merged)]))
}

fn pipeline(
    folder: &Path,
    placement: Placement,
    prompts: &[String],
    (steps, guidance_scale): (u32, f64),
    inputs: &Tensors,
) -> Result<Tensors, Failure> {
    let _no_grad = tch::no_grad_guard();
    // In half precision, only products and convolutions: states and steps stay as they are.
    let precision = match placement.kind {
        Kind::BFloat16 => Precision::Bfloat16,
        _ => Precision::Float32,
    };
    let placement = Placement { kind: Kind::Float, ..placement };
    let pipeline = Pipeline::open(folder, placement, precision)?;
    let parts = pipeline.parts.text_to_image(placement)?;
    let noise = part(inputs, "noise", Kind::Float)?;
    let side = |dim: usize| (noise.size()[dim] * parts.pixels_per_latent()) as u32;
    let request = PromptRequest {
        prompts: prompts.to_vec(),
        negative_prompt: None,
        size: [2, 3].map(|dim| Some(side(dim))),
        per_prompt: 1,
    };
    let plan = SamplePlan { guidance_scale, ..SamplePlan::of(&pipeline, Some(steps)) };
    let encoded = request.encode(&pipeline, &parts, &plan)?;
    let timesteps = pipeline.scheduler.compatible_timesteps(steps)?;
    let latent = replay(&pipeline, &plan, &timesteps, &encoded, (&noise, inputs.get("fresh")))?;
    let image = parts.decode(&latent)?;
    Ok(named([("latent", latent), ("image", image)]))
}

fn copy(folder: &Path, to: &Path, placement: Placement) -> Result<Tensors, Failure> {
    let pipeline = Pipeline::open(folder, placement, Precision::Float32)?;
    let schedule = SchedulerConfig::from_file(folder.join("scheduler/scheduler_config.json"))?;
    let timesteps = schedule.timesteps(Some(4))?;
    let scheduler = Scheduler::new(
        &pipeline.network,
        pipeline.sampler,
        &pipeline.thresholding,
        Some(&timesteps),
    )?;
    Pipeline::write(to, &pipeline.network, &scheduler, &pipeline.card, Some(&pipeline.parts))?;
    Ok(named([("done", Tensor::from(1.0_f32))]))
}
