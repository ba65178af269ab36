//! The networks of a distillation.

use ddil_core::Conditioning;
use ddil_libtorch::{TensorList, foreach_lerp_};
use ddil_losses::Phase;
use ddil_models::{ModelConfig, NetworkConfig, NetworkDenoiser, NetworkDiscriminator};
use tch::Tensor;

use crate::config::LoraSection;
use crate::error::Result;
use crate::roster::{CriticForm, Roster, StudentForm, in_student_lora};
use crate::state;
use crate::watch::Watches;

/// The networks of a stage: teacher, student, and the further networks that the method requires.
#[derive(Debug)]
pub(super) struct Roles {
    /// The teacher of the present stage.
    pub(super) teacher: NetworkDenoiser,
    pub(super) student: NetworkDenoiser,
    /// A network of the student's configuration, which holds its moving average for sampling and export.
    pub(super) averaged: NetworkDenoiser,
    pub(super) target: Option<Target>,
    pub(super) critic: Option<CriticNetworks>,
    pub(super) watches: Watches,
}

/// A moving average of the student that computes labels; another average is exported.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) network: NetworkDenoiser,
    decay: f64,
    /// Its weights, and the student's.
    averages: TensorList,
    values: TensorList,
}

/// The network that estimates the score of the student's distribution, with the head that separates its samples from
/// real data.
#[derive(Debug)]
pub(super) struct CriticNetworks {
    pub(super) fake_score: NetworkDenoiser,
    /// Shares the network.
    pub(super) discriminator: Option<NetworkDiscriminator>,
}

impl Roles {
    /// The networks of a first stage.
    pub(super) fn new(roster: &Roster, teacher: NetworkDenoiser, seed: u64) -> Result<Self> {
        let (teacher, student) = match &roster.student {
            StudentForm::Adapter(lora) => with_adapter(lora, teacher, seed)?,
            StudentForm::Network(model) => {
                let student = student(model, &teacher, seed)?;
                (teacher, student)
            }
        };
        Self::of(roster, teacher, student, seed)
    }

    /// The networks of a later stage, whose teacher is the final student of the previous stage.
    pub(super) fn next(
        &self,
        roster: &Roster,
        average: &[(String, Tensor)],
        seed: u64,
    ) -> Result<Self> {
        let (teacher, student) = (self.student.duplicate(false)?, self.student.duplicate(true)?);
        for (what, network) in [("teacher", &teacher), ("student", &student)] {
            state::restore(what, &network.parameters().learned(), average)?;
        }
        Self::of(roster, teacher, student, seed)
    }

    fn of(
        roster: &Roster,
        teacher: NetworkDenoiser,
        student: NetworkDenoiser,
        seed: u64,
    ) -> Result<Self> {
        let averaged = student.duplicate(false)?;
        let mut watches = Watches::default();
        let (teacher, student) = (watches.on("teacher", teacher), watches.on("student", student));
        let target = match roster.target_decay {
            Some(decay) => Some(Target::of(&student, decay, &mut watches)?),
            None => None,
        };
        let critic = match &roster.critic {
            Some(form) => Some(CriticNetworks::new(form, &teacher, seed, &mut watches)?),
            None => None,
        };
        Ok(Self { teacher, student, averaged, target, critic, watches })
    }

    /// The parameters of a phase's optimizer.
    pub(super) fn parameters(&self, phase: Phase) -> Vec<(String, Tensor)> {
        match (phase, &self.critic) {
            (Phase::Student, _) => self.student.parameters().learned(),
            (Phase::Critic, Some(critic)) => critic.parameters(),
            (Phase::Critic, None) => Vec::new(),
        }
    }

    /// Enables gradients for the parameters of one phase only. Gradients of the other parameters would be discarded,
    /// and the student's adversarial gradient passes through the critic.
    pub(super) fn open_for(&self, phase: Phase) {
        if let Some(critic) = &self.critic {
            critic.fake_score.parameters().set_trainable(phase == Phase::Critic);
            if let Some(discriminator) = &critic.discriminator {
                discriminator.head().parameters().set_trainable(phase == Phase::Critic);
            }
        }
    }

