//! Checks before a distillation starts.

use ddil_core::PriorSchedule;
use ddil_files::Invalid;
use ddil_losses::{
    LatentConsistencyConfig, ObjectiveConfig, Requirements, Solver, TeacherGuidance,
};
use ddil_models::{ModelConfig, UNet2DConfig};
use ddil_pipelines::Pipeline;
use ddil_schedulers::Thresholding;
use tch::{Tensor, kind};

use super::stage::Stage;
use crate::config::{CriticSection, DataKind, DistillConfig};
use crate::data::DataSource;
use crate::error::{Error, Result};

/// Checks teacher, student, data and method against each other.
pub(super) fn ensure_fits(
    config: &DistillConfig,
    stage: &Stage,
    teacher: &Pipeline,
    data: &DataSource,
) -> Result<()> {
    let requirements = stage.objective.requirements();
    ensure_kind(config, teacher)?;
    let (teacher_shape, found) = (teacher.card.image_shape, data.image_shape());
    if teacher_shape != found && teacher.parts.class().is_text_to_image() {
        tracing::warn!(
            "latents are {found:?}, but the teacher was trained on {teacher_shape:?} (channels, height, width)"
        );
    } else if teacher_shape != found {
        return invalid(
            "data",
            format!("images of {found:?} (channels, height, width)"),
            format!("{teacher_shape:?}, which the teacher was trained on"),
        );
    }
    if teacher.network.is_class_conditional() && data.labels().is_none() {
        return invalid("data", "unlabelled", "labelled images, which the teacher requires");
    }
    ensure_thresholding(config, found)?;
    ensure_guidance(config, requirements, teacher, data)?;
    if !data.has_samples() {
        ensure_no_samples(config, requirements, stage)?;
    }
    if config.student.lora.is_some() && teacher.card.adapter.is_some() {
        let expected = "no value: the teacher is itself an adapter; export it with student.lora.export = \"merged\" to \
                        make it the base of another";
        return invalid("student.lora", "set", expected);
    }
    if let Some(model) = &config.student.model {
        match teacher.network.config() {
            ModelConfig::UNet2D(network) => ensure_student(model, &network)?,
            other => {
                let class = other.class_name();
                let expected =
                    format!("no value: it configures a UNet2DModel, but the teacher is a {class}");
                return invalid("student.model", "set", expected);
            }
        }
    }
    if config.critic != CriticSection::default() && !requirements.critic {
        let expected = format!("no value: {} trains no critic", config.objective.as_str());
        return invalid("critic", "set", expected);
    }
    Ok(())
}

/// The data must provide the network's conditioning, and no other.
fn ensure_kind(config: &DistillConfig, teacher: &Pipeline) -> Result<()> {
    let (class, model) = (teacher.parts.class(), teacher.network.config());
    let takes_text = matches!(model, ModelConfig::UNet2DCondition(_));
    if takes_text != class.is_text_to_image() {
        let expected =
            "a UNet2DConditionModel in a text-to-image pipeline, or a UNet2DModel in one of pixels";
        let found = format!("a {} in a {}", model.class_name(), class.as_str());
        return invalid("teacher.path", found, expected);
    }
    let embedded = match &model {
        ModelConfig::UNet2D(unet) => unet.class_embed_type,
        ModelConfig::UNet2DCondition(unet) => unet.class_embed_type,
        _ => None,
    };
    if let Some(kind) = embedded {
        let found = format!("a network with `class_embed_type` {}", serde_json::json!(kind));
        let expected = "a network without it: classes are given by index (`num_class_embeds`)";
        return invalid("teacher.path", found, expected);
    }
    if takes_text && teacher.network.is_class_conditional() {
        let expected = "a model without class labels: text data have none";
        return invalid("teacher.path", "a text-to-image model with class labels", expected);
    }
    if !takes_text && !config.output.prompts.is_empty() {
        let expected = "no value: the teacher takes no text";
        return invalid("output.prompts", "set", expected);
    }
    Ok(())
}

/// A box must have one range per channel of the data.
fn ensure_thresholding(config: &DistillConfig, [channels, ..]: [i64; 3]) -> Result<()> {
    let held = &config.thresholding;
    if !matches!(held, Thresholding::Clamp(_) | Thresholding::Reflect(_)) {
        return Ok(());
    }
    Ok(held.apply(&Tensor::zeros([1, channels, 1, 1], kind::FLOAT_CPU)).map(drop)?)
}

