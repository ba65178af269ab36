//! The interface of a distillation method.

use ddil_core::{Data, Denoiser, Discriminator, RandomStreams, States};
use ddil_schedulers::NoiseSchedule;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::phase::Phase;

/// The networks of a method: the teacher wrapped in its guidance and thresholding, the student bare.
///
/// A thresholded student receives no gradient outside of the data's range, where it needs correction most. Do not
/// wrap it here.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Networks<'a> {
    /// The network in training; evaluated with gradients.
    pub student: &'a dyn Denoiser,
    /// The network it learns from; evaluated without gradients.
    pub teacher: &'a dyn Denoiser,
    /// A moving average of the student, for methods that compare the student with it; evaluated without gradients.
    pub target: Option<&'a dyn Denoiser>,
    /// The critic of the student's samples, for methods that have one.
    pub critic: Option<Critic<'a>>,
}

/// A network that models the distribution of the student's samples, and a discriminator of fake and real samples.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Critic<'a> {
    /// The denoiser of the student's samples in training: bare.
    pub fake_score: &'a dyn Denoiser,
    /// The same denoiser for the student's gradient: thresholded to the data's range, as the teacher is.
    pub thresholded: &'a dyn Denoiser,
    /// Distinguishes noised samples of the student from noised data; `None` trains without it.
    pub discriminator: Option<&'a dyn Discriminator>,
}

impl<'a> Networks<'a> {
    /// Student and teacher, which is all that most methods need.
    pub fn new(student: &'a dyn Denoiser, teacher: &'a dyn Denoiser) -> Self {
        Self { student, teacher, target: None, critic: None }
    }

    /// The same with a moving average of the student.
    #[must_use]
    pub fn with_target(self, target: &'a dyn Denoiser) -> Self {
        Self { target: Some(target), ..self }
    }

    /// The same with a critic.
    #[must_use]
    pub fn with_critic(self, critic: Critic<'a>) -> Self {
        Self { critic: Some(critic), ..self }
    }
}

impl<'a> Critic<'a> {
    /// A critic without thresholds and without a discriminator.
    pub fn new(fake_score: &'a dyn Denoiser) -> Self {
        Self { fake_score, thresholded: fake_score, discriminator: None }
    }

    /// The same with the thresholded denoiser for the student's gradient.
    #[must_use]
    pub fn with_thresholded(self, thresholded: &'a dyn Denoiser) -> Self {
        Self { thresholded, ..self }
    }

    /// The same with a discriminator.
    #[must_use]
    pub fn with_discriminator(self, discriminator: &'a dyn Discriminator) -> Self {
        Self { discriminator: Some(discriminator), ..self }
    }
}

/// What a method requires in addition to student and teacher.
///
/// Start from [`Default`] and set the fields.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "one switch a need")]
#[non_exhaustive]
pub struct Requirements {
    /// Whether the teacher is evaluated; if not, [`Networks::teacher`] may be any network.
    pub teacher: bool,
    /// The decay of the moving average [`Networks::target`]; `None` if the method has no target network.
    pub target_decay: Option<f64>,
    /// Whether [`Networks::critic`] is required.
    pub critic: bool,
    /// Whether the critic must accept a guidance weight, whose input carries a number for each sample's state: its
    /// source, its timestep, or both.
    pub critic_sees_states: bool,
    /// Whether the critic must have a discriminator, and the request real data.
    pub discriminator: bool,
}

impl Default for Requirements {
    /// A teacher only, as most methods require.
    fn default() -> Self {
        Self {
            teacher: true,
            target_decay: None,
            critic: false,
            critic_sees_states: false,
            discriminator: false,
        }
    }
}

