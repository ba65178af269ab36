//! What must fit before any work begins.

use ddil_losses::{
    LatentConsistencyConfig, ObjectiveConfig, Requirements, Solver, TeacherGuidance,
};

use ddil_models::{ModelConfig, UNet2DConfig};

use crate::config::{CriticSection, DistillConfig};
use crate::data::TrainingData;
use crate::error::{Error, Result};
use crate::pipeline::Pipeline;

/// Checks teacher, student, data and method against each other.
pub(super) fn ensure_fits(
    config: &DistillConfig,
    requirements: Requirements,
    teacher: &Pipeline,
    data: &TrainingData,
) -> Result<()> {
    let (taught, found) = (teacher.card.image_shape, data.image_shape());
    if taught != found {
        return invalid(
            "data",
            format!("images of channels, height, width {found:?}"),
            format!("{taught:?}, which the teacher was trained on"),
        );
    }
    if teacher.network.is_class_conditional() && data.null_class().is_none() {
        return invalid("data", "without labels", "with labels, which the teacher asks for");
    }
    ensure_guidance(config, requirements, teacher)?;
    if config.student.lora.is_some() && teacher.card.adapter.is_some() {
        let expected = "left out: the teacher is an adapter itself; one that was exported with \
                        student.lora.export = \"merged\" can be the base of another";
        return invalid("student.lora", "set", expected);
    }
    if let Some(model) = &config.student.model {
        match teacher.network.config() {
            ModelConfig::UNet2D(taught) => ensure_student(model, &taught)?,
            other => {
                let expected = "left out: it is a UNet2DModel, and the teacher is not".to_owned();
                return invalid(
                    "student.model",
                    format!("set beside a {}", other.class_name()),
                    expected,
                );
            }
        }
    }
    if config.critic != CriticSection::default() && !requirements.critic {
        let expected = format!("left out: {} trains no critic", config.objective.as_str());
        return invalid("critic", "set", expected);
    }
    ensure_classes(teacher, data)
}

fn invalid(field: &str, value: impl Into<String>, expected: impl Into<String>) -> Result<()> {
    let (value, expected) = (value.into(), expected.into());
    Err(Error::InvalidConfig { field: field.to_owned(), value, expected })
}

/// The teacher must be able to guide as it is asked to, and nobody may be guided twice.
fn ensure_guidance(
    config: &DistillConfig,
    requirements: Requirements,
    teacher: &Pipeline,
) -> Result<()> {
    const FIELD: &str = "teacher.guidance";
    let guidance = config.teacher.guidance;
    let is_told = teacher.network.config().time_cond_proj_dim().is_some();
    let has_null = teacher.card.null_class.is_some();
    match guidance {
        TeacherGuidance::Embedded { .. } if !is_told => {
            let expected = "cfg, cfg_range or baked_in: the teacher takes no guidance weight";
            return invalid(FIELD, "embedded", expected);
        }
        TeacherGuidance::Cfg { .. } | TeacherGuidance::CfgRange { .. } if is_told => {
            let expected = "embedded: the teacher is told its guidance and would be guided twice";
            return invalid(FIELD, guidance.as_str(), expected);
        }
        TeacherGuidance::Cfg { .. } | TeacherGuidance::CfgRange { .. } if !has_null => {
            let expected =
                "baked_in: the teacher was trained without a null class and cannot be guided";
            return invalid(FIELD, guidance.as_str(), expected);
        }
        TeacherGuidance::BakedIn if is_told => {
            let expected = "embedded: the teacher must be told how strongly to guide itself";
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
        let expected =
            "baked_in: with objective.solver = \"target\" no teacher is asked, so none is guided";
        return invalid(FIELD, guidance.as_str(), expected);
    }
    if guidance.is_told_to_student() && requirements.critic {
        let expected =
            "cfg or baked_in: a critic that is told no weight would average over all of them";
        return invalid(FIELD, guidance.as_str(), expected);
    }
    Ok(())
}

/// A network of the student's own must take and give what the teacher's does.
fn ensure_student(student: &UNet2DConfig, teacher: &UNet2DConfig) -> Result<()> {
    let told = |config: &UNet2DConfig| {
        [
            ("in_channels", config.in_channels.to_string()),
            ("out_channels", config.out_channels.to_string()),
            ("num_class_embeds", format!("{:?}", config.num_class_embeds)),
            ("class_embed_type", format!("{:?}", config.class_embed_type)),
        ]
    };
    for ((key, found), (_, expected)) in told(student).into_iter().zip(told(teacher)) {
        if found != expected {
            let expected = format!("{expected}, as the teacher has it");
            return invalid(&format!("student.model.{key}"), found, expected);
        }
    }
    Ok(())
}

/// Labels of the data must be those that the teacher learned.
fn ensure_classes(teacher: &Pipeline, data: &TrainingData) -> Result<()> {
    let (Some(embeds), Some(found)) =
        (teacher.network.config().num_class_embeds().map(i64::from), data.null_class())
    else {
        return Ok(());
    };
    let (known, expected) = match teacher.card.class_names.len() as i64 {
        0 => (found <= embeds, format!("at most {embeds}, as the teacher")),
        own => (found == own, format!("{own}, as the teacher")),
    };
    if known {
        return Ok(());
    }
    invalid("data", format!("of {found} classes"), expected)
}
