//! What differs between stages.

use std::path::Path;

use ddil_core::{Mixer, RandomStreams, Stream, StudentPolicy};
use ddil_losses::{Objective, TeacherGuidance};
use ddil_schedulers::{NoiseSchedule, Timesteps};

use super::spilling;
use crate::config::DistillConfig;
use crate::error::Result;

/// The step grid, the method and the mixer of a stage.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) index: usize,
    /// The timesteps at which the student is sampled.
    pub(super) sampling: Timesteps,
    pub(super) objective: Box<dyn Objective>,
    pub(super) mixer: Mixer,
    pub(super) guidance: TeacherGuidance,
    /// The mixer counts its steps within the stage, as priors do; its random draws differ from stage to stage.
    pub(super) streams: RandomStreams,
}

impl Stage {
    /// The stage of that index, for a run in the folder `run`.
    pub(super) fn new(
        config: &DistillConfig,
        schedule: &NoiseSchedule,
        index: usize,
        run: &Path,
    ) -> Result<Self> {
        let steps = config.student.stages[index];
        let training = config.objective.training_grid(schedule, steps)?;
        let sampling = config.objective.sampling_grid(schedule, steps)?;
        let objective = config.objective.build(schedule, &training)?;
        let mut mixer = spilling::mixing(config, run);
        if training != sampling && mixer.student.policy == StudentPolicy::default() {
            // The default, chains, requires a student that is sampled where it is trained.
            tracing::info!(
                "mixing.student.policy is `fresh`: {} trains between the timesteps of sampling, where there are no \
                 chains",
                config.objective.as_str()
            );
            mixer.student.policy = StudentPolicy::Fresh;
        }
        let sampler = config.objective.sampler_config(schedule).build(schedule)?;
        let mixer = Mixer::with_rollout(mixer, training, sampling.clone(), sampler)?;
        let guidance = match (index, config.teacher.guidance) {
            (0, guidance) => guidance,
            // The first student has learned guided outputs, or takes the guidance weight as an input.
            (_, guidance) => guidance.of_student(),
        };
        let streams = stage_streams(config.run.seed, index);
        Ok(Self { index, sampling, objective, mixer, guidance, streams })
    }
}

/// The index of the stage that a checkpoint after so many updates belongs to. At the boundary of two stages this is the
/// first: the second starts with its first update.
pub(super) fn index_after(config: &DistillConfig, updates: u64) -> usize {
    (updates.saturating_sub(1) / config.student.updates_per_stage.max(1)) as usize
}

/// The run's own random streams in the first stage, others in each later one.
fn stage_streams(seed: u64, index: usize) -> RandomStreams {
    let streams = RandomStreams::new(seed, 0);
    match index {
        0 => streams,
        _ => RandomStreams::new(streams.seed_of(index as u64, Stream::Weights), 0),
    }
}
