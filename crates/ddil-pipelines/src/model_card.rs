//! `README.md` of a model folder: how to sample it with diffusers.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use ddil_files::write_atomic;
use ddil_schedulers::{SchedulerConfig, Thresholding, Timesteps};

use crate::error::Result;
use crate::pipeline::Pipeline;
use crate::sampling::SamplePlan;

/// The name of the file.
const FILE_NAME: &str = "README.md";

/// The text of a model card for a folder that [`Pipeline::write`] wrote: a Python program that samples the model with
/// diffusers, and what diffusers does otherwise.
///
/// Number of steps and guidance scale are arguments of a call of diffusers, and no file of a folder sets them.
///
/// # Errors
///
/// As [`Pipeline::open_without_weights`].
///
/// # Example
///
/// ```
/// use ddil_pipelines::model_card;
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-text-to-image"));
/// let text = model_card(path)?;
/// assert!(text.contains("pipe(\"a prompt\", num_inference_steps=50, guidance_scale=7.5)"));
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
pub fn model_card(folder: &Path) -> Result<String> {
    let pipeline = Pipeline::open_without_weights(folder)?;
    let plan = SamplePlan::of(&pipeline, None);
    let is_text = pipeline.parts.class().is_text_to_image();
    let (method, updates) = (&pipeline.card.method, pipeline.card.updates);
    let method = if method.is_empty() { "unknown" } else { method };
    let snippet = if is_text { of_prompts(&pipeline, &plan) } else { of_classes(&pipeline, &plan) };
    let differences = differences(&pipeline, &plan);
    let steps = plan.steps;
    Ok(format!(
        "---\nlibrary_name: diffusers\ntags: [{method}]\n---\n\n# {class}, {method}\n\n\
         Written by `ddil` (method `{method}`, {updates} updates). Samples in {steps} steps with diffusers:\n\n\
         ```python\n{snippet}```\n{differences}",
        class = pipeline.parts.class().as_str(),
    ))
}

/// Writes [`model_card`] into the folder and returns its path. A `README.md` that another program wrote stays.
///
/// # Errors
///
/// As [`model_card`]; [`Error::Files`](crate::Error::Files) if the file cannot be written.
pub fn write_model_card(folder: &Path) -> Result<PathBuf> {
    let path = folder.join(FILE_NAME);
    let is_ours = |text: String| text.contains("Written by `ddil`");
    if !path.exists() || fs::read_to_string(&path).is_ok_and(is_ours) {
        write_atomic(&path, model_card(folder)?.as_bytes())?;
    }
    Ok(path)
}

/// Pipelines of pixels do not take classes, so the loop is written out.
fn of_classes(pipeline: &Pipeline, plan: &SamplePlan) -> String {
    let class = pipeline.scheduler.class();
    let [channels, height, width] = pipeline.card.image_shape;
    let names = &pipeline.card.class_names;
    let n = if names.is_empty() { 8 } else { names.len() };
    let mut text = format!(
        "import torch\nfrom diffusers import {class}, UNet2DModel\n\n\
         folder = \".\"  # this folder\n\
         unet = UNet2DModel.from_pretrained(folder, subfolder=\"unet\")\n\
         scheduler = {class}.from_pretrained(folder, subfolder=\"scheduler\")\n"
    );
    if !names.is_empty() {
        let names: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
        let _ = writeln!(text, "labels = torch.arange({n})  # {}", names.join(", "));
    }
    let _ = writeln!(text, "x = torch.randn({n}, {channels}, {height}, {width})");
    text += &set_timesteps(pipeline, plan);
    let labels = if names.is_empty() { "" } else { ", class_labels=labels" };
    let _ = write!(
        text,
        "with torch.no_grad():\n    for t in scheduler.timesteps:\n        \
         x = scheduler.step(unet(x, t{labels}).sample, t, x).prev_sample\n\
         images = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()  # [{n}, {channels}, {height}, {width}]\n"
    );
    text
}

fn set_timesteps(pipeline: &Pipeline, plan: &SamplePlan) -> String {
    match (&pipeline.scheduler, &plan.timesteps) {
        (SchedulerConfig::Lcm(_), Some(own)) => {
            format!("scheduler.set_timesteps(timesteps={own:?})\n")
        }
        _ => format!("scheduler.set_timesteps({})\n", plan.steps),
    }
}

fn of_prompts(pipeline: &Pipeline, plan: &SamplePlan) -> String {
    let (steps, scale) = (plan.steps, pipeline.default_guidance_scale());
    let own = plan.timesteps.as_ref().filter(|own| {
        let is_lcm = matches!(pipeline.scheduler, SchedulerConfig::Lcm(_));
        is_lcm && chosen_by_diffusers(pipeline, steps).is_none_or(|grid| grid.as_slice() != **own)
    });
    let how = match own {
        Some(own) => format!("timesteps={own:?}"),
        None => format!("num_inference_steps={steps}"),
    };
    format!(
        "from diffusers import DiffusionPipeline\n\n\
         pipe = DiffusionPipeline.from_pretrained(\".\")  # this folder\n\
         images = pipe(\"a prompt\", {how}, guidance_scale={scale:?}).images\n"
    )
}

/// The timesteps of a run of diffusers' scheduler, if it can make one.
fn chosen_by_diffusers(pipeline: &Pipeline, steps: u32) -> Option<Timesteps> {
    pipeline.scheduler.compatible_timesteps(steps).ok()
}

/// What diffusers does otherwise, as a list.
fn differences(pipeline: &Pipeline, plan: &SamplePlan) -> String {
    let mut lines = Vec::new();
    if pipeline.parts.class().is_text_to_image() {
        lines.push(
            "Both arguments are needed: no file sets them, and the defaults of a pipeline are those of a teacher."
                .to_owned(),
        );
    }
    let is_ddim = matches!(pipeline.scheduler, SchedulerConfig::Ddim(_));
    if let (true, Some(own)) = (is_ddim, &plan.timesteps)
        && chosen_by_diffusers(pipeline, plan.steps).is_none_or(|grid| grid.as_slice() != *own)
    {
        lines.push(format!(
            "The student was trained at the timesteps {own:?} (`ddil_timesteps` of the scheduler). `DDIMScheduler` takes \
             none, so diffusers' images differ."
        ));
    }
    if pipeline.card.thresholding.as_ref().is_some_and(|own| *own != Thresholding::None) {
        lines.push(
            "`ddil sample` bounds predicted clean data as `ddil.json` says; diffusers does not."
                .to_owned(),
        );
    }
    if lines.is_empty() {
        return String::new();
    }
    lines.into_iter().fold("\n".to_owned(), |text, line| text + "- " + &line + "\n")
}