/// The arguments of [`Objective::loss`].
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct LossRequest<'a> {
    /// The number of updates so far.
    pub step: u64,
    /// The phase: which networks are trained.
    pub phase: Phase,
    /// `[batch, ..]` at timesteps of the student's grid, mixed within the batch.
    pub states: &'a States,
    /// The networks.
    pub networks: Networks<'a>,
    /// Random streams, for methods that draw noise and timesteps.
    pub streams: &'a RandomStreams,
    /// The student's prediction for the same states in an earlier phase of this step, if there was one.
    pub student_x0: Option<&'a Tensor>,
    /// Dataset samples with their conditioning, for methods with a discriminator.
    pub real: Option<&'a Data>,
}

impl<'a> LossRequest<'a> {
    /// A request with the fields that every method requires.
    pub fn new(
        step: u64,
        phase: Phase,
        states: &'a States,
        networks: Networks<'a>,
        streams: &'a RandomStreams,
    ) -> Self {
        Self { step, phase, states, networks, streams, student_x0: None, real: None }
    }

    /// The same with the student's prediction of an earlier phase of the step, if there was one.
    #[must_use]
    pub fn with_student_x0(self, student_x0: impl Into<Option<&'a Tensor>>) -> Self {
        Self { student_x0: student_x0.into(), ..self }
    }

    /// The same with dataset samples, if the method requires them.
    #[must_use]
    pub fn with_real(self, real: impl Into<Option<&'a Data>>) -> Self {
        Self { real: real.into(), ..self }
    }
}

/// The loss of a batch of states and its parts.
#[derive(Debug)]
#[non_exhaustive]
pub struct LossTerms {
    /// The loss of each sample, `[batch]`, with its graph.
    pub per_sample: Tensor,
    /// The clean data that the student predicted, `[batch, ..]`, detached, from which its next state is computed. The
    /// boundary condition is applied if the method has one.
    pub student_x0: Tensor,
    /// The teacher's state at the student's next timestep, `[batch, ..]`, for methods that compute it.
    pub teacher_next: Option<Tensor>,
    /// The target of the student (of the critic in its phase), `[batch, ..]`, detached.
    pub target: Tensor,
    /// The parts of the loss for logging, by name, each `[batch]` and detached.
    pub parts: Vec<(&'static str, Tensor)>,
}

impl LossTerms {
    /// The terms that every method has; `teacher_next` and `parts` are empty.
    pub fn new(per_sample: Tensor, student_x0: Tensor, target: Tensor) -> Self {
        Self { per_sample, student_x0, teacher_next: None, target, parts: Vec::new() }
    }
}

/// A distillation method: which networks are evaluated, in what order, and the loss computed from their outputs.
///
/// It never steps an optimizer. To add a method, implement this trait outside of this crate and pass a reference.
pub trait Objective: std::fmt::Debug {
    /// The phases of step `step`, counted from 0, in order; never empty.
    fn phases(&self, step: u64) -> &'static [Phase];

    /// What the method requires in addition to student and teacher; nothing for most.
    fn requirements(&self) -> Requirements {
        Requirements::default()
    }

    /// The loss of a batch of states in one phase of a step.
    ///
    /// # Errors
    ///
    /// [`Error::OffGrid`](crate::Error::OffGrid) for states off the student's grid,
    /// [`Error::SchedulesDiffer`](crate::Error::SchedulesDiffer) for networks of another schedule,
    /// [`Error::Phase`](crate::Error::Phase) for a phase that the method does not have,
    /// [`Error::Missing`](crate::Error::Missing) if one of the [`requirements`](Self::requirements) is missing,
    /// and errors of the networks.
    fn loss(&self, request: &LossRequest<'_>) -> Result<LossTerms>;
}

/// Checks that all networks have the noise schedule of the objective.
pub(crate) fn ensure_one_schedule<'a>(
    schedule: &NoiseSchedule,
    networks: impl IntoIterator<Item = (&'static str, &'a dyn Denoiser)>,
) -> Result<()> {
    let expected = schedule.config();
    for (network, denoiser) in networks {
        let found = denoiser.schedule().config();
        if found != expected {
            let (found, expected) = (format!("{found:?}"), format!("{expected:?}"));
            return Err(Error::SchedulesDiffer { network, found, expected });
        }
    }
    Ok(())
}
