//! A network that is trained, with its optimizer.

use ddil_losses::Phase;
use tch::Tensor;

use super::{SessionConfig, Task};
use crate::error::{Error, Result};
use crate::lr_schedule::LrSchedule;
use crate::optimizer::{AdamW, AdamWConfig, ensure_finite};

/// How a network is updated.
#[derive(Clone, Debug)]
pub struct UpdateConfig {
    /// The optimizer.
    pub optimizer: AdamWConfig,
    /// The learning rate, over each stage.
    pub learning_rate: LrSchedule,
}

/// The network trained in a phase, with its optimizer.
#[derive(Debug)]
pub(super) struct PhaseOptimizer {
    pub(super) phase: Phase,
    pub(super) optimizer: AdamW,
    learning_rate: LrSchedule,
}

/// The checkpoint member with the parameters of a phase.
pub(super) fn parameters_file(phase: Phase) -> &'static str {
    match phase {
        Phase::Student => "parameters.safetensors",
        Phase::Critic => "critic.safetensors",
    }
}

/// The checkpoint member with the optimizer state of a phase.
pub(super) fn optimizer_file(phase: Phase) -> &'static str {
    match phase {
        Phase::Student => "optimizer.safetensors",
        Phase::Critic => "critic_optimizer.safetensors",
    }
}

/// The values of some scalars on one device, read at once.
fn values(scalars: [&Tensor; 3]) -> Result<[f64; 3]> {
    let read = || Vec::<f64>::try_from(Tensor::f_stack(&scalars, 0)?);
    let values = read().map_err(Error::torch("Trainee::update"))?;
    Ok([values[0], values[1], values[2]])
}

/// The optimizer of a phase.
pub(super) fn find(optimizers: &mut [PhaseOptimizer], phase: Phase) -> Result<&mut PhaseOptimizer> {
    let of_phase = optimizers.iter_mut().find(|optimizer| optimizer.phase == phase);
    of_phase.ok_or(Error::Losses(ddil_losses::Error::Phase { method: "this task", phase }))
}

impl PhaseOptimizer {
    /// The optimizers of all phases of a task, new.
    pub(super) fn all(task: &impl Task, config: &SessionConfig) -> Result<Vec<Self>> {
        let phase_optimizer = |phase: &Phase| {
            let UpdateConfig { optimizer, learning_rate } = match phase {
                Phase::Student => &config.student,
                Phase::Critic => &config.critic,
            };
            Ok(Self {
                phase: *phase,
                optimizer: optimizer.build(task.parameters(*phase))?,
                learning_rate: *learning_rate,
            })
        };
        task.trained().iter().map(phase_optimizer).collect()
    }

    /// From the loss to the optimizer's step; `step` counts the run's updates, `stage_step` the stage's.
    pub(super) fn update(
        &mut self,
        per_sample: &Tensor,
        outputs_sum: Option<&Tensor>,
        step: u64,
        stage_step: u64,
        per_stage: u64,
    ) -> Result<Vec<(String, f64)>> {
        let loss = per_sample.mean(per_sample.kind());
        loss.f_backward().map_err(Error::torch("backward"))?;
        let norm = self.optimizer.clip()?;
        // Read after the whole backward pass has been queued: one wait for the device per phase.
        let [loss, norm, outputs_sum] = values([&loss, &norm, outputs_sum.unwrap_or(&loss)])?;
        let (owner, prefix) = match self.phase {
            Phase::Student => ("", ""),
            Phase::Critic => ("critic's ", "critic_"),
        };
        ensure_finite(step + 1, &format!("{owner}loss"), loss, || None)?;
        let detail = || self.optimizer.non_finite_gradient();
        ensure_finite(step + 1, &format!("{owner}gradient norm"), norm, detail)?;
        ensure_finite(step + 1, "the sum of the networks' outputs", outputs_sum, || None)?;
        let rate = self.learning_rate.lr_at(stage_step, per_stage);
        self.optimizer.step(rate)?;
        let figures = [("loss", loss), ("grad_norm", norm), ("learning_rate", rate)];
        Ok(figures.map(|(name, value)| (format!("{prefix}{name}"), value)).to_vec())
    }
}
