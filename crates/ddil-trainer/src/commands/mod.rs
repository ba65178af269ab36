//! One file a verb.

pub(crate) mod compare;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod evaluate;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod range;
pub(crate) mod sample;
pub(crate) mod train;

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use ddil_models::Placement;
use ddil_schedulers::ConsistencyBoundary;
use ddil_trainer::config::{Precision, parse_device};
use ddil_trainer::pipeline::Pipeline;
use ddil_trainer::sampler::SamplerKind;
use ddil_trainer::sampling::SamplePlan;
use tch::Kind;

use crate::cli::SamplingArgs;

/// The number of even timesteps that published latent consistency models choose theirs from, as diffusers has it.
const LCM_ORIGINAL_STEPS: u32 = 50;

/// Prints to the standard output; a reader that has seen enough, such as `head`, is no error.
fn say(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
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

/// Reads a model and says how its samples are to be drawn.
fn open_model(path: &Path, args: &SamplingArgs) -> anyhow::Result<(Pipeline, SamplePlan)> {
    set_threads(args.threads)?;
    let device = parse_device(&args.device)?;
    let precision = match args.precision.as_str() {
        "float32" => Precision::Float32,
        "bfloat16" => Precision::Bfloat16,
        other => bail!("--precision is `{other}`; expected `float32` or `bfloat16`"),
    };
    let placement = Placement { device, kind: Kind::Float, channels_last: true };
    let mut pipeline = Pipeline::read(path, placement, precision)
        .with_context(|| format!("no model could be read from {}", path.display()))?;
    pipeline.sampler = match args.sampler.as_deref() {
        None => pipeline.sampler,
        Some("ddim") => SamplerKind::Ddim { eta: 0.0 },
        Some("lcm") => SamplerKind::Lcm {
            original_steps: LCM_ORIGINAL_STEPS,
            boundary: ConsistencyBoundary::default(),
        },
        Some(other) => bail!("--sampler is `{other}`; expected `ddim` or `lcm`"),
    };
    let mut plan = SamplePlan::of(&pipeline, args.steps);
    if let Some(eta) = args.eta {
        ensure!(
            matches!(plan.sampler, SamplerKind::Ddim { .. }),
            "--eta is for DDIM; this model is sampled as latent consistency models are"
        );
        plan.sampler = SamplerKind::Ddim { eta };
    }
    plan.guidance_scale = args.guidance_scale.unwrap_or(plan.guidance_scale);
    plan.batch_size = args.batch_size.unwrap_or(plan.batch_size);
    ensure!(plan.batch_size > 0, "--batch-size is 0; expected at least 1");
    plan.seed = args.seed;
    Ok((pipeline, plan))
}
