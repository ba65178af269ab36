//! `ddil evaluate --prompts`: images of prompts, drawn or from files.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use ddil_data::{ImageFiles, Prompt};
use ddil_evaluate::{
    CaptionScorer, EvaluationPrompts, FeatureKey, FeatureRows, Measurement, PromptDrawing,
    PromptMeter, PromptNetworks, PromptScores, is_finite,
};
use ddil_metrics::{FeatureExtractor, Reference, TorchScriptDistance, quantize};
use ddil_pipelines::SamplePlan;
use ddil_trainer::config::parse_device;
use ddil_trainer::{Interrupt, Progress};
use tch::Tensor;

use super::features::{Features, of_model};
use super::real_images::{RealImages, as_option};
use super::subject::{Model, Subject};
use super::{Row, protocol, save, step_counts};
use crate::cli::EvaluateArgs;
use crate::commands::{Calls, num_threads, sample_plan};
use crate::exit_code::NOT_FINITE;
use crate::sample_file;

/// Images per pass of the networks, for images in files; at least those of one prompt.
const IMAGES_AT_ONCE: usize = 32;

/// The prompts of the command line, if there are any; checked before anything is loaded.
pub(super) fn prompts(args: &EvaluateArgs) -> anyhow::Result<Option<EvaluationPrompts>> {
    let options = &args.prompting;
    let Some(path) = &options.prompts else { return Ok(None) };
    let captions = options.captions.into();
    let prompts = EvaluationPrompts::from_file(path, captions, options.max_prompts)
        .and_then(|prompts| prompts.with_images_per_prompt(options.images_per_prompt))
        .map_err(as_option)?
        .with_text_around(
            options.prompt_prefix.as_deref().unwrap_or_default(),
            options.prompt_suffix.as_deref().unwrap_or_default(),
        )
        .with_negative_prompt(options.negative_prompt.as_deref());
    protocol::ensure(args, &prompts)?;
    let measures = [&options.clip, &options.lpips].iter().any(|path| path.is_some());
    ensure!(
        measures || args.extractor.is_some() || args.reference.is_some(),
        "there is nothing to measure: expected --clip FOLDER for the CLIP score, --reference with --extractor for FID and \
         others, or --lpips FILE"
    );
    ensure!(
        args.save_statistics.is_none() || args.extractor.is_some() || args.reference.is_some(),
        "--save-statistics: expected --extractor with it, whose features are saved"
    );
    Ok(Some(prompts))
}

/// Checks that something can be measured of images that are still to be drawn.
fn ensure_measured(args: &EvaluateArgs) -> anyhow::Result<()> {
    let compares = args.reference.is_some() || args.save_statistics.is_some();
    ensure!(
        args.prompting.clip.is_some() || compares || args.prompting.images_per_prompt > 1,
        "there is nothing to measure with one image per prompt: diversity and LPIPS compare images of a prompt; set \
         --images-per-prompt to 2 or more, or add --clip or --reference"
    );
    Ok(())
}

/// The networks that measure.
struct Networks {
    /// What images are compared with, if there is an extractor.
    real: Option<RealImages>,
    clip: Option<CaptionScorer>,
    lpips: Option<TorchScriptDistance>,
}

impl Networks {
    /// `shape` is that of the images: channels, height, width; none if they differ or are not known.
    fn open(
        args: &EvaluateArgs,
        subject: &Subject,
        shape: Option<[i64; 3]>,
        features: &mut Features,
    ) -> anyhow::Result<Self> {
        let options = &args.prompting;
        let device = parse_device(&args.sampling.device)?;
        // In the order of their size: what cannot be opened fails early.
        let lpips = options
            .lpips
            .as_ref()
            .map(|path| TorchScriptDistance::from_file(path, device).context("--lpips"));
        let clip = options.clip.as_ref();
        let clip = clip.map(|folder| CaptionScorer::from_folder(folder, device).map_err(as_option));
        let (lpips, clip) = (lpips.transpose()?, clip.transpose()?);
        if let Some(lpips) = &lpips {
            // A network of another kind fails here, and not after sampling.
            let images = Tensor::zeros([2, 3, 64, 64], (tch::Kind::Float, device));
            let _ = lpips.mean_pairwise(&images).context("--lpips")?;
        }
        let is_compared = args.extractor.is_some() || args.reference.is_some();
        let real =
            is_compared.then(|| RealImages::open(args, subject, shape, features)).transpose()?;
        Ok(Self { real, clip, lpips })
    }

