//! `ddil sample`.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::exit_code::NOT_FINITE;
use crate::sample_file;
use anyhow::{Context, bail, ensure};
use ddil_data::{Captions, read_prompts};
use ddil_evaluate::{draw_observed, is_finite};
use ddil_models::Lora;
use ddil_pipelines::{
    Image, Layout, Pipeline, PromptRequest, SampleGrid, SamplePlan, decode, sample_latents,
    save_each, with_published_timesteps,
};
use tch::Tensor;

use super::model_source::ModelSource;
use super::output::{SAMPLES, ensure_writable};
use super::{Calls, open_model, print, start};
use crate::cli::{PromptArgs, SampleArgs};

/// Samples to write, and the grid of them.
struct Drawn {
    images: Tensor,
    grid: Image,
    steps: u32,
}

pub(crate) fn run(args: &SampleArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.num_samples != Some(0), "--num-samples is 0; expected at least 1");
    start(&args.sampling.parent)?;
    let source = ModelSource::at(&args.model)?;
    let class = source.class()?;
    let prompts = prompts(&args.prompting)?;
    // Rejected before any weights are read.
    if class.is_text_to_image() {
        ensure!(
            args.class.is_none(),
            "--class: a text-to-image model has no classes; use --prompt instead"
        );
        ensure!(!prompts.is_empty(), "--prompt is missing: a text-to-image model requires prompts");
        ensure!(
            args.first == 0 && args.of.is_none(),
            "--first and --of apply to models without prompts only"
        );
    } else if let Some(flag) = prompt_flag(&args.prompting) {
        bail!("{flag}: the model takes no prompts; use --class to choose one of its classes");
    }
    let output = output(args)?;
    let (pipeline, plan) = open_model(&source, &args.sampling)?;
    warn_of_misuse(args, &pipeline);
    if let Some(file) = &args.lora {
        apply_lora(&pipeline, file, args.lora_scale)?;
    }
    let drawn = if class.is_text_to_image() {
        of_prompts(args, &pipeline, plan, prompts)?
    } else {
        of_classes(args, &pipeline, &plan)?
    };
    write(args, &output, &drawn)
}

/// The output file: the one of --output, or the first free name of `samples.png`, `samples-2.png`, ..
fn output(args: &SampleArgs) -> anyhow::Result<PathBuf> {
    let Some(path) = &args.output else {
        let numbered = (2..).map(|number| format!("samples-{number}.png").into());
        let mut names = std::iter::once(PathBuf::from("samples.png")).chain(numbered);
        return names.find(|path| !path.exists()).context("no free file name; set --output");
    };
    ensure_writable(path, true, &SAMPLES)?;
    if path.exists() {
        tracing::info!("{} exists and will be replaced", path.display());
    }
    Ok(path.clone())
}

/// Warns about settings that a student is not made for; they may be intended.
fn warn_of_misuse(args: &SampleArgs, pipeline: &Pipeline) {
    let method = pipeline.card.method.as_str();
    if method.is_empty() || method == "teacher" || pipeline.parts.class().is_text_to_image() {
        return;
    }
    if pipeline.card.guidance_range.is_none()
        && args.sampling.guidance_scale.is_some_and(|s| s != 1.0)
    {
        eprintln!(
            "warning: --guidance-scale guides this student twice: it was trained on a guided teacher"
        );
    }
    let own = pipeline.timesteps.as_ref().map(Vec::len);
    if let (Some(own), Some(steps)) = (own, args.sampling.steps)
        && own != steps as usize
    {
        eprintln!(
            "warning: --steps {steps}: the student was trained for {own} steps and is worse at other numbers of steps"
        );
    }
}

/// All prompts, those of the command line first.
fn prompts(args: &PromptArgs) -> anyhow::Result<Vec<String>> {
    let mut prompts = args.prompts.clone();
    if let Some(path) = &args.prompts_file {
        let read = read_prompts(path, Captions::First)?;
        prompts.extend(read.into_iter().map(|prompt| prompt.text));
    }
    Ok(prompts)
}

/// The given options that only a text-to-image model supports.
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

