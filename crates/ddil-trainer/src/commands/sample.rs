//! `ddil sample`.

use std::fs;
use std::num::NonZeroU32;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use ddil_models::Lora;
use ddil_trainer::guide::Guide;
use ddil_trainer::picture::{Layout, Picture, save_each};
use ddil_trainer::pipeline::Pipeline;
use ddil_trainer::prompting::{PromptRequest, decode, draw_latents, spaced_as_published};
use ddil_trainer::sampling::{SamplePlan, classes, generate, initial_noise, layout};
use tch::{Device, Tensor};

use super::{open_model, say};
use crate::cli::{PromptArgs, SampleArgs};

/// Pictures that are to be written, and how they are laid out.
struct Drawn {
    images: Tensor,
    layout: Layout,
    steps: u32,
}

pub(crate) fn run(args: &SampleArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.num_samples != Some(0), "--num-samples is 0; expected at least 1");
    let path = args.model.display();
    let class = Pipeline::class_at(&args.model)
        .with_context(|| format!("no model could be read from {path}"))?;
    let prompts = prompts(&args.prompting)?;
    // Refused before any weights are read.
    if class.is_text_to_image() {
        ensure!(args.class.is_none(), "--class: the model draws prompts and knows no classes");
        ensure!(!prompts.is_empty(), "--prompt is missing: the model draws what it is told");
    } else if let Some(flag) = prompt_flag(&args.prompting) {
        bail!("{flag}: the model is told no text; --class chooses one of its classes");
    }
    let (pipeline, plan) = open_model(&args.model, &args.sampling)?;
    if let Some(file) = &args.lora {
        apply_lora(&pipeline, file, args.lora_scale)?;
    }
    let drawn = if class.is_text_to_image() {
        of_prompts(args, &pipeline, plan, prompts)?
    } else {
        of_classes(args, &pipeline, &plan)?
    };
    write(args, &drawn)
}

/// All prompts, those of the command line first.
fn prompts(args: &PromptArgs) -> anyhow::Result<Vec<String>> {
    let mut prompts = args.prompts.clone();
    if let Some(path) = &args.prompts_file {
        let text = fs::read_to_string(path)
            .with_context(|| format!("no prompts could be read from {}", path.display()))?;
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        ensure!(!lines.is_empty(), "{} holds no prompts", path.display());
        prompts.extend(lines.into_iter().map(str::to_owned));
    }
    Ok(prompts)
}

/// What was given that only a text-to-image model knows.
fn prompt_flag(args: &PromptArgs) -> Option<&'static str> {
    let given = [
        ("--prompt", !args.prompts.is_empty()),
        ("--prompts-file", args.prompts_file.is_some()),
        ("--negative-prompt", args.negative_prompt.is_some()),
        ("--height", args.height.is_some()),
        ("--width", args.width.is_some()),
    ];
    given.into_iter().find_map(|(flag, given)| given.then_some(flag))
}

/// Adds adapters to the network for good.
fn apply_lora(pipeline: &Pipeline, file: &Path, scale: f64) -> anyhow::Result<()> {
    let mut lora = Lora::from_file(pipeline.network.parameters(), file)?;
    let passed_over = lora.ignored().len();
    if passed_over > 0 {
        eprintln!(
            "warning: {passed_over} tensors of {} are for text encoders and were passed over",
            file.display()
        );
    }
    lora.set_scale(scale)?;
    Ok(lora.merge()?)
}

fn of_prompts(
    args: &SampleArgs,
    pipeline: &Pipeline,
    plan: SamplePlan,
    prompts: Vec<String>,
) -> anyhow::Result<Drawn> {
    let plan = spaced_as_published(pipeline, plan)?;
    let PromptArgs { negative_prompt, height, width, .. } = &args.prompting;
    let per_prompt = args.num_samples.unwrap_or(1);
    let request = PromptRequest {
        prompts,
        negative_prompt: negative_prompt.clone(),
        size: [*height, *width],
        per_prompt,
    };
    let text = pipeline.frame.text_to_image(pipeline.network.placement())?;
    let told = request.told(pipeline, &text, &plan)?;
    for (prompt, cut) in &told.truncated {
        eprintln!(
            "warning: a prompt is longer than the text encoder reads\n  prompt: {prompt}\n  cut off: {cut}"
        );
    }
    let latents = draw_latents(pipeline, &plan, &told)?;
    let images = decode(&text, &latents, plan.batch_size)?;
    let columns = if request.prompts.len() == 1 { per_prompt.min(4) } else { per_prompt };
    let layout = Layout::columns(NonZeroU32::new(columns).unwrap_or(NonZeroU32::MIN));
    Ok(Drawn { images, layout, steps: plan.steps })
}

fn of_classes(args: &SampleArgs, pipeline: &Pipeline, plan: &SamplePlan) -> anyhow::Result<Drawn> {
    const NUM_SAMPLES: u32 = 64;
    let num_classes = pipeline.card.class_names.len() as i64;
    if let Some(class) = args.class.filter(|class| !(0..num_classes).contains(class)) {
        bail!("--class is {class}; the model has {num_classes} classes, counted from 0");
    }
    let device = pipeline.network.placement().device;
    let n = args.num_samples.unwrap_or(NUM_SAMPLES);
    let noise = initial_noise(plan.seed, n, pipeline.card.image_shape, device)?;
    let conditioning = classes(&pipeline.card, n, args.class, device);
    let guide = Guide::of_classes(&pipeline.card);
    let images = generate(&pipeline.network, plan, &guide, &noise, &conditioning)?;
    let columns = if num_classes > 0 && args.class.is_none() { num_classes } else { 8 };
    let images = images.to_device(Device::Cpu);
    Ok(Drawn { images, layout: layout(columns as u32), steps: plan.steps })
}

fn write(args: &SampleArgs, drawn: &Drawn) -> anyhow::Result<ExitCode> {
    Picture::grid(&drawn.images, drawn.layout)?.save(&args.output)?;
    let n = drawn.images.size()[0];
    say(&format!("{n} samples in {} steps: {}\n", drawn.steps, args.output.display()))?;
    if let Some(folder) = &args.folder {
        let files = save_each(&drawn.images, folder, 0)?;
        say(&format!("{} files in {}\n", files.len(), folder.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
