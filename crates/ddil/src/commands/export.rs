//! `ddil export`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use ddil_core::Denoiser;
use ddil_models::{
    Error as ModelsError, Lora, LoraFormat, Model, ModelConfig, NetworkConfig, Placement,
    Precision, UNet2DConditionConfig, UnknownKeys,
};
use ddil_pipelines::{
    Card, ModelFiles, PartSummary, Pipeline, Scheduler, WeightForm, model_card, write_model_card,
};
use ddil_schedulers::Timesteps;
use ddil_trainer::Logging;
use ddil_trainer::checkpoint::find_latest;
use tch::Kind;

use super::output::{WEIGHTS, ensure_writable};
use super::{or_forced, print};
use crate::cli::ExportArgs;

/// The value of `--lora` that writes a whole model.
const MERGED: &str = "merged";

pub(crate) fn run(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    Logging::start("info")?;
    if args.source.is_file() {
        return adapters(args, &args.source, args.base.as_deref());
    }
    if let Some((file, base)) = Pipeline::adapter_at(&args.source)? {
        print_exported_step(&args.source)?;
        if args.lora.as_deref() == Some(MERGED) {
            return merged(args);
        }
        return adapters(args, &file, Some(args.base.as_ref().unwrap_or(&base)));
    }
    ensure!(
        args.lora.is_none(),
        "--lora requires a file of adapters; {} is not one",
        args.source.display()
    );
    ensure!(
        args.base.is_none(),
        "--base requires a file of adapters; {} is not one",
        args.source.display()
    );
    print_exported_step(&args.source)?;
    let form = form(args)?;
    let parts = ModelFiles::of_pipeline(&args.source, None)
        .with_context(|| format!("{} cannot be exported", args.source.display()))?;
    warn_of_absent(&parts);
    match args.format.as_str() {
        "diffusers" => {
            let written = or_forced(parts.write(&args.output, &form, args.force))?;
            print(&format!("{}{}\n", table(&written), args.output.display()))?;
            print_model_card(&args.output)?;
        }
        "single-file-unet" => {
            ensure!(
                form.variant.is_none(),
                "--variant requires --format diffusers; for a single file, choose the name yourself"
            );
            ensure_writable(&args.output, args.force, &WEIGHTS)?;
            parts.write_network(&args.output, form.kind)?;
            print(&format!("the network in one file: {}\n", args.output.display()))?;
        }
        other => bail!("--format is `{other}`; expected `diffusers` or `single-file-unet`"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Names the parts that the source lists but does not contain.
pub(super) fn warn_of_absent(parts: &ModelFiles) {
    if !parts.absent_parts().is_empty() {
        eprintln!(
            "warning: the source lists {} but does not contain it; the part is of no use to ddil and is written as absent",
            parts.absent_parts().join(", ")
        );
    }
}

/// Writes `README.md` and prints its program.
fn print_model_card(folder: &Path) -> anyhow::Result<()> {
    let path = write_model_card(folder)?;
    let card = model_card(folder)?;
    let code = card.split("```").nth(1).unwrap_or_default();
    let code = code.trim_start_matches("python\n").replace('\n', "\n  ");
    print(&format!("\nwith diffusers ({}):\n\n  {}\n", path.display(), code.trim_end()))
}

/// Returns the step of a run's model, or an error if the run has no model yet.
fn print_exported_step(source: &Path) -> anyhow::Result<()> {
    if !source.join("status.json").is_file() {
        return Ok(());
    }
    let latest = find_latest(&source.join("checkpoints"))?.checkpoint;
    let Some(latest) = latest else {
        bail!("{} has no checkpoint yet, so there is no model to export", source.display());
    };
    ensure!(
        Pipeline::is_at(source),
        "{} has a checkpoint, but no exported model; `ddil distill --resume` writes it",
        source.display()
    );
    eprintln!("exporting the moving average at step {}", latest.step());
    Ok(())
}

/// The whole model of an adapter, with the adapter merged into the weights.
fn merged(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.base.is_none(), "--base: the folder of the adapter names its base");
    ensure!(args.format == "diffusers", "--lora {MERGED} requires --format diffusers");
    let pipeline = Pipeline::open(&args.source, Placement::default(), Precision::Float32)?;
    let timesteps = pipeline.timesteps.clone().map(|list| {
        Timesteps::explicit(list, pipeline.network.schedule().num_train_timesteps() as u32)
    });
    let (sampler, thresholding) = (pipeline.sampler, &pipeline.thresholding);
    let timesteps = timesteps.transpose()?;
    let scheduler = Scheduler::new(&pipeline.network, sampler, thresholding, timesteps.as_ref())?;
    let card = Card { adapter: None, ..pipeline.card.clone() };
    // Written as it is, then in the form of the options.
    let parent = ddil_files::parent(&args.output);
    let whole = tempfile::Builder::new().prefix(ddil_files::TEMPORARY).tempdir_in(parent)?;
    Pipeline::write(whole.path(), &pipeline.network, &scheduler, &card, Some(&pipeline.parts))?;
    let parts = ModelFiles::of_pipeline(whole.path(), None)?;
    let written = or_forced(parts.write(&args.output, &form(args)?, args.force))?;
    print(&format!("{}{}\n", table(&written), args.output.display()))?;
    print_model_card(&args.output)?;
    Ok(ExitCode::SUCCESS)
}

/// The form of written weights.
fn form(args: &ExportArgs) -> anyhow::Result<WeightForm> {
    Ok(WeightForm {
        kind: args.dtype.as_deref().map(parse_kind).transpose()?,
        variant: args.variant.clone(),
        max_shard_bytes: parse_bytes(&args.max_shard_size)?,
    })
}

/// Converts adapters to the names of another format.
fn adapters(args: &ExportArgs, file: &Path, base: Option<&Path>) -> anyhow::Result<ExitCode> {
    let source = file.display();
    let format = match args.lora.as_deref() {
        Some("diffusers") => LoraFormat::Diffusers,
        Some("kohya") => LoraFormat::Kohya,
        Some(MERGED) => bail!(
            "--lora {MERGED} requires the run or model folder of an adapter, which names its base; {source} is a file"
        ),
        Some(other) => bail!("--lora is `{other}`; expected `diffusers`, `kohya` or `{MERGED}`"),
        None => bail!(
            "{source} contains adapters; choose their names with --lora diffusers or --lora kohya, or write the whole \
             model with --lora {MERGED}"
        ),
    };
    for (flag, given) in [("--dtype", args.dtype.is_some()), ("--variant", args.variant.is_some())]
    {
        ensure!(!given, "{flag} applies to models only; adapters are written unchanged");
    }
    ensure_writable(&args.output, args.force, &WEIGHTS)?;
    let (lora, _) = read_adapters(file, base)?;
    lora.save(&args.output, format)?;
    if !lora.ignored().is_empty() {
        eprintln!(
            "warning: {} tensors are adapters of text encoders and were not written",
            lora.ignored().len()
        );
    }
    print(&format!("{} adapters: {}\n", lora.layers().len(), args.output.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The adapters of a file on a network without values, and the name of that: the given model, or the first known one
/// that they fit.
pub(super) fn read_adapters(path: &Path, base: Option<&Path>) -> anyhow::Result<(Lora, String)> {
    if let Some(base) = base {
        let places = ["config.json", "unet/config.json", "export/unet/config.json"];
        let found = places.iter().map(|place| base.join(place)).find(|place| place.is_file());
        let Some(config) = found else { bail!("--base: {} contains no model", base.display()) };
        let network =
            ModelConfig::from_file(config, UnknownKeys::IgnoreForeign)?.without_values()?;
        return Ok((Lora::from_file(network.parameters(), path)?, base.display().to_string()));
    }
    let known = [
        ("Stable Diffusion 1.5", UNet2DConditionConfig::sd15()),
        ("Stable Diffusion 2.1", UNet2DConditionConfig::sd21()),
        ("Stable Diffusion XL", UNet2DConditionConfig::sdxl()),
        ("SSD-1B", UNet2DConditionConfig::ssd_1b()),
    ];
    for (name, config) in known {
        let network = Model::UNet2DCondition(config.without_values()?);
        match Lora::from_file(network.parameters(), path) {
            Err(ModelsError::WeightsMismatch { .. }) => {}
            read => return Ok((read?, name.to_owned())),
        }
    }
    bail!(
        "the adapters of {} fit none of Stable Diffusion 1.5, 2.1, XL and SSD-1B; set --base to their model",
        path.display()
    )
}

/// `float32`, `float16` or `bfloat16`.
pub(super) fn parse_kind(name: &str) -> anyhow::Result<Kind> {
    Ok(match name {
        "float32" => Kind::Float,
        "float16" => Kind::Half,
        "bfloat16" => Kind::BFloat16,
        other => bail!("--dtype is `{other}`; expected `float32`, `float16` or `bfloat16`"),
    })
}

/// A number of bytes with one of diffusers' units, as in `5GB`.
pub(super) fn parse_bytes(text: &str) -> anyhow::Result<u64> {
    let units = [("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1000), ("", 1)];
    let bytes = units.iter().find_map(|(unit, factor)| {
        let number = text.strip_suffix(unit)?.trim().parse::<u64>().ok()?;
        number.checked_mul(*factor)
    });
    match bytes {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => bail!("--max-shard-size is `{text}`; expected a number such as 500MB or 5GB"),
    }
}

/// One line per part.
pub(super) fn table(parts: &[PartSummary]) -> String {
    let lines = parts.iter().map(|part| {
        let count = part.parameters.map_or(String::new(), |n| format!("{n} values"));
        let kinds = part.kinds.join(", ");
        let variant = part.variant.as_ref().map_or(String::new(), |v| format!(", variant {v}"));
        let line = format!("  {:<18} {:<30} {count} {kinds}{variant}", part.name, part.class);
        line.trim_end().to_owned() + "\n"
    });
    lines.collect()
}