    fn extractor(&self) -> Option<&dyn FeatureExtractor> {
        self.real.as_ref().map(|real| &*real.extractor)
    }

    fn all(&self) -> PromptNetworks<'_> {
        PromptNetworks::new(self.extractor(), self.clip.as_ref(), self.lpips.as_ref())
    }

    /// The row of what a meter measured; `name` is that of the images, and `save_as` that of their statistics, if they may
    /// be saved.
    fn row(
        &self,
        args: &EvaluateArgs,
        prompts: &EvaluationPrompts,
        name: &str,
        save_as: Option<&str>,
        meter: PromptMeter<'_>,
    ) -> anyhow::Result<Measurement> {
        let (features, scores) = meter.finish()?;
        let PromptScores { clip_score, diversity } = scores;
        if let Some(cut) =
            clip_score.as_ref().map(|score| score.truncated_prompts).filter(|&n| n > 0)
        {
            tracing::warn!(
                "{cut} prompts are longer than the input of CLIP's text encoder and were truncated"
            );
        }
        let mut measurement = None;
        if let (Some(real), Some(features)) = (&self.real, &features) {
            if let Some(name) = save_as.filter(|_| args.save_statistics.is_some()) {
                save(args, &Reference::new(name, features, &*real.extractor)?)?;
            }
            measurement = real.score(name, features, args.standard_errors)?;
        }
        let unscored = || Measurement::unscored(name, prompts.num_images(), self.extractor());
        let measurement = measurement.unwrap_or_else(unscored);
        let protocol = args.prompting.protocol.map(|own| own.as_str().to_owned());
        let prompts = Some(prompts.set.clone());
        Ok(Measurement { prompts, clip_score, diversity, protocol, ..measurement })
    }
}

/// The rows of a subject: of a model one for each number of steps.
pub(super) fn rows(
    args: &EvaluateArgs,
    subject: &Subject,
    prompts: EvaluationPrompts,
    features: &mut Features,
) -> anyhow::Result<(Vec<Row>, ExitCode)> {
    if !matches!(subject, Subject::Model(_)) {
        ensure!(
            prompts.set.is_plain(),
            "--negative-prompt, --prompt-prefix and --prompt-suffix are for images that a model draws; those of {} are drawn \
             already",
            args.subject.display()
        );
    }
    let row = match subject {
        Subject::Model(model) => return model_rows(args, subject, model, &prompts, features),
        Subject::Files(files) => files_row(args, subject, files, prompts, features)?,
        Subject::Samples(images) => samples_row(args, subject, images, prompts, features)?,
        Subject::Data => bail!("--prompts is not for `data`"),
    };
    Ok((vec![row], ExitCode::SUCCESS))
}

/// One row for each number of steps.
fn model_rows(
    args: &EvaluateArgs,
    subject: &Subject,
    model: &Model,
    prompts: &EvaluationPrompts,
    features: &mut Features,
) -> anyhow::Result<(Vec<Row>, ExitCode)> {
    let Model { pipeline, plan: own, .. } = model;
    let text = pipeline.parts.text_to_image(pipeline.network.placement())?;
    let size = [args.prompting.height, args.prompting.width];
    let drawing = |plan: &SamplePlan| {
        PromptDrawing::new(pipeline, &text, plan, size, prompts).map_err(as_option)
    };
    ensure_measured(args)?;
    let shape = drawing(own)?.image_shape();
    protocol::ensure_size(args, [shape[1], shape[2]])?;
    let networks = Networks::open(args, subject, Some(shape), features)?;
    let (mut rows, mut exit_code) = (Vec::new(), ExitCode::SUCCESS);
    for steps in step_counts(args, own) {
        let is_own = steps == own.steps;
        let plan =
            if is_own { own.clone() } else { sample_plan(pipeline, &args.sampling, Some(steps))? };
        let drawing = drawing(&plan)?;
        let [_, height, width] = shape;
        tracing::info!(
            "sampling {} images of {height}x{width} pixels of {} prompts in {steps} steps",
            prompts.num_images(),
            prompts.set.count
        );
        // Statistics are those of the model's own number of steps.
        let save_as = is_own.then(|| format!("{}, {steps} steps", args.subject.display()));
        let call = (args, model, save_as.as_deref());
        let Some(measurement) = drawn(call, &drawing, prompts, &networks, features)? else {
            eprintln!(
                "error: samples in {steps} steps are NaN or infinite; the table has no row for them"
            );
            exit_code = ExitCode::from(NOT_FINITE);
            continue;
        };
        if let Some(file) = args.keep.as_deref().filter(|_| is_own) {
            keep(&drawing, file)?;
        }
        let mut measurement = measurement.of_model(&pipeline.card, drawing.plan());
        measurement.image_size = Some([height, width]);
        measurement.sampling_seed = Some(plan.seed);
        rows.push((measurement.method.clone(), measurement));
    }
    Ok((rows, exit_code))
}

