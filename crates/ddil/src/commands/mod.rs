//! One file per verb.

pub(crate) mod compare;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod evaluate;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod init;
pub(crate) mod inspect;
mod model_source;
mod output;
pub(crate) mod range;
pub(crate) mod report;
pub(crate) mod runs;
pub(crate) mod sample;
mod terminal;
pub(crate) mod train;

use std::cell::RefCell;
use std::io::Write as _;
use std::thread;

use crate::exit_code::TRY_AGAIN;
use anyhow::{Context, bail, ensure};
use ddil_evaluate::Monitor;
use ddil_files::settings::Settings;
use ddil_models::Placement;
use ddil_pipelines::{Pipeline, SamplePlan, with_published_solver};
use ddil_schedulers::{ConsistencyBoundary, SamplerConfig, SolverConfig, Thresholding};
use ddil_trainer::config::{Precision, parse_device};
use ddil_trainer::{Interrupt, Logging, Progress, when_stdin_closes};
use serde::Deserialize;
use tch::Kind;

use self::model_source::ModelSource;
use crate::cli::{ParentArgs, SamplingArgs};

/// The number of evenly spaced timesteps from which published latent consistency models choose theirs, as in diffusers.
const LCM_ORIGINAL_STEPS: u32 = 50;

/// Prints to the standard output; a closed pipe, as with `head`, or a closed terminal is not an error.
fn print(text: &str) -> anyhow::Result<()> {
    const CLOSED_TERMINAL: i32 = 5; // EIO
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error)
            if error.kind() == std::io::ErrorKind::BrokenPipe
                || error.raw_os_error() == Some(CLOSED_TERMINAL) =>
        {
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Sets the number of threads, once, before the first operation.
fn set_threads(threads: u32) -> anyhow::Result<()> {
    if threads > 0 {
        ddil_libtorch::set_num_threads(threads as usize)?;
    }
    Ok(())
}

/// Starts the log, and ends the process when its standard input closes, if requested.
fn start(parent: &ParentArgs) -> anyhow::Result<()> {
    Logging::start("info")?;
    if parent.stop_with_stdin {
        // Nothing is left half written: every file is complete or absent.
        when_stdin_closes(|| std::process::exit(i32::from(TRY_AGAIN)));
    }
    Ok(())
}

/// Adds advice to the error about a folder that already exists.
fn or_forced<T>(result: ddil_pipelines::Result<T>) -> anyhow::Result<T> {
    match result {
        Err(ddil_pipelines::Error::FolderNotEmpty { path }) => bail!(
            "{} already exists and is not empty; choose another folder, or overwrite the model in it with --force",
            path.display()
        ),
        other => Ok(other?),
    }
}

/// A progress bar that counts the calls of a network.
struct Calls(RefCell<(Progress, u64)>);

impl Calls {
    /// For `n` samples.
    fn of(label: &str, plan: &SamplePlan, n: u32) -> Self {
        Self::after(label, plan, n, 0)
    }

    /// For `n` samples, the first `done` of which need not be drawn.
    fn after(label: &str, plan: &SamplePlan, n: u32, done: u32) -> Self {
        let done = plan.num_calls(done / plan.batch_size.max(1) * plan.batch_size.max(1));
        Self(RefCell::new((Progress::new(label, done, plan.num_calls(n)), done)))
    }

    /// For this number of calls, the first `done` of which need not be made.
    fn of_number(label: &str, done: u64, calls: u64) -> Self {
        Self(RefCell::new((Progress::new(label, done, calls), done)))
    }

    fn note(&self) {
        let (progress, calls) = &mut *self.0.borrow_mut();
        *calls += 1;
        progress.update(*calls, &[]);
    }
}

/// Stops a measurement when a stop is requested, and shows a bar that counts images.
struct Bar<'a> {
    progress: Option<Progress>,
    /// Whether another bar counts the calls of a network.
    is_hidden: bool,
    interrupt: &'a Interrupt,
}

impl<'a> Bar<'a> {
    fn new(interrupt: &'a Interrupt) -> Self {
        Self { progress: None, is_hidden: false, interrupt }
    }

    fn hidden(interrupt: &'a Interrupt) -> Self {
        Self { is_hidden: true, ..Self::new(interrupt) }
    }
}

impl Monitor for Bar<'_> {
    fn note(&mut self, what: &str, done: u64, total: u64) {
        if !self.is_hidden {
            let progress = self.progress.get_or_insert_with(|| Progress::new(what, done, total));
            progress.update(done, &[]);
        }
    }

    fn should_stop(&self) -> bool {
        self.interrupt.is_requested()
    }
}

/// The number of threads of an option; 0 is one per core.
fn num_threads(option: u32) -> usize {
    match option {
        0 => thread::available_parallelism().map_or(1, usize::from),
        threads => threads as usize,
    }
}

