//! `ddil import`.

use std::process::ExitCode;

use anyhow::bail;
use ddil_pipelines::{ModelFiles, Pipeline, WeightForm};
use ddil_trainer::Logging;

use super::export::{parse_bytes, parse_kind, table, warn_of_absent};
use super::{or_forced, print};
use crate::cli::ImportArgs;

/// Single files that contain a whole pipeline, which other programs write.
const SINGLE_FILES: [&str; 5] = ["safetensors", "ckpt", "bin", "pt", "pth"];

pub(crate) fn run(args: &ImportArgs) -> anyhow::Result<ExitCode> {
    Logging::start("info")?;
    let form = WeightForm {
        kind: Some(parse_kind(&args.dtype)?),
        variant: None,
        max_shard_bytes: parse_bytes(&args.max_shard_size)?,
    };
    let parts = open(args)?;
    warn_of_absent(&parts);
    let written = or_forced(parts.write(&args.output, &form, args.force))?;
    if parts.has_default_scheduler() {
        eprintln!(
            "warning: the network has no scheduler; Stable Diffusion's, with noise prediction, was added. Use \
             --scheduler-from to choose another"
        );
    }
    print(&format!(
        "{}, every tensor checked, written as {}\n{}{}\n",
        parts.class().as_str(),
        args.dtype,
        table(&written),
        args.output.display()
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn open(args: &ImportArgs) -> anyhow::Result<ModelFiles> {
    let (source, variant) = (&args.source, args.variant.as_deref());
    let shown = source.display();
    let extension = source.extension().and_then(|end| end.to_str()).unwrap_or_default();
    if source.is_file() && SINGLE_FILES.contains(&extension) {
        bail!(
            "{shown} is a single file without diffusers' tensor names; convert it with diffusers, \
             `StableDiffusionPipeline.from_single_file(file).save_pretrained(folder, safe_serialization=True)`, then \
             import that folder"
        );
    }
    if Pipeline::is_at(source) {
        for (flag, given) in
            [("--scheduler-from", &args.scheduler_from), ("--parts-from", &args.parts_from)]
        {
            if given.is_some() {
                bail!("{flag} requires a network without a pipeline; {shown} is a whole pipeline");
            }
        }
        return Ok(ModelFiles::of_pipeline(source, variant)?);
    }
    if ModelFiles::is_network_at(source) {
        let (others, scheduler) = (args.parts_from.as_deref(), args.scheduler_from.as_deref());
        return Ok(ModelFiles::of_network(source, others, scheduler, variant)?);
    }
    bail!("{shown} is neither a pipeline (model_index.json) nor a network (config.json)")
}
