//! The networks of a distillation.

use ddil_core::Conditioning;
use ddil_libtorch::{TensorList, foreach_lerp_};
use ddil_losses::{Phase, Requirements};
use ddil_models::{
    DiscriminatorHead, DiscriminatorHeadConfig, ModelConfig, NetworkDenoiser, NetworkDiscriminator,
};
use tch::Tensor;

use crate::config::{DistillConfig, LoraSection};
use crate::error::{Error, Result};
use crate::state;
use crate::watch::Watches;

/// Width of the embedding by which a critic is told the source of a sample's state, one of four numbers.
const SOURCE_WIDTH: u32 = 32;

/// Who takes part: expert and learner, and whom the method needs beside them.
#[derive(Debug)]
pub(super) struct Cast {
    /// The teacher of the present stage.
    pub(super) teacher: NetworkDenoiser,
    pub(super) student: NetworkDenoiser,
    /// A network of the student's form, into which its moving average is put to be sampled and exported.
    pub(super) averaged: NetworkDenoiser,
    pub(super) target: Option<Target>,
    pub(super) critic: Option<CriticNetworks>,
    pub(super) watches: Watches,
}

/// A moving average of the student that makes labels; not the one that is exported.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) network: NetworkDenoiser,
    decay: f64,
    /// What it learned, and what the student has.
    averages: TensorList,
    values: TensorList,
}

/// The network that follows what the student makes, with the head that tells it from real data; a whole network also where
/// the student is an adapter.
#[derive(Debug)]
pub(super) struct CriticNetworks {
    pub(super) fake_score: NetworkDenoiser,
    /// Shares the network.
    pub(super) discriminator: Option<NetworkDiscriminator>,
}

impl Cast {
    /// The networks of a first stage.
    pub(super) fn new(
        config: &DistillConfig,
        requirements: Requirements,
        teacher: NetworkDenoiser,
        image_shape: [i64; 3],
    ) -> Result<Self> {
        let (teacher, student) = if let Some(lora) = &config.student.lora {
            with_adapter(config, lora, teacher)?
        } else {
            let student = student(config, &teacher)?;
            (teacher, student)
        };
        Self::of(config, requirements, teacher, student, image_shape)
    }

    /// Checks that there can be such networks, without memory for their weights.
    pub(super) fn ensure(
        config: &DistillConfig,
        requirements: Requirements,
        teacher: &NetworkDenoiser,
        image_shape: [i64; 3],
    ) -> Result<()> {
        match &config.student.lora {
            Some(lora) => {
                let whole = lora.on(teacher.parameters());
                let thin = ddil_models::LoraConfig { rank: 1, ..whole };
                let network = teacher.config().without_values()?;
                let attached = ddil_models::Lora::attach(network.parameters(), &thin, 0);
                attached.map_err(in_student_lora)?;
            }
            None => drop(student_model(config, teacher)?.without_values()?),
        }
        if requirements.critic {
            critic_model(requirements, teacher)?.without_values()?;
        }
        head(requirements, teacher, image_shape, config.run.seed).map(drop)
    }

    /// The networks of a later stage, whose teacher is the student that the one before it ended with.
    pub(super) fn next(
        &self,
        config: &DistillConfig,
        requirements: Requirements,
        average: &[(String, Tensor)],
        image_shape: [i64; 3],
    ) -> Result<Self> {
        let (teacher, student) = (self.student.duplicate(false)?, self.student.duplicate(true)?);
        for (what, network) in [("teacher", &teacher), ("student", &student)] {
            state::restore(what, &network.parameters().learned(), average)?;
        }
        Self::of(config, requirements, teacher, student, image_shape)
    }

    fn of(
        config: &DistillConfig,
        requirements: Requirements,
        teacher: NetworkDenoiser,
        student: NetworkDenoiser,
        image_shape: [i64; 3],
    ) -> Result<Self> {
        let averaged = student.duplicate(false)?;
        let mut watches = Watches::default();
        let (teacher, student) = (watches.on("teacher", teacher), watches.on("student", student));
        let target = match requirements.target_decay {
            Some(decay) => Some(Target::of(&student, decay, &mut watches)?),
            None => None,
        };
        let critic = if requirements.critic {
            let seed = config.run.seed;
            Some(CriticNetworks::new(requirements, &teacher, image_shape, seed, &mut watches)?)
        } else {
            None
        };
        Ok(Self { teacher, student, averaged, target, critic, watches })
    }

    /// What the optimizer of a phase changes.
    pub(super) fn parameters(&self, phase: Phase) -> Vec<(String, Tensor)> {
        match (phase, &self.critic) {
            (Phase::Student, _) => self.student.parameters().learned(),
            (Phase::Critic, Some(critic)) => critic.parameters(),
            (Phase::Critic, None) => Vec::new(),
        }
    }