/// Prompts alone are not samples: no source or loss may require data samples.
fn ensure_no_samples(
    config: &DistillConfig,
    requirements: Requirements,
    stage: &Stage,
) -> Result<()> {
    let kind = DataKind::Prompts.as_str();
    if requirements.discriminator {
        let expected = format!(
            "false with data.kind = {kind:?}: the discriminator requires dataset samples, and there are only prompts"
        );
        return invalid("objective.gan", "true", expected);
    }
    let priors = &config.mixing.priors;
    let probed = match priors {
        PriorSchedule::Steps { steps } => steps.iter().map(|step| step.from).collect(),
        // Between its ends a schedule interpolates between them.
        _ => vec![0.0, 1.0],
    };
    let uses_forward = probed.into_iter().any(|progress| priors.at(progress).forward() > 0.0);
    // A one-step student is trained on pure noise only.
    let is_noise = stage.mixer.grids().student.len() == 1 && config.mixing.pure_noise_at_tmax;
    if uses_forward && !is_noise {
        let expected = format!(
            "0 for `forward` throughout with data.kind = {kind:?}: there are only prompts, and no samples to noise"
        );
        return invalid("mixing.priors", "above 0 for `forward`", expected);
    }
    Ok(())
}

fn invalid(field: &str, value: impl Into<String>, expected: impl Into<String>) -> Result<()> {
    let (value, expected) = (value.into(), expected.into());
    Err(Error::Invalid(Invalid::new(field, value, expected)))
}

/// The teacher must support the configured guidance, and guidance must not be applied twice.
fn ensure_guidance(
    config: &DistillConfig,
    requirements: Requirements,
    teacher: &Pipeline,
    data: &DataSource,
) -> Result<()> {
    const FIELD: &str = "teacher.guidance";
    let guidance = config.teacher.guidance;
    let has_guidance_input = teacher.network.config().time_cond_proj_dim().is_some();
    let (has_null, is_text) = (teacher.card.null_class.is_some(), config.data.kind.is_text());
    match guidance {
        TeacherGuidance::Embedded { .. } if !has_guidance_input => {
            let expected = "cfg, cfg_range or baked_in: the teacher takes no guidance weight";
            return invalid(FIELD, "embedded", expected);
        }
        TeacherGuidance::Cfg { .. } | TeacherGuidance::CfgRange { .. } if has_guidance_input => {
            let expected = "embedded: the teacher takes the guidance weight as input, and would be guided twice";
            return invalid(FIELD, guidance.as_str(), expected);
        }
        TeacherGuidance::Cfg { .. } | TeacherGuidance::CfgRange { .. }
            if is_text && !data.has_empty_prompt() =>
        {
            let expected =
                "baked_in: the encoded data have no empty prompt, which guidance requires";
            return invalid(FIELD, guidance.as_str(), expected);
        }
        TeacherGuidance::Cfg { .. } | TeacherGuidance::CfgRange { .. } if !is_text && !has_null => {
            let expected =
                "baked_in: the teacher was trained without a null class and cannot be guided";
            return invalid(FIELD, guidance.as_str(), expected);
        }
        TeacherGuidance::BakedIn if has_guidance_input => {
            let expected = "embedded: the teacher takes the guidance weight as input";
            return invalid(FIELD, "baked_in", expected);
        }
        _ => {}
    }
    let is_own_teacher = matches!(
        &config.objective,
        ObjectiveConfig::Lcm(LatentConsistencyConfig { solver: Solver::Target, .. })
    );
    if is_own_teacher
        && matches!(guidance, TeacherGuidance::Cfg { .. } | TeacherGuidance::CfgRange { .. })
    {
        let expected = "baked_in: with objective.solver = \"target\" the teacher is not evaluated";
        return invalid(FIELD, guidance.as_str(), expected);
    }
    if guidance.is_student_input() && requirements.critic {
        let expected = "cfg or baked_in: the critic does not take the weight, and would average over all weights";
        return invalid(FIELD, guidance.as_str(), expected);
    }
    Ok(())
}

/// A student network of another configuration must have the teacher's inputs and outputs.
fn ensure_student(student: &UNet2DConfig, teacher: &UNet2DConfig) -> Result<()> {
    let inputs_and_outputs = |config: &UNet2DConfig| {
        [
            ("in_channels", config.in_channels.to_string()),
            ("out_channels", config.out_channels.to_string()),
            ("num_class_embeds", format!("{:?}", config.num_class_embeds)),
            ("class_embed_type", format!("{:?}", config.class_embed_type)),
        ]
    };
    for ((key, found), (_, expected)) in
        inputs_and_outputs(student).into_iter().zip(inputs_and_outputs(teacher))
    {
        if found != expected {
            let expected = format!("{expected}, as in the teacher");
            return invalid(&format!("student.model.{key}"), found, expected);
        }
    }
    Ok(())
}
