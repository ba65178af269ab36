//! The distance between the states of training and those visited at inference.

use ddil_core::{
    Conditioning, Data, Denoiser, RandomStreams, ShiftConfig, ShiftRequest, measure_shift,
};
use ddil_data::ImageDataset;
use ddil_pipelines::{Guidance, Pipeline, SamplePlan, sampling_denoiser};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The covariate shift at one timestep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShiftRow {
    /// The timestep.
    pub timestep: i64,
    /// Energy distance between the states of training and those visited at inference.
    pub energy: f64,
    /// The same between two halves of the forward states: the value due to chance alone.
    pub null: f64,
}

/// The distance between the states that a student visits and noised data, at each of its timesteps.
///
/// At each timestep, `states` images represent training and as many others chance; fewer if the dataset is smaller.
///
/// # Errors
///
/// Errors of the network; fewer than four images.
pub fn shift(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    images: &ImageDataset,
    states: u32,
) -> Result<Vec<ShiftRow>> {
    let device = pipeline.network.placement().device;
    let batch = images.range(0, 2 * i64::from(states))?;
    let labels = batch.labels.filter(|_| pipeline.network.is_class_conditional());
    let conditioning = labels.map_or_else(Conditioning::none, Conditioning::class_labels);
    let data = Data::new(batch.x0).with_conditioning(conditioning).to_device(device)?;
    let guidance = Guidance::of_classes(&pipeline.card);
    let student = sampling_denoiser(&pipeline.network, plan, &guidance)?;
    let schedule = pipeline.network.schedule().clone();
    let timesteps = plan.timesteps(schedule.num_train_timesteps() as u32)?;
    let sampler = plan.sampler.build(&schedule)?;
    let streams = RandomStreams::new(plan.seed, 0);
    let request = ShiftRequest::new(&data, &*student, &*sampler, &timesteps, streams);
    let report = measure_shift(&request, &ShiftConfig::default())?;
    let rows = report.timesteps.iter().map(|at| ShiftRow {
        timestep: at.timestep,
        energy: at.shift.energy,
        null: at.null.energy,
    });
    Ok(rows.collect())
}