    /// Lets gradients through to the parameters of one phase only. Those of the other would be thrown away, and the
    /// student's adversarial gradient comes through the critic.
    pub(super) fn open_for(&self, phase: Phase) {
        if let Some(critic) = &self.critic {
            critic.fake_score.parameters().set_trainable(phase == Phase::Critic);
            if let Some(discriminator) = &critic.discriminator {
                discriminator.head().parameters().set_trainable(phase == Phase::Critic);
            }
        }
    }

    /// The student's moving average, put where it can be sampled.
    pub(super) fn averaged(&self, average: &[(String, Tensor)]) -> Result<&NetworkDenoiser> {
        state::restore("moving average", &self.averaged.parameters().learned(), average)?;
        Ok(&self.averaged)
    }

    /// Everybody who answers in a loss, by name.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, &NetworkDenoiser)> {
        let target = self.target.as_ref().map(|target| ("target", &target.network));
        let critic = self.critic.as_ref().map(|critic| ("critic", &critic.fake_score));
        [("teacher", &self.teacher), ("student", &self.student)]
            .into_iter()
            .chain(target)
            .chain(critic)
    }

    /// After an update of the student: the target follows it.
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
    /// A copy of the teacher, and a fresh head where one is needed.
    fn new(
        requirements: Requirements,
        teacher: &NetworkDenoiser,
        image_shape: [i64; 3],
        seed: u64,
        watches: &mut Watches,
    ) -> Result<Self> {
        let fake_score = if requirements.critic_sees_source {
            teacher.derive(&critic_model(requirements, teacher)?, seed)?.0
        } else {
            teacher.duplicate(true)?
        };
        let fake_score = watches.on("critic", fake_score);
        let head = head(requirements, teacher, image_shape, seed)?;
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

/// The teacher, and an adapter on it that learns.
///
/// An adapter on a base without a guidance embedding learns the average over the guidance that its teacher draws.
fn with_adapter(
    config: &DistillConfig,
    lora: &LoraSection,
    teacher: NetworkDenoiser,
) -> Result<(NetworkDenoiser, NetworkDenoiser)> {
    let adapter = lora.on(teacher.parameters());
    let (teacher, student) =
        teacher.with_adapter(&adapter, config.run.seed).map_err(in_student_lora)?;
    let (own, all) = (student.parameters().num_values(), teacher.parameters().num_values());
    tracing::info!("the student is an adapter of {own} numbers on the teacher's {all}");
    let guidance = Conditioning::GUIDANCE_WEIGHT;
    if student.model().conditioning_fields().contains(&guidance) {
        return Ok((teacher, student));
    }
    Ok((teacher, student.ignoring(guidance)))
}

/// Names the table of the config in what the settings of adapters are refused for.
fn in_student_lora(error: impl Into<Error>) -> Error {
    match error.into() {
        Error::Models(ddil_models::Error::InvalidConfig { problems, .. }) => {
            let what = "student.lora".to_owned();
            Error::Models(ddil_models::Error::InvalidConfig { what, problems })
        }
        error => error,
    }
}

/// The form of the critic's network.
fn critic_model(requirements: Requirements, teacher: &NetworkDenoiser) -> Result<ModelConfig> {
    let model = teacher.config();
    if requirements.critic_sees_source {
        return Ok(model.with_time_cond_proj_dim(SOURCE_WIDTH)?);
    }
    Ok(model)
}

/// A fresh head on the critic's features, where one is needed.
fn head(
    requirements: Requirements,
    teacher: &NetworkDenoiser,
    image_shape: [i64; 3],
    seed: u64,
) -> Result<Option<DiscriminatorHead>> {
    if !requirements.discriminator {
        return Ok(None);
    }
    let [_, height, width] = image_shape;
    let sides = [height, width].map(|side| u32::try_from(side).unwrap_or(0));
    let unet = teacher.config().with_sample_size(sides)?;
    let head = DiscriminatorHeadConfig::for_model(&unet)?.build(teacher.placement(), seed)?;
    Ok(Some(head))
}

/// The form of the student's network.
fn student_model(config: &DistillConfig, teacher: &NetworkDenoiser) -> Result<ModelConfig> {
    let own = config.student.model.clone().map(ModelConfig::UNet2D);
    let model = own.unwrap_or_else(|| teacher.config());
    if config.teacher.guidance.is_told_to_student() {
        return Ok(model.with_time_cond_proj_dim(config.student.time_cond_proj_dim)?);
    }
    Ok(model)
}

/// The learner: the teacher's own network, or a smaller one that starts from those of its weights that match.
fn student(config: &DistillConfig, teacher: &NetworkDenoiser) -> Result<NetworkDenoiser> {
    let model = student_model(config, teacher)?;
    if model == teacher.config() {
        return Ok(teacher.duplicate(true)?);
    }
    let (student, report) = teacher.derive(&model, config.run.seed)?;
    tracing::info!("the student starts from the teacher's weights: {report}");
    Ok(student)
}
