//! The averaged student of a checkpoint, without data and without the state of a run.

use ddil_core::Denoiser;
use ddil_files::Invalid;
use ddil_pipelines::Pipeline;
use tch::Tensor;

use super::{scheduler, stage};
use crate::config::{DistillConfig, LoraSection};
use crate::error::Result;
use crate::state;

/// Restores the moving average of a run after `updates` updates into the exported model of the run, with the timesteps of
/// the stage that it belongs to.
pub(crate) fn restore_average(
    config: &DistillConfig,
    export: Pipeline,
    average: &[(String, Tensor)],
    updates: u64,
) -> Result<Pipeline> {
    let network = &export.network;
    match &config.student.lora {
        None => state::restore("moving average", &network.parameters().learned(), average)?,
        Some(lora) => {
            let merged = merged(config, lora, &export, average)?;
            state::restore("moving average", &network.parameters().named(), &merged)?;
        }
    }
    let schedule = network.schedule();
    let stages = &config.student.stages;
    let Some(steps) = stages.get(stage::index_after(config, updates)) else {
        let expected = format!("at least {updates}, the updates of the checkpoint");
        return Err(
            Invalid::new("student.updates_per_stage", config.total_updates(), expected).into()
        );
    };
    let sampling = config.objective.sampling_grid(schedule, *steps)?;
    let scheduler = scheduler(config, schedule, &sampling, network)?;
    Ok(export.with_scheduler(&scheduler))
}

/// The weights of the teacher with the averaged adapter merged.
fn merged(
    config: &DistillConfig,
    lora: &LoraSection,
    export: &Pipeline,
    average: &[(String, Tensor)],
) -> Result<Vec<(String, Tensor)>> {
    let base = export.card.adapter.as_ref().map(|adapter| &adapter.base);
    let path = base.unwrap_or(&config.teacher.path);
    if !Pipeline::is_at(path) {
        let expected = "the model on which the adapter was trained; a relative path is one from the folder in which the run \
                        was started";
        return Err(Invalid::new("teacher.path", path.display(), expected).into());
    }
    let (placement, precision) = (export.network.placement(), config.run.precision);
    let teacher = Pipeline::open(path, placement, precision)?.network;
    let adapter = lora.on(teacher.parameters());
    let (_, student) = teacher.with_adapter(&adapter, config.run.seed)?;
    state::restore("moving average", &student.parameters().learned(), average)?;
    Ok(student.weights()?)
}
