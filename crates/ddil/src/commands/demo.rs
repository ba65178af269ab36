//! `ddil demo`: the whole method on real data.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use crate::compare::setting::TeacherSamples;
use crate::results::{shift_table, table};
use anyhow::{Context, bail, ensure};
use ddil_core::{Conditioning, PriorSchedule, Priors};
use ddil_data::FashionMnist;
use ddil_evaluate::{
    Measurement, all_images, draw, features_as_stored, reference_of_images, score, shift,
};
use ddil_files::settings::Settings;
use ddil_metrics::FashionClassifier;
use ddil_models::Placement;
use ddil_pipelines::{Guidance, Image, Pipeline, SamplePlan, generate, initial_noise, layout};
use ddil_schedulers::SamplerConfig;
use ddil_trainer::config::DistillConfig;
use ddil_trainer::run_folder::RunFolder;
use ddil_trainer::{Interrupt, Logging, Outcome};
use tch::{Device, Kind, Tensor};

use super::evaluate::data_row;
use super::train::distil;
use super::{print, set_threads};
use crate::cli::DemoArgs;
use crate::presets;

/// One student of the demonstration.
struct Arm {
    name: &'static str,
    about: &'static str,
    config: DistillConfig,
}

/// A model, how it is sampled, and its name in the table.
struct Candidate {
    name: String,
    pipeline: Pipeline,
    plan: SamplePlan,
    is_student: bool,
}

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.num_samples >= 20, "--num-samples is {}; expected at least 20", args.num_samples);
    if let Some(missing) = presets::missing_teacher(&args.teacher) {
        bail!("{missing}");
    }
    let logging = Logging::start("info")?;
    let interrupt = Interrupt::listen()?;
    if args.fresh && args.folder.exists() {
        fs::remove_dir_all(&args.folder)
            .with_context(|| format!("could not remove {}", args.folder.display()))?;
    }
    let arms = arms(args)?;
    set_threads(arms[0].config.run.threads)?;
    let started = Instant::now();
    for arm in &arms {
        print(&format!("\n{}: {}\n", arm.name, arm.about))?;
        if !train(arm, &logging, &interrupt)? {
            print("stopped; run the same command to continue\n")?;
            return Ok(ExitCode::SUCCESS);
        }
    }
    let candidates = candidates(&arms)?;
    let rows = measure(&candidates, args.num_samples)?;
    write_outputs(&args.folder, &candidates, &rows)?;
    print(&report(&args.folder, &rows, started.elapsed().as_secs_f64()))?;
    Ok(ExitCode::SUCCESS)
}

/// The same config twice, with different priors.
fn arms(args: &DemoArgs) -> anyhow::Result<[Arm; 2]> {
    let preset = presets::find("fashion-mnist-pd-ddil").context("the demonstration's preset")?;
    let mut settings = Settings::parse("fashion-mnist-pd-ddil.toml", preset.text)?;
    for text in &args.overrides {
        settings.set(text)?;
    }
    let mut ddil: DistillConfig = settings.build()?;
    ddil.run.folder.clone_from(&args.folder);
    ddil.teacher.path.clone_from(&args.teacher);
    let mut base = ddil.clone();
    base.mixing.priors = PriorSchedule::constant(Priors::FORWARD_ONLY);
    "base".clone_into(&mut base.run.name);
    "ddil".clone_into(&mut ddil.run.name);
    Ok([
        Arm {
            name: "base",
            about: "progressive distillation on noised dataset samples only",
            config: base,
        },
        Arm {
            name: "ddil",
            about: "the same, on a mix of dataset, student and teacher states",
            config: ddil,
        },
    ])
}

/// Trains a student, or resumes it; false if it was asked to stop.
fn train(arm: &Arm, logging: &Logging, interrupt: &Interrupt) -> anyhow::Result<bool> {
    let (config, path) = (&arm.config, arm.config.run.path());
    if path.join("config.toml").is_file() {
        RunFolder::ensure_config_at(&path, config).context("use --fresh to start the demo over")?;
    }
    Ok(matches!(distil(config, logging, interrupt)?, Outcome::Completed { .. }))
}