/// Reads a model and its sampling plan.
fn open_model(source: &ModelSource, args: &SamplingArgs) -> anyhow::Result<(Pipeline, SamplePlan)> {
    set_threads(args.threads)?;
    let device = parse_device(&args.device)?;
    let precision = match args.precision.as_str() {
        "float32" => Precision::Float32,
        "bfloat16" => Precision::Bfloat16,
        other => bail!("--precision is `{other}`; expected `float32` or `bfloat16`"),
    };
    let channels_last = match args.memory_format.as_str() {
        "channels_last" => true,
        "contiguous" => false,
        other => bail!("--memory-format is `{other}`; expected `channels_last` or `contiguous`"),
    };
    let placement = Placement { device, kind: Kind::Float, channels_last };
    let mut pipeline = source.open(placement, precision)?;
    match args.sampler.as_deref() {
        None => {}
        Some("lcm") => {
            pipeline.sampler = SamplerConfig::Lcm {
                original_steps: LCM_ORIGINAL_STEPS,
                boundary: ConsistencyBoundary::default(),
            };
        }
        Some("ddim") => pipeline.sampler = SamplerConfig::Ddim { eta: 0.0 },
        Some(other) if solver_named(other).is_some() => ensure_takes_solver(&pipeline, other)?,
        Some(other) => {
            bail!(
                "--sampler is `{other}`; expected `ddim`, `lcm`, `euler`, `dpm-solver` or `uni-pc`"
            )
        }
    }
    let plan = sample_plan(&pipeline, args, args.steps)?;
    Ok((pipeline, plan))
}

/// The solver of a name on the command line.
fn solver_named(name: &str) -> Option<SolverConfig> {
    match name {
        "euler" => Some(SolverConfig::euler()),
        "dpm-solver" => Some(SolverConfig::dpm_solver()),
        "uni-pc" => Some(SolverConfig::uni_pc()),
        _ => None,
    }
}

/// Checks that a model can be sampled with a solver, at any noise level.
fn ensure_takes_solver(pipeline: &Pipeline, name: &str) -> anyhow::Result<()> {
    let is_student = pipeline.timesteps.is_some() || pipeline.sampler.boundary().is_some();
    ensure!(
        !is_student,
        "--sampler {name} is for teachers; this student was trained for its own sampler and timesteps"
    );
    Ok(())
}

/// The solver of the command line, with the spacing of the model's scheduler file; without one, that of the file.
fn with_solver(
    pipeline: &Pipeline,
    args: &SamplingArgs,
    plan: SamplePlan,
) -> anyhow::Result<SamplePlan> {
    let named = args.sampler.as_deref().and_then(solver_named);
    let mut plan = match named {
        Some(solver) => {
            let solver = solver.spaced_as(pipeline.scheduler.common());
            SamplePlan { solver: Some(solver), ..plan }
        }
        None if args.sampler.is_some() || args.eta.is_some() => plan,
        None => with_published_solver(pipeline, plan)
            .context("--sampler `ddim` samples without the solver of the model's file")?,
    };
    if args.karras_sigmas {
        let Some(solver) = plan.solver.take() else {
            bail!("--karras-sigmas is for the samplers `euler`, `dpm-solver` and `uni-pc`");
        };
        plan.solver = Some(solver.with_karras_sigmas());
    }
    Ok(plan)
}

/// The sampling plan of a model for a number of steps; without one, the model's own number.
fn sample_plan(
    pipeline: &Pipeline,
    args: &SamplingArgs,
    steps: Option<u32>,
) -> anyhow::Result<SamplePlan> {
    let mut plan = with_solver(pipeline, args, SamplePlan::of(pipeline, steps))?;
    if let Some(eta) = args.eta {
        ensure!(
            plan.solver.is_none(),
            "--eta is for DDIM; --sampler chooses a solver, which adds no noise"
        );
        ensure!(
            matches!(plan.sampler, SamplerConfig::Ddim { .. }),
            "--eta applies to DDIM only; this model uses the LCM sampler"
        );
        plan.sampler = SamplerConfig::Ddim { eta };
    }
    if let Some(text) = &args.thresholding {
        plan.thresholding = parse_thresholding(text)?;
    }
    plan.guidance_scale = args.guidance_scale.unwrap_or(plan.guidance_scale);
    plan.batch_size = args.batch_size.unwrap_or(plan.batch_size);
    ensure!(plan.batch_size > 0, "--batch-size is 0; expected at least 1");
    plan.seed = args.seed;
    Ok(plan)
}

/// `none`, or a table as in a config file.
fn parse_thresholding(text: &str) -> anyhow::Result<Thresholding> {
    #[derive(Deserialize)]
    struct Table {
        thresholding: Thresholding,
    }
    let is_word = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let value = if is_word { format!("{{ kind = \"{text}\" }}") } else { text.to_owned() };
    let table = Settings::parse("--thresholding", format!("thresholding = {value}"))
        .and_then(|settings| settings.build::<Table>());
    let expected = "--thresholding: expected `none` or a table such as { kind = \"clamp\", low = -1, high = 1 }";
    Ok(table.context(expected)?.thresholding)
}