    /// The student's moving average, loaded into a network that can be sampled.
    pub(super) fn averaged(&self, average: &[(String, Tensor)]) -> Result<&NetworkDenoiser> {
        state::restore("moving average", &self.averaged.parameters().learned(), average)?;
        Ok(&self.averaged)
    }

    /// The networks that a loss evaluates, by name.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, &NetworkDenoiser)> {
        let target = self.target.as_ref().map(|target| ("target", &target.network));
        let critic = self.critic.as_ref().map(|critic| ("critic", &critic.fake_score));
        [("teacher", &self.teacher), ("student", &self.student)]
            .into_iter()
            .chain(target)
            .chain(critic)
    }

    /// After an update of the student: updates the target.
    pub(super) fn follow(&self) -> Result<()> {
        match &self.target {
            Some(target) => target.follow(),
            None => Ok(()),
        }
    }
}

impl Target {
    fn of(student: &NetworkDenoiser, decay: f64, watches: &mut Watches) -> Result<Self> {
        let network = watches.on("target", student.duplicate(false)?);
        let list = |network: &NetworkDenoiser| {
            TensorList::new(network.parameters().learned().into_iter().map(|(_, tensor)| tensor))
        };
        let (averages, values) = (list(&network)?, list(student)?);
        Ok(Self { network, decay, averages, values })
    }

    fn follow(&self) -> Result<()> {
        Ok(foreach_lerp_(&self.averages, &self.values, 1.0 - self.decay)?)
    }
}

impl CriticNetworks {
    /// A copy of the teacher, and a new head if the method has one.
    fn new(
        form: &CriticForm,
        teacher: &NetworkDenoiser,
        seed: u64,
        watches: &mut Watches,
    ) -> Result<Self> {
        let fake_score = if form.model == teacher.config() {
            teacher.duplicate(true)?
        } else {
            teacher.derive(&form.model, seed)?.0
        };
        let fake_score = watches.on("critic", fake_score);
        let head = form.head.as_ref().map(|head| head.build(teacher.placement(), seed));
        let head = head.transpose()?;
        let discriminator = head.map(|head| NetworkDiscriminator::new(&fake_score, head));
        Ok(Self { discriminator: discriminator.transpose()?, fake_score })
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let named = |prefix: &'static str, parameters: Vec<(String, Tensor)>| {
            parameters.into_iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
        };
        let of_head =
            self.discriminator.iter().flat_map(|d| named("head", d.head().parameters().learned()));
        named("fake_score", self.fake_score.parameters().learned()).chain(of_head).collect()
    }
}

/// The teacher with a trainable adapter.
///
/// An adapter on a base without a guidance embedding learns the average over the guidance weights that its teacher
/// draws.
fn with_adapter(
    lora: &LoraSection,
    teacher: NetworkDenoiser,
    seed: u64,
) -> Result<(NetworkDenoiser, NetworkDenoiser)> {
    let adapter = lora.on(teacher.parameters());
    let (teacher, student) = teacher.with_adapter(&adapter, seed).map_err(in_student_lora)?;
    let (own, all) = (student.parameters().num_values(), teacher.parameters().num_values());
    tracing::info!("the student is an adapter with {own} parameters on a teacher with {all}");
    let guidance = Conditioning::GUIDANCE_WEIGHT;
    if student.model().conditioning_fields().contains(&guidance) {
        return Ok((teacher, student));
    }
    Ok((teacher, student.ignoring(guidance)))
}

/// The student: a copy of the teacher, or another network initialised from the teacher's weights that match.
fn student(model: &ModelConfig, teacher: &NetworkDenoiser, seed: u64) -> Result<NetworkDenoiser> {
    if *model == teacher.config() {
        return Ok(teacher.duplicate(true)?);
    }
    let (student, report) = teacher.derive(model, seed)?;
    tracing::info!("the student starts from the teacher's weights: {report}");
    Ok(student)
}