/// What ends the drawing.
enum Stop {
    /// A sample is not finite.
    NotFinite,
    /// There are enough samples.
    Enough,
    Error(anyhow::Error),
}

impl From<ddil_evaluate::Error> for Stop {
    fn from(error: ddil_evaluate::Error) -> Self {
        Self::Error(as_option(error).into())
    }
}

/// Draws and measures, after what an earlier process measured; none if a sample is not finite.
fn drawn(
    (args, model, save_as): (&EvaluateArgs, &Model, Option<&str>),
    drawing: &PromptDrawing<'_>,
    prompts: &EvaluationPrompts,
    networks: &Networks,
    features: &mut Features,
) -> anyhow::Result<Option<Measurement>> {
    let total = prompts.num_images();
    let rows = features.rows(total, || {
        let (folders, network) = of_model(args, model);
        let folders: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
        FeatureKey::of_prompts(&folders, drawing, &network, networks.all())
    })?;
    let (mut meter, before) = meter_after(rows, prompts, networks);
    let (all, left) = (drawing.num_calls(0), drawing.num_calls(before));
    let calls = Calls::of_number("evaluate", all.saturating_sub(left), all);
    let interrupt = features.interrupt;
    let drawn = drawing.for_each(before, &|| calls.note(), |prompts, images| {
        if !is_finite(images)? {
            return Err(Stop::NotFinite);
        }
        let stored = quantize(images).map_err(ddil_evaluate::Error::from)?;
        meter.add(prompts, &stored.split(1, 0))?;
        let done = meter.num_prompts() * total / drawing.prompts().count;
        let stopped = ensure_not_stopped(interrupt, done, total, meter.is_kept());
        if stopped.is_err() {
            meter.save()?;
        }
        Ok(stopped?)
    });
    drop(calls);
    let truncated = match drawn {
        Ok(truncated) => truncated,
        Err(Stop::Error(error)) => return Err(error),
        Err(_) => return Ok(None),
    };
    if truncated.prompts > 0 {
        tracing::warn!(
            "{} prompts are longer than the text encoder's input and were truncated",
            truncated.prompts
        );
    }
    if truncated.negative {
        tracing::warn!(
            "--negative-prompt is longer than the text encoder's input and was truncated"
        );
    }
    networks.row(args, prompts, "samples", save_as, meter).map(Some)
}

/// A meter that continues after the rows of an earlier process, and the number of prompts that this measured.
fn meter_after<'a>(
    rows: FeatureRows,
    prompts: &EvaluationPrompts,
    networks: &'a Networks,
) -> (PromptMeter<'a>, u64) {
    let meter = PromptMeter::new(networks.all(), prompts.set.images_per_prompt, rows);
    let before = meter.num_prompts();
    if before > 0 {
        tracing::info!("{before} of {} prompts are measured already", prompts.set.count);
    }
    (meter, before)
}

/// Writes the first few samples, which are drawn again.
fn keep(drawing: &PromptDrawing<'_>, file: &Path) -> anyhow::Result<()> {
    let mut kept = Vec::new();
    let drawn = drawing.for_each(0, &|| (), |_, images| {
        kept.extend(images.split(1, 0));
        if kept.len() < sample_file::KEPT as usize { Ok(()) } else { Err(Stop::Enough) }
    });
    match drawn {
        Err(Stop::Error(error)) => Err(error),
        _ => Ok(sample_file::write_first(file, &Tensor::f_cat(&kept, 0)?)?),
    }
}

/// Ends a measurement between two batches if a stop is requested.
fn ensure_not_stopped(
    interrupt: &Interrupt,
    done: u64,
    total: u64,
    is_kept: bool,
) -> ddil_evaluate::Result<()> {
    if done < total && interrupt.is_requested() {
        let what = "images".to_owned();
        return Err(ddil_evaluate::Error::Stopped { what, done, total, is_kept });
    }
    Ok(())
}

