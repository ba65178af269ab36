//! How the teacher is sampled for a grid beside the student's.

use ddil_losses::TeacherGuidance;
use ddil_pipelines::{
    Card, Pipeline, SamplePlan, num_samples_of_grid, with_published_solver,
    with_published_timesteps,
};
use ddil_schedulers::Thresholding;

use super::prompted;
use crate::config::DistillConfig;
use crate::error::{Result, with_causes};

/// The fewest steps to which the teacher's own number is reduced.
const MIN_STEPS: u32 = 10;
/// The number of training samples, those of all updates, per step of a sample in the grid. The grid then takes about a
/// twelfth of the time of the updates: a training sample costs about six evaluations of a network, counting a backward pass
/// as two, and a step of a guided teacher costs two.
const TRAINING_SAMPLES_PER_STEP: u64 = 4;

/// The settings with which a teacher is sampled once in a run.
#[derive(Debug)]
pub(super) struct TeacherPlan {
    pub(super) plan: SamplePlan,
    /// The steps that `ddil sample` takes by default.
    full_steps: u32,
}

impl TeacherPlan {
    /// The steps and the sampler with which `ddil sample` samples this teacher by default, with the guidance and the
    /// thresholding of the distillation, and the noise of the student's grids.
    ///
    /// Fewer steps, but not below 10, for a run that is short compared with the grid: otherwise the grid could take longer
    /// than the updates.
    ///
    /// `None` for a run that draws no grid of the teacher.
    pub(super) fn new(
        teacher: &Pipeline,
        config: &DistillConfig,
        student: &Card,
        batch_size: u32,
    ) -> Result<Option<Self>> {
        if config.output.sample_interval == 0 || config.output.samples_per_class == 0 {
            return Ok(None);
        }
        let full_steps = SamplePlan::of(teacher, None).steps;
        let samples = num_samples(config, student);
        let training_samples = config.total_updates().saturating_mul(config.data.batch_size.into());
        let most = training_samples / TRAINING_SAMPLES_PER_STEP / samples.max(1);
        let most = most.min(u32::MAX.into()) as u32;
        let steps = full_steps.min(most.max(MIN_STEPS));
        let own = plan_of(teacher, (steps < full_steps).then_some(steps))?;
        let guidance_scale = match config.teacher.guidance {
            TeacherGuidance::BakedIn => teacher.card.default_guidance_scale(),
            // The scale that the student has learned, or that of its grids if it takes one.
            _ => student.guidance_scale.unwrap_or_else(|| student.default_guidance_scale()),
        };
        let on = config.thresholding_places.teacher;
        let thresholding = if on { config.thresholding.clone() } else { Thresholding::None };
        let seed = config.run.seed;
        // A guided teacher evaluates two rows per sample.
        let batch_size = (batch_size / 2).max(1);
        let plan = SamplePlan { guidance_scale, thresholding, batch_size, seed, ..own };
        Ok(Some(Self { plan, full_steps }))
    }

    /// How the grid was drawn, for its caption.
    pub(super) fn description(&self) -> String {
        let SamplePlan { steps, guidance_scale, .. } = self.plan;
        let of = match self.full_steps {
            full if full > steps => format!(" of the usual {full}, to bound the time"),
            _ => String::new(),
        };
        format!("{steps} steps{of}, guidance {guidance_scale}")
    }
}

fn plan_of(teacher: &Pipeline, steps: Option<u32>) -> Result<SamplePlan> {
    let plan = SamplePlan::of(teacher, steps);
    // As in training, where the solver of the teacher's folder is not used.
    let plan = with_published_solver(teacher, plan.clone()).unwrap_or_else(|error| {
        tracing::warn!(
            "the teacher's grid is drawn with DDIM, since its own solver is not available: {}",
            with_causes(&error)
        );
        plan
    });
    if teacher.parts.class().is_text_to_image() {
        return Ok(with_published_timesteps(teacher, plan)?);
    }
    Ok(plan)
}

/// The number of samples of a grid.
fn num_samples(config: &DistillConfig, card: &Card) -> u64 {
    let per_row = config.output.samples_per_class;
    if !config.data.kind.is_text() {
        return num_samples_of_grid(card, per_row).into();
    }
    let prompts = match config.output.prompts.len() {
        0 => prompted::SHOWN,
        given => given,
    };
    prompts as u64 * u64::from(per_row)
}
