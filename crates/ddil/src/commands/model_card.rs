//! The model card of an exported folder: how to draw its samples with diffusers.

use std::fmt::Write as _;
use std::path::Path;

use ddil_pipelines::{Pipeline, SamplePlan};
use ddil_schedulers::SchedulerConfig;

/// `README.md` of a folder; none for a teacher without classes, which diffusers' pipelines sample by themselves.
pub(super) fn model_card(folder: &Path) -> anyhow::Result<Option<String>> {
    let pipeline = Pipeline::open_without_weights(folder)?;
    let plan = SamplePlan::of(&pipeline, None);
    let is_text = pipeline.parts.class().is_text_to_image();
    if plan.timesteps.is_none() && (is_text || pipeline.card.class_names.is_empty()) {
        return Ok(None);
    }
    let (method, updates) = (&pipeline.card.method, pipeline.card.updates);
    let method = if method.is_empty() { "unknown" } else { method };
    let snippet = if is_text { of_prompts(&pipeline, &plan) } else { of_classes(&pipeline, &plan) };
    let steps = plan.steps;
    Ok(Some(format!(
        "---\nlibrary_name: diffusers\ntags: [{method}]\n---\n\n# {name}\n\n\
         Written by `ddil export` (method `{method}`, {updates} updates). Samples in {steps} steps with diffusers:\n\n\
         ```python\n{snippet}```\n",
        name = folder.file_name().unwrap_or_default().to_string_lossy(),
    )))
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
    format!(
        "from diffusers import DiffusionPipeline\n\n\
         pipe = DiffusionPipeline.from_pretrained(\".\")  # this folder\n\
         images = pipe(\"a prompt\", num_inference_steps={steps}, guidance_scale={scale:?}).images\n"
    )
}
