//! The inputs that a mixer and its sources share: the step, the networks and the results of the loss.

use tch::Tensor;

use crate::denoiser::Denoiser;
use crate::random::RandomStreams;

/// The step of the run at which a batch is made, and its random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Clock {
    /// Number of student updates so far.
    pub step: u64,
    /// Number of student updates in the whole run or stage; priors follow `step / total_steps`.
    pub total_steps: u64,
    /// Random numbers, which depend only on the step.
    pub streams: RandomStreams,
}

impl Clock {
    /// The step `step` of a run or stage of `total_steps`.
    pub fn new(step: u64, total_steps: u64, streams: RandomStreams) -> Self {
        Self { step, total_steps, streams }
    }
}

/// The networks for rollouts, as used for sampling: guided, [`Thresholded`](crate::Thresholded) and with their
/// boundary.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct RolloutNetworks<'a> {
    /// The student, with the weights used for sampling.
    pub student: &'a dyn Denoiser,
    /// The teacher, with the guidance used for its labels.
    pub teacher: &'a dyn Denoiser,
}

impl<'a> RolloutNetworks<'a> {
    /// A student and its teacher.
    pub fn new(student: &'a dyn Denoiser, teacher: &'a dyn Denoiser) -> Self {
        Self { student, teacher }
    }
}

impl std::fmt::Debug for RolloutNetworks<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RolloutNetworks").finish_non_exhaustive()
    }
}

/// Results of the loss for a batch: chains continue from its estimates, adaptive priors read its losses.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Feedback<'a> {
    /// The student's clean estimates, shaped like `states.x_t`, thresholded as in rollouts.
    pub student_x0: &'a Tensor,
    /// The teacher's states at the next grid index, shaped like `states.x_t`, if the loss computes them.
    pub teacher_next: Option<&'a Tensor>,
    /// Loss per state, `[batch]`; read by adaptive priors that follow the loss ratio.
    pub losses: Option<&'a Tensor>,
}

impl<'a> Feedback<'a> {
    /// Only the student's clean estimates.
    pub fn new(student_x0: &'a Tensor) -> Self {
        Self { student_x0, teacher_next: None, losses: None }
    }

    /// The same with the teacher's next states, if there are any.
    #[must_use]
    pub fn with_teacher_next(self, teacher_next: Option<&'a Tensor>) -> Self {
        Self { teacher_next, ..self }
    }

    /// The same with the losses, if there are any.
    #[must_use]
    pub fn with_losses(self, losses: Option<&'a Tensor>) -> Self {
        Self { losses, ..self }
    }
}
