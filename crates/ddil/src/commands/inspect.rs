//! `ddil inspect`.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use ddil_core::Denoiser;
use ddil_models::weights::{self, WeightFiles};
use ddil_models::{ModelConfig, Placement, Precision, UnknownKeys};
use ddil_pipelines::{ModelFiles, Pipeline};
use ddil_trainer::Logging;
use ddil_trainer::checkpoint::{self, Checkpoint, find_latest, list};
use ddil_trainer::run_folder::{Status, is_in_use};
use serde_json::{Map, Value, json};
use tch::Tensor;

use super::export::read_adapters;
use super::print;
use super::terminal::Levels;
use crate::cli::InspectArgs;
use crate::report::metrics::{Metrics, shown};
use crate::report::summary::{METRICS, is_run};
use crate::results::aligned;

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    Logging::start("info")?;
    let found = describe(&args.path)?;
    let text = if args.json {
        serde_json::to_string_pretty(&found)? + "\n"
    } else {
        tree(&found, 0) + &figures(&args.path)?
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The last figures of a run as a table, with their course; empty for anything else.
fn figures(path: &Path) -> anyhow::Result<String> {
    const WIDTH: usize = 24;
    if !is_run(path) {
        return Ok(String::new());
    }
    let metrics = Metrics::read(&path.join(METRICS))?;
    let levels = Levels::of_locale();
    let course = format!("{:<WIDTH$}", "course");
    let mut rows =
        vec![["figure", "last", "smallest", "largest", &course].map(str::to_owned).to_vec()];
    for figure in metrics.figures() {
        let Some((_, last)) = figure.last() else { continue };
        let [least, most] = figure
            .extremes()
            .map_or(["-".to_owned(), "-".to_owned()], |found| found.map(|(_, value)| shown(value)));
        rows.push(vec![
            figure.name.to_owned(),
            shown(last),
            least,
            most,
            // The last column: aligned to the left, so that courses begin below each other.
            format!("{:<WIDTH$}", levels.sparkline(&figure, WIDTH)),
        ]);
    }
    let Some(step) = metrics.steps.last() else { return Ok(String::new()) };
    let table =
        aligned(&rows).lines().map(|line| line.trim_end().to_owned() + "\n").collect::<String>();
    Ok(format!("\nfigures at update {step}\n\n{table}"))
}

fn describe(path: &Path) -> anyhow::Result<Value> {
    if is_run(path) {
        return run_folder(path);
    }
    if let Some(found) = checkpoint::find(path)? {
        return checkpoint(&found);
    }
    if Pipeline::is_at(path) {
        return model(path);
    }
    if ModelFiles::is_network_at(path) {
        return network(path);
    }
    if path.is_file() && path.extension().is_some_and(|end| end == "safetensors") {
        return weights_file(path);
    }
    if !path.exists() {
        bail!(
            "{} does not exist; expected a run folder, a checkpoint, a model folder, a network folder or a file of weights",
            path.display()
        );
    }
    bail!(
        "{} is not a run folder (no status.json), a checkpoint (no manifest.json), a model folder (no model_index.json), a \
         network folder (no config.json) or a .safetensors file",
        path.display()
    )
}

/// A network without a pipeline: its settings, and the headers of its weights.
fn network(path: &Path) -> anyhow::Result<Value> {
    let inner = path.join("unet");
    let folder = if path.join("config.json").is_file() { path } else { &inner };
    let file = folder.join("config.json");
    let config = ModelConfig::from_file(&file, UnknownKeys::IgnoreForeign)?;
    let (weights, variant) = WeightFiles::DIFFUSION.find_any(folder)?;
    let tensors = config.read_weights(&weights)?;
    let mut found = of_tensors(tensors.iter().map(|(_, tensor)| tensor));
    found.insert("kind".to_owned(), json!("network"));
    found.insert("folder".to_owned(), json!(folder.display().to_string()));
    found.insert("variant".to_owned(), json!(variant));
    found.insert("settings".to_owned(), json!(config));
    found.insert("ignored_keys".to_owned(), json!(ModelConfig::foreign_keys(&file)?));
    Ok(Value::Object(found))
}

/// Adapters, or the weights of any network.
fn weights_file(path: &Path) -> anyhow::Result<Value> {
    let tensors = weights::read_all(path)?;
    let mut found = of_tensors(tensors.values());
    found.insert("tensors".to_owned(), json!(tensors.len()));
    found.insert("metadata".to_owned(), json!(weights::read_metadata(path)?));
    let is_adapter = |name: &String| name.contains("lora_") || name.contains(".lora.");
    if !tensors.keys().any(is_adapter) {
        found.insert("kind".to_owned(), json!("weights"));
        return Ok(Value::Object(found));
    }
    found.insert("kind".to_owned(), json!("adapters"));
    match read_adapters(path, None) {
        Ok((lora, base)) => {
            let layers = lora.layers();
            let ranks: BTreeSet<i64> = layers.iter().map(|layer| layer.rank).collect();
            let mut alphas: Vec<f64> = layers.iter().map(|layer| layer.alpha).collect();
            alphas.sort_by(f64::total_cmp);
            alphas.dedup();
            found.insert("fits".to_owned(), json!(base));
            found.insert("layers".to_owned(), json!(layers.len()));
            found.insert("ranks".to_owned(), json!(ranks));
            found.insert("alphas".to_owned(), json!(alphas));
            found.insert("of_text_encoders".to_owned(), json!(lora.ignored().len()));
        }
        Err(error) => drop(found.insert("fits".to_owned(), json!(error.to_string()))),
    }
    Ok(Value::Object(found))
}

/// Number of values, and their kinds.
fn of_tensors<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Map<String, Value> {
    let (mut values, mut kinds) = (0, BTreeSet::new());
    for tensor in tensors {
        values += tensor.numel();
        kinds.insert(format!("{:?}", tensor.kind()));
    }
    Map::from_iter([("parameters".to_owned(), json!(values)), ("kinds".to_owned(), json!(kinds))])
}

fn run_folder(path: &Path) -> anyhow::Result<Value> {
    let checkpoints = path.join("checkpoints");
    let found = find_latest(&checkpoints)?;
    let newest = found.checkpoint.as_ref().map(|c| c.path().display().to_string());
    let damaged: Vec<String> = found
        .damaged
        .iter()
        .map(|damaged| format!("{}: {}", damaged.path.display(), damaged.reason))
        .collect();
    let model = Pipeline::is_at(path).then(|| model(path)).transpose()?;
    Ok(json!({
        "kind": "run",
        "status": Status::from_folder(path)?,
        "in_use": is_in_use(path)?,
        "checkpoints": list(&checkpoints)?.len(),
        "newest_sound_checkpoint": newest,
        "damaged": damaged,
        "export": model,
    }))
}

fn checkpoint(checkpoint: &Checkpoint) -> anyhow::Result<Value> {
    Ok(json!({
        "kind": "checkpoint",
        "manifest": checkpoint.manifest(),
        "differs_from_here": checkpoint.obstacles_to_exact_resume()?,
    }))
}

fn model(path: &Path) -> anyhow::Result<Value> {
    if Pipeline::class_at(path)?.is_text_to_image() {
        return text_to_image(path);
    }
    let pipeline = Pipeline::open(path, Placement::default(), Precision::Float32)?;
    let parameters = pipeline.network.parameters();
    Ok(json!({
        "kind": "model",
        "folder": pipeline.parts.path().display().to_string(),
        "card": pipeline.card,
        "parameters": parameters.num_values(),
        "prediction_type": pipeline.network.prediction_type(),
        "schedule": pipeline.network.schedule().config(),
        "solver": solver_in_words(&pipeline),
        "thresholding": pipeline.thresholding,
        "timesteps": pipeline.timesteps,
    }))
}

/// The solver that samples a teacher, or the setting of it that is not supported.
fn solver_in_words(pipeline: &Pipeline) -> Value {
    pipeline.published_solver().map_or_else(|error| json!(error.to_string()), |own| json!(own))
}

/// Reads settings and headers only: the weights may be larger than the memory.
fn text_to_image(path: &Path) -> anyhow::Result<Value> {
    let adapter = Pipeline::adapter_at(path)?;
    let whole = adapter.as_ref().map_or(path, |(_, base)| base);
    let parts = ModelFiles::of_pipeline(whole, None)?;
    let (scheduler, solver) = parts.scheduler()?;
    let network = parts.network()?;
    let pipeline = Pipeline::open_without_weights(path)?;
    let summaries = parts.summaries()?;
    let parameters: u64 = summaries.iter().filter_map(|part| part.parameters).sum();
    let [channels, _] = network.channels().unwrap_or_default();
    let latent_shape = network.sample_size().map(|[height, width]| [channels, height, width]);
    let named =
        summaries.into_iter().map(|part| Ok((part.name.clone(), serde_json::to_value(part)?)));
    let guidance = match pipeline.card.guidance_range {
        Some([min, max]) => format!("an input of the network, {min} to {max}"),
        None => {
            format!("applied by the sampler, default {}", pipeline.default_guidance_scale())
        }
    };
    Ok(json!({
        "kind": "model",
        "folder": pipeline.parts.path().display().to_string(),
        "class": parts.class().as_str(),
        "card": pipeline.card,
        "parts": Value::Object(named.collect::<serde_json::Result<_>>()?),
        "parameters": parameters,
        "prediction_type": scheduler.prediction_type(),
        "schedule": pipeline.network.schedule().config(),
        "sampler": pipeline.sampler,
        "replaces_scheduler": solver,
        "solver": solver_in_words(&pipeline),
        "thresholding": pipeline.thresholding,
        "timesteps": pipeline.timesteps,
        "latent_shape": latent_shape,
        "guidance": guidance,
    }))
}

/// Names on the left, values after them, parts indented.
fn tree(value: &Value, depth: usize) -> String {
    let Value::Object(fields) = value else { return String::new() };
    let indent = "  ".repeat(depth);
    let lines = fields.iter().map(|(name, value)| match value {
        Value::Object(_) => format!("{indent}{name}:\n{}", tree(value, depth + 1)),
        Value::String(text) => format!("{indent}{name}: {text}\n"),
        other => format!("{indent}{name}: {other}\n"),
    });
    lines.collect()
}