/// The teacher at 50 steps and at the students' steps, unguided at 50, and both students.
fn candidates(arms: &[Arm; 2]) -> anyhow::Result<Vec<Candidate>> {
    let config = &arms[0].config;
    let device = config.run.device()?;
    let placement =
        Placement { device, kind: Kind::Float, channels_last: config.run.channels_last };
    let scale = TeacherSamples::target_scale(config.teacher.guidance);
    let plan = |steps: u32, guidance_scale: f64, timesteps: Option<Vec<i64>>| SamplePlan {
        steps,
        guidance_scale,
        sampler: SamplerConfig::Ddim { eta: 0.0 },
        solver: None,
        thresholding: config.thresholding.clone(),
        timesteps,
        batch_size: 100,
        seed: config.run.seed,
    };
    let read = |path: &Path| Pipeline::open(path, placement, config.run.precision);
    let teacher = || read(&config.teacher.path);
    let few = config.student.stages.last().copied().unwrap_or(1);
    let mut candidates = Vec::new();
    for (steps, scale) in [(50, 1.0), (50, scale), (few, scale)] {
        candidates.push(Candidate {
            name: format!("teacher, guidance {scale}"),
            pipeline: teacher()?,
            plan: plan(steps, scale, None),
            is_student: false,
        });
    }
    for arm in arms {
        let pipeline = read(&arm.config.run.path())?;
        let plan = plan(few, 1.0, pipeline.timesteps.clone());
        let name = format!("student, {}", arm.name);
        candidates.push(Candidate { name, pipeline, plan, is_student: true });
    }
    Ok(candidates)
}

/// The number of states on each side of the shift.
const SHIFT_STATES: u32 = 1000;

fn measure(candidates: &[Candidate], n: u32) -> anyhow::Result<Vec<(String, Measurement)>> {
    let extractor = FashionClassifier::pretrained(Device::Cpu)?;
    let data = FashionMnist::from_folder(None)?;
    let reference =
        reference_of_images("fashion_mnist/test", &all_images(&data.test)?, &extractor)?;
    let mut rows = vec![data_row(&data.train, n, &reference, &extractor)?];
    let mut images = Vec::new();
    for Candidate { name, pipeline, plan, .. } in candidates {
        tracing::info!("sampling {n} images: {name}, {} steps", plan.steps);
        images.push(draw(pipeline, plan, n, 0..n)?);
    }
    // The second candidate is what the students were trained to match: the guided teacher at its full number of steps.
    let target = reference_of_images("teacher", &images[1], &extractor)?;
    for (candidate, images) in candidates.iter().zip(&images) {
        let Candidate { name, pipeline, plan, is_student } = candidate;
        let features = features_as_stored(images, &extractor)?;
        let scores = score(&reference, &features)?;
        let mut measurement =
            Measurement::of("", &scores, &reference, &extractor).of_model(&pipeline.card, plan);
        measurement.frechet_to_teacher = Some(score(&target, &features)?.frechet);
        if *is_student {
            measurement.shift = shift(pipeline, plan, &data.train, SHIFT_STATES)?;
        }
        rows.push((name.clone(), measurement));
    }
    Ok(rows)
}

fn write_outputs(
    folder: &Path,
    candidates: &[Candidate],
    rows: &[(String, Measurement)],
) -> anyhow::Result<()> {
    let measurements = rows.iter().map(|(_, measurement)| measurement);
    Measurement::write_all(&folder.join("results.json"), measurements)?;
    side_by_side(candidates)?.save(&grid_path(folder))?;
    Ok(())
}

/// One row per model, two columns per class, the same noise in each column.
fn side_by_side(candidates: &[Candidate]) -> anyhow::Result<Image> {
    const COLUMNS: u32 = 20;
    let mut rows = Vec::new();
    for Candidate { pipeline, plan, .. } in candidates {
        let device = pipeline.network.placement().device;
        let noise = initial_noise(plan.seed, COLUMNS, pipeline.card.image_shape, device)?;
        let labels = Tensor::arange(i64::from(COLUMNS), (Kind::Int64, device));
        let labels = labels.divide_scalar_mode(2, "floor").to_kind(Kind::Int64);
        let conditioning = Conditioning::class_labels(labels);
        let images = generate(
            &pipeline.network,
            plan,
            &Guidance::of_classes(&pipeline.card),
            &noise,
            &conditioning,
        )?;
        rows.push(images.to_device(Device::Cpu));
    }
    Ok(Image::grid(&Tensor::f_cat(&rows, 0)?, layout(COLUMNS))?)
}

fn grid_path(folder: &Path) -> PathBuf {
    folder.join("side_by_side.png")
}

fn report(folder: &Path, rows: &[(String, Measurement)], seconds: f64) -> String {
    let (table, shift, grid) = (table(rows), shift_table(rows), grid_path(folder));
    let (grid, results) = (grid.display(), folder.join("results.json"));
    let (folder, results) = (folder.display(), results.display());
    format!(
        "
{table}
frechet: distance to the test images; `to teacher`: distance to the guided teacher at 50 steps;
`data`: as many training images. Differences smaller than the value of `data` mean nothing.

Shift: energy distance between the states visited at inference and noised data

{shift}
in {seconds:.0} s

  {grid}   rows: teacher (3), base, ddil; the same noise in each column
  {results}

Next:
  ddil sample {folder}/ddil --num-samples 100
  ddil init fashion-mnist-pd-ddil    # writes a config to start from
"
    )
}