/// Merges adapters into the network's weights.
fn apply_lora(pipeline: &Pipeline, file: &Path, scale: f64) -> anyhow::Result<()> {
    let mut lora = Lora::from_file(pipeline.network.parameters(), file)?;
    let num_ignored = lora.ignored().len();
    if num_ignored > 0 {
        eprintln!(
            "warning: {num_ignored} tensors of {} are adapters of text encoders and were ignored",
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
    let plan = with_published_timesteps(pipeline, plan)?;
    let PromptArgs { negative_prompt, height, width, .. } = &args.prompting;
    let per_prompt = args.num_samples.unwrap_or(1);
    let request = PromptRequest {
        prompts,
        negative_prompt: negative_prompt.clone(),
        size: [*height, *width],
        per_prompt,
    };
    let text = pipeline.parts.text_to_image(pipeline.network.placement())?;
    let encoded = request.encode(pipeline, &text, &plan)?;
    for (prompt, cut) in &encoded.truncated {
        eprintln!(
            "warning: a prompt is longer than the text encoder's input and was cut\n  prompt: {prompt}\n  cut off: {cut}"
        );
    }
    let calls = Calls::of("sample", &plan, request.prompts.len() as u32 * per_prompt);
    let latents = sample_latents(pipeline, &plan, &encoded, &|| calls.note())?;
    drop(calls);
    let images = decode(&text, &latents, plan.batch_size)?;
    // One prompt in a square; several with one row each.
    let square = f64::from(per_prompt).sqrt().ceil() as u32;
    let columns = if request.prompts.len() == 1 { square } else { per_prompt };
    let layout = Layout::columns(NonZeroU32::new(columns).unwrap_or(NonZeroU32::MIN));
    let grid = Image::grid(&images, layout)?;
    Ok(Drawn { images, grid, steps: plan.steps })
}

fn of_classes(args: &SampleArgs, pipeline: &Pipeline, plan: &SamplePlan) -> anyhow::Result<Drawn> {
    const NUM_SAMPLES: u32 = 64;
    let names = &pipeline.card.class_names;
    let class = args.class.as_deref().map(|text| class_number(names, text)).transpose()?;
    let n = args.num_samples.unwrap_or(NUM_SAMPLES);
    let end = args.first.saturating_add(n);
    let total = args.of.unwrap_or(end);
    ensure!(
        end <= total,
        "--first {} plus --num-samples {n} is {end}; expected at most --of, which is {total}",
        args.first
    );
    let calls = Calls::of("sample", plan, n);
    let images = draw_observed(pipeline, plan, total, args.first..end, class, &|| calls.note())?;
    // One class per row, if the first sample is of the first class.
    let num_classes = names.len() as u32;
    let in_turn = class.is_none() && args.first.is_multiple_of(num_classes.max(1));
    let num_classes = if in_turn { num_classes } else { 0 };
    let grid = SampleGrid::of(n, num_classes).draw(&images, names)?;
    Ok(Drawn { images, grid, steps: plan.steps })
}

/// The number of a class given by name or by number.
fn class_number(names: &[String], text: &str) -> anyhow::Result<i64> {
    if let Some(number) = names.iter().position(|name| name == text) {
        return Ok(number as i64);
    }
    let listed = || {
        let shown: Vec<String> =
            names.iter().enumerate().take(20).map(|(i, name)| format!("{i} {name}")).collect();
        shown.join(", ") + if names.len() > 20 { ", .." } else { "" }
    };
    ensure!(!names.is_empty(), "--class is `{text}`; the model has no classes");
    let number: Option<i64> = text.parse().ok();
    number.filter(|number| (0..names.len() as i64).contains(number)).with_context(|| {
        format!("--class is `{text}`; the model has {} classes: {}", names.len(), listed())
    })
}

fn write(args: &SampleArgs, output: &Path, drawn: &Drawn) -> anyhow::Result<ExitCode> {
    let n = drawn.images.size()[0];
    if sample_file::is_named(output) {
        if !is_finite(&drawn.images)? {
            eprintln!(
                "error: samples of {} are NaN or infinite; nothing was written",
                args.model.display()
            );
            return Ok(ExitCode::from(NOT_FINITE));
        }
        sample_file::write(output, &drawn.images)?;
    } else {
        drawn.grid.save(output)?;
    }
    print(&format!("{n} samples in {} steps: {}\n", drawn.steps, output.display()))?;
    if let Some(folder) = &args.folder {
        let files = save_each(&drawn.images, folder, 0)?;
        print(&format!("{} files in {}\n", files.len(), folder.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
