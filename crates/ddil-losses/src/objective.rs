//! What every distillation method can be asked.

use ddil_core::{Data, Denoiser, Discriminator, RandomStreams, States};
use ddil_schedulers::NoiseSchedule;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::phase::Phase;

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
    /// A moving average of the learner, for methods that compare the learner with it; asked without gradients.
    pub target: Option<&'a dyn Denoiser>,
    /// Who judges what the learner makes, for methods that have such a network.
    pub critic: Option<Critic<'a>>,
}

/// A network that follows the law of the student's samples, and tells them from real ones.
#[derive(Clone, Copy)]
pub struct Critic<'a> {
    /// The denoiser of the student's samples as it is trained: bare.
    pub fake_score: &'a dyn Denoiser,
    /// The same as it is asked for the student's gradient: held inside the data's range, as the teacher is.
    pub asked: &'a dyn Denoiser,
    /// Tells noised samples of the student from noised data; none trains without.
    pub discriminator: Option<&'a dyn Discriminator>,
}

impl<'a> Networks<'a> {
    /// Learner and expert, which is all that most methods need.
    pub fn new(student: &'a dyn Denoiser, teacher: &'a dyn Denoiser) -> Self {
        Self { student, teacher, target: None, critic: None }
    }
}

/// What a method has to be lent beside learner and expert.
///
/// [`Default`] and the fields make one.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "one switch a need")]
#[non_exhaustive]
pub struct Requirements {
    /// Whether the teacher is asked; where not, [`Networks::teacher`] may be any network.
    pub teacher: bool,
    /// The decay of the moving average that [`Networks::target`] is; none needs no target.
    pub target_decay: Option<f64>,
    /// Whether there must be a [`Networks::critic`].
    pub critic: bool,
    /// Whether it must take a guidance weight, in whose place it is told the source of a sample's state.
    pub critic_sees_source: bool,
    /// Whether it must have a discriminator, and the request real data.
    pub discriminator: bool,
}

impl Default for Requirements {
    /// A teacher and nothing else, which is all that most methods need.
    fn default() -> Self {
        Self {
            teacher: true,
            target_decay: None,
            critic: false,
            critic_sees_source: false,
            discriminator: false,
        }
    }
}

/// What a method is asked for, and what it may use.
#[derive(Clone, Copy)]
pub struct LossRequest<'a> {
    /// Updates so far.
    pub step: u64,
    /// Who is trained.
    pub phase: Phase,
    /// `[batch, ..]` at timesteps of the student's grid, mixed within the batch.
    pub states: &'a States,
    /// The networks.
    pub networks: Networks<'a>,
    /// Random numbers, for methods that draw noise and timesteps of their own.
    pub streams: &'a RandomStreams,
    /// What the student predicted for the same states in an earlier phase of this step, where there was one.
    pub student_x0: Option<&'a Tensor>,
    /// Dataset samples with what is known of them, for methods that show them to a discriminator.
    pub real: Option<&'a Data>,
}

impl<'a> LossRequest<'a> {
    /// A request with what every method needs.
    pub fn new(
        step: u64,
        phase: Phase,
        states: &'a States,
        networks: Networks<'a>,
        streams: &'a RandomStreams,
    ) -> Self {
        Self { step, phase, states, networks, streams, student_x0: None, real: None }
    }
}

/// What a method has to say of a batch of states.
#[derive(Debug)]
#[non_exhaustive]
pub struct LossTerms {
    /// The loss of each sample, `[batch]`, with the graph behind it.
    pub per_sample: Tensor,
    /// The clean data that the student predicted, `[batch, ..]`, without a graph: what its next state is made of. With
    /// the boundary condition applied where the method has one.
    pub student_x0: Tensor,
    /// The teacher's state at the student's next timestep, `[batch, ..]`, for methods whose teacher gets there.
    pub teacher_next: Option<Tensor>,
    /// What the student (in a critic's phase the critic) should have predicted, `[batch, ..]`, without a graph.
    pub target: Tensor,
    /// Further figures for the record, by name, `[batch]` each and without a graph: the parts of the loss.
    pub parts: Vec<(&'static str, Tensor)>,
}

impl LossTerms {
    /// The terms that every method has, without a state of the teacher and without parts.
    pub fn new(per_sample: Tensor, student_x0: Tensor, target: Tensor) -> Self {
        Self { per_sample, student_x0, teacher_next: None, target, parts: Vec::new() }
    }
}

/// A distillation method: which networks it asks, in what order, and what it makes of the answers.
///
/// Makes gradients and steps no optimizer. Outside of this crate, implement it and pass a reference: nothing else
/// needs to know.
pub trait Objective: std::fmt::Debug {
    /// Who is trained in step `step`, counted from 0, one after the other; never empty.
    fn phases(&self, step: u64) -> &'static [Phase];

    /// What the method has to be lent beside learner and expert; nothing for most.
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
    /// [`Error::Missing`](crate::Error::Missing) for what [`requirements`](Self::requirements) name and is not there,
    /// and what the networks say.
    fn loss(&self, request: &LossRequest<'_>) -> Result<LossTerms>;
}

/// Refuses networks that follow another noise schedule than the objective.
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
