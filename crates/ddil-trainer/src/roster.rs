//! Which networks a distillation has, by their configurations alone.
//!
//! A run builds its networks from a [`Roster`], a dry run checks one, and the memory plan counts one, so that the three
//! cannot disagree.

use ddil_losses::Requirements;
use ddil_models::{
    DiscriminatorHeadConfig, Lora, LoraConfig, ModelConfig, NetworkConfig, NetworkDenoiser,
    Placement,
};

use crate::config::{DistillConfig, LoraSection};
use crate::error::{Error, Result};

/// Width of the embedding of the number of a sample's state, its source or timestep, in a critic that receives it.
const STATE_WIDTH: u32 = 32;

/// The networks of one stage.
#[derive(Clone, Debug)]
pub(crate) struct Roster {
    pub(crate) teacher: ModelConfig,
    pub(crate) student: StudentForm,
    /// Decay of the student's moving average that makes labels; none for a method without a target.
    pub(crate) target_decay: Option<f64>,
    pub(crate) critic: Option<CriticForm>,
}

/// What the student is.
#[derive(Clone, Debug)]
pub(crate) enum StudentForm {
    /// A whole network.
    Network(Box<ModelConfig>),
    /// An adapter on the teacher's network.
    Adapter(LoraSection),
}

/// The critic: a whole network, also where the student is an adapter.
#[derive(Clone, Debug)]
pub(crate) struct CriticForm {
    pub(crate) model: ModelConfig,
    /// The discriminator's head on the features of the network; none for a method without a discriminator.
    pub(crate) head: Option<DiscriminatorHeadConfig>,
}

impl Roster {
    /// The networks of the first stage, for samples of channels, height and width `image_shape`.
    ///
    /// # Errors
    ///
    /// [`Error::Models`] for a network that cannot have the input or the head that the method requires.
    pub(crate) fn first(
        config: &DistillConfig,
        requirements: Requirements,
        teacher: ModelConfig,
        image_shape: [i64; 3],
    ) -> Result<Self> {
        let student = match &config.student.lora {
            Some(lora) => StudentForm::Adapter(lora.clone()),
            None => StudentForm::Network(student_model(config, &teacher)?.into()),
        };
        Self::new(requirements, teacher, student, image_shape)
    }

    /// The networks of a later stage, whose teacher is the student `teacher` of the stage before.
    ///
    /// # Errors
    ///
    /// As [`first`](Self::first).
    pub(crate) fn next(
        config: &DistillConfig,
        requirements: Requirements,
        teacher: ModelConfig,
        image_shape: [i64; 3],
    ) -> Result<Self> {
        let student = match &config.student.lora {
            Some(lora) => StudentForm::Adapter(lora.clone()),
            None => StudentForm::Network(teacher.clone().into()),
        };
        Self::new(requirements, teacher, student, image_shape)
    }

    fn new(
        requirements: Requirements,
        teacher: ModelConfig,
        student: StudentForm,
        image_shape: [i64; 3],
    ) -> Result<Self> {
        let critic =
            requirements.critic.then(|| CriticForm::new(requirements, &teacher, image_shape));
        let target_decay = requirements.target_decay;
        Ok(Self { student, target_decay, critic: critic.transpose()?, teacher })
    }

    /// The configuration of the network that the student computes with: its own, or the base of its adapter.
    pub(crate) fn student_model(&self) -> &ModelConfig {
        match &self.student {
            StudentForm::Network(model) => model,
            StudentForm::Adapter(_) => &self.teacher,
        }
    }

    /// Checks that each network can be built, without memory for its weights.
    ///
    /// # Errors
    ///
    /// What the configuration of a network refuses, under the name of its table.
    pub(crate) fn ensure(&self, teacher: &NetworkDenoiser, seed: u64) -> Result<()> {
        match &self.student {
            StudentForm::Adapter(lora) => {
                let thin = LoraConfig { rank: 1, ..lora.on(teacher.parameters()) };
                let network = self.teacher.without_values()?;
                Lora::attach(network.parameters(), &thin, 0).map_err(in_student_lora)?;
            }
            StudentForm::Network(model) => drop(model.without_values()?),
        }
        let Some(critic) = &self.critic else { return Ok(()) };
        critic.model.without_values()?;
        if let Some(head) = &critic.head {
            head.build(teacher.placement(), seed)?;
        }
        Ok(())
    }
}

impl CriticForm {
    fn new(
        requirements: Requirements,
        teacher: &ModelConfig,
        [_, height, width]: [i64; 3],
    ) -> Result<Self> {
        let model = if requirements.critic_sees_states {
            teacher.clone().with_time_cond_proj_dim(STATE_WIDTH)?
        } else {
            teacher.clone()
        };
        let head = if requirements.discriminator {
            let sides = [height, width].map(|side| u32::try_from(side).unwrap_or(0));
            let unet = teacher.clone().with_sample_size(sides)?;
            Some(DiscriminatorHeadConfig::for_model(&unet)?)
        } else {
            None
        };
        Ok(Self { model, head })
    }

    /// Number of values of the head; 0 without one.
    ///
    /// # Errors
    ///
    /// What the configuration of the head refuses.
    pub(crate) fn head_values(&self) -> Result<u64> {
        let Some(head) = &self.head else { return Ok(0) };
        Ok(head.build(Placement::default(), 0)?.parameters().num_values() as u64)
    }
}

/// The student's network: the teacher's own, or the smaller one of the config, with an input for the guidance weight
/// where the student receives that.
fn student_model(config: &DistillConfig, teacher: &ModelConfig) -> Result<ModelConfig> {
    let own = config.student.model.clone().map(ModelConfig::UNet2D);
    let model = own.unwrap_or_else(|| teacher.clone());
    if config.teacher.guidance.is_student_input() {
        return Ok(model.with_time_cond_proj_dim(config.student.time_cond_proj_dim)?);
    }
    Ok(model)
}

/// Prefixes settings of adapters that are refused with the table of the config.
pub(crate) fn in_student_lora(error: impl Into<Error>) -> Error {
    match error.into() {
        Error::Models(ddil_models::Error::InvalidConfig { problems, .. }) => {
            let what = "student.lora".to_owned();
            Error::Models(ddil_models::Error::InvalidConfig { what, problems })
        }
        error => error,
    }
}
