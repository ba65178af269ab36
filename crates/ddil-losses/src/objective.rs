//! What every distillation method can be asked.

use ddil_core::{Denoiser, States};
use ddil_schedulers::{NoiseSchedule, Timesteps};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::Result;
use crate::progressive::{Progressive, ProgressiveConfig};

/// Who is trained in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The student.
    Student,
    /// The critics of a method that has some.
    Critic,
}

/// The networks that a method may ask, as they are to be asked: the teacher with its guidance and thresholding
/// around it, the student bare.
///
/// A student whose prediction is held inside the data's range gets no gradient beyond it, where the correction is
/// wanted most; so it is not to be wrapped here.
#[derive(Clone, Copy)]
pub struct Networks<'a> {
    /// The learner; its prediction gets a gradient.
    pub student: &'a dyn Denoiser,
    /// The expert; asked without gradients.
    pub teacher: &'a dyn Denoiser,
}

/// What a method has to say of a batch of states.
#[derive(Debug)]
pub struct LossTerms {
    /// The loss of each sample, `[batch]`, with the graph behind it.
    pub per_sample: Tensor,
    /// The clean data that the student predicted, `[batch, ..]`, without a graph: what its next state is made of.
    pub student_x0: Tensor,
    /// The teacher's state at the student's next timestep, `[batch, ..]`, for methods whose teacher gets there.
    pub teacher_next: Option<Tensor>,
    /// What the student should have predicted, `[batch, ..]`, without a graph.
    pub target: Tensor,
}

/// A distillation method: which networks it asks, in what order, and what it makes of the answers.
///
/// Makes gradients and steps no optimizer. Outside of this crate, implement it and pass a reference: nothing else
/// needs to know.
pub trait Objective: std::fmt::Debug {
    /// Who is trained in step `step`, counted from 0.
    fn phase(&self, step: u64) -> Phase;

    /// The loss of `states` in `phase` of step `step`.
    ///
    /// # Shapes and units
    ///
    /// - `states`: `[batch, ..]` at timesteps of the student's grid, mixed within the batch
    ///
    /// # Errors
    ///
    /// [`Error::OffGrid`](crate::Error::OffGrid) for states off the student's grid,
    /// [`Error::SchedulesDiffer`](crate::Error::SchedulesDiffer) for networks of another schedule,
    /// [`Error::Phase`](crate::Error::Phase) for a phase that the method does not have, and what the networks say.
    fn loss(
        &self,
        step: u64,
        phase: Phase,
        states: &States,
        networks: &Networks<'_>,
    ) -> Result<LossTerms>;
}

/// The `objective` part of a config file: a method by name, with its settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum ObjectiveConfig {
    /// Progressive distillation.
    Progressive(ProgressiveConfig),
}

impl Default for ObjectiveConfig {
    fn default() -> Self {
        Self::Progressive(ProgressiveConfig::default())
    }
}

impl ObjectiveConfig {
    /// Checks the settings and builds the method for a student that visits `grid`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first setting that cannot be.
    pub fn build(&self, schedule: &NoiseSchedule, grid: &Timesteps) -> Result<Box<dyn Objective>> {
        match self {
            Self::Progressive(config) => {
                Ok(Box::new(Progressive::new(config.clone(), schedule.clone(), grid.clone())?))
            }
        }
    }

    /// The name of the method, as in config files and logs.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Progressive(_) => "progressive",
        }
    }
}