/// Prompts per pass, each with `k` images.
fn prompts_at_once(k: usize) -> usize {
    (IMAGES_AT_ONCE / k.max(1)).max(1)
}

/// The row of images in files, matched with their prompts.
fn files_row(
    args: &EvaluateArgs,
    subject: &Subject,
    files: &ImageFiles,
    prompts: EvaluationPrompts,
    features: &mut Features,
) -> anyhow::Result<Row> {
    let all = prompts.set.count;
    let (prompts, files) = prompts.matched(files).map_err(as_option)?;
    protocol::ensure(args, &prompts)?;
    let k = prompts.set.images_per_prompt;
    if prompts.set.count < all {
        tracing::warn!("only {} of {all} prompts have images", prompts.set.count);
    }
    let networks = Networks::open(args, subject, None, features)?;
    let key = || FeatureKey::of_prompted_files(&files, &prompts.set, networks.all());
    let rows = features.rows(files.len() as u64, key)?;
    let (mut meter, before) = meter_after(rows, &prompts, &networks);
    if let Some(left) = files.skip(before as usize * k as usize) {
        let left_prompts = &prompts.prompts[before as usize..];
        add_files(args, &left, left_prompts, &mut meter, features.interrupt)?;
    }
    let name = args.subject.display().to_string();
    let measurement = networks.row(args, &prompts, &name, Some(&name), meter)?;
    Ok((name, measurement))
}

/// Measures the files that are left, as many for each of the prompts that are left.
fn add_files(
    args: &EvaluateArgs,
    files: &ImageFiles,
    prompts: &[Prompt],
    meter: &mut PromptMeter<'_>,
    interrupt: &Interrupt,
) -> anyhow::Result<()> {
    let k = files.len() / prompts.len().max(1);
    let before = meter.num_prompts() * k as u64;
    let total = before + files.len() as u64;
    let (mut waiting, mut left) = (Vec::new(), prompts);
    let mut progress = Progress::new("images", before, total);
    let at_once = prompts_at_once(k) * k;
    let threads = num_threads(args.sampling.threads);
    files.for_each(threads, Ok::<_, anyhow::Error>, |index, image| {
        protocol::ensure_size(args, [image.size()[2], image.size()[3]])
            .with_context(|| files.paths()[index].display().to_string())?;
        waiting.push(image);
        if waiting.len() < at_once && index + 1 < files.len() {
            return Ok(());
        }
        let (some, rest) = left.split_at(waiting.len() / k);
        meter.add(some, &waiting).map_err(as_option)?;
        (left, waiting) = (rest, Vec::new());
        let done = before + index as u64 + 1;
        progress.update(done, &[]);
        let stopped = ensure_not_stopped(interrupt, done, total, meter.is_kept());
        if stopped.is_err() {
            meter.save()?;
        }
        Ok(stopped?)
    })?;
    progress.finish();
    Ok(())
}

/// The row of samples in files of tensors, in the order of the prompts.
fn samples_row(
    args: &EvaluateArgs,
    subject: &Subject,
    images: &Tensor,
    prompts: EvaluationPrompts,
    features: &mut Features,
) -> anyhow::Result<Row> {
    let (found, count) = (images.size()[0] as u64, prompts.set.count);
    if !found.is_multiple_of(count) {
        bail!(
            "{} has {found} samples for {count} prompts; expected as many for each prompt, in sequence",
            args.subject.display()
        );
    }
    let k = (found / count) as u32;
    let prompts = prompts.with_images_per_prompt(k).map_err(as_option)?;
    protocol::ensure(args, &prompts)?;
    protocol::ensure_size(args, [images.size()[2], images.size()[3]])?;
    let networks = Networks::open(args, subject, None, features)?;
    let stored = quantize(images)?;
    let mut meter = PromptMeter::new(networks.all(), k, FeatureRows::in_memory());
    let at_once = prompts_at_once(k as usize);
    let parts = stored.split(at_once as i64 * i64::from(k), 0);
    for (images, prompts) in parts.iter().zip(prompts.prompts.chunks(at_once)) {
        meter.add(prompts, &images.split(1, 0)).map_err(as_option)?;
    }
    let name = args.subject.display().to_string();
    let measurement = networks.row(args, &prompts, &name, Some(&name), meter)?;
    Ok((name, measurement))
}
