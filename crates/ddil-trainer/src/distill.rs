//! The task of `ddil distill`: a few-step student from a teacher.

use std::path::Path;

use ddil_core::{
    Conditioning, Denoiser, MixRequest, Mixer, MixerConfig, RandomStreams, SavedState, Source,
    States, Stream, Thresholded,
};
use ddil_losses::{LossRequest, Networks, Objective, ObjectiveConfig, Phase, TeacherGuidance};
use ddil_models::Placement;
use ddil_schedulers::{Ddim, NoiseSchedule, Thresholding, Timesteps};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::config::DistillConfig;
use crate::data::TrainingData;
use crate::error::{Error, Result};
use crate::network::Network;
use crate::picture::Picture;
use crate::pipeline::{Card, Pipeline, scheduler};
use crate::sampling::{SamplePlan, grid_of_classes};
use crate::session::{Spent, Task, UpdateLoss};
use crate::state;

/// A student on its way: the mixer collects states, the teacher labels them, the objective compares.
#[derive(Debug)]
pub struct DistillTask {
    config: DistillConfig,
    schedule: NoiseSchedule,
    data: TrainingData,
    streams: RandomStreams,
    card: Card,
    /// The teacher of the present stage.
    teacher: Network,
    student: Network,
    /// A third network of the same form, into which the moving average is put to be sampled.
    averaged: Network,
    stage: Stage,
    /// What the loss said, kept for the mixer until the optimizer has stepped.
    pending: Option<Pending>,
}

/// What changes from stage to stage.
#[derive(Debug)]
struct Stage {
    index: usize,
    grid: Timesteps,
    objective: Box<dyn Objective>,
    mixer: Mixer,
    guidance: TeacherGuidance,
    /// The mixer counts its steps within the stage, as priors do; what it draws is still every stage's own.
    streams: RandomStreams,
}

#[derive(Debug)]
struct Pending {
    states: States,
    student_x0: Tensor,
    teacher_next: Option<Tensor>,
}

const TEACHER: &str = "teacher.safetensors";
const MIXER: &str = "mixer.safetensors";
const MIXER_STATE: &str = "mixer.json";

impl DistillTask {
    /// The task at its first update: the student is a copy of the teacher.
    ///
    /// # Errors
    ///
    /// What the config, the data or the teacher refuse; [`Error::InvalidConfig`] if they do not fit each other.
    pub fn new(config: &DistillConfig) -> Result<Self> {
        config.ensure()?;
        let device = config.run.device()?;
        let placement =
            Placement { device, kind: Kind::Float, channels_last: config.run.channels_last };
        let teacher = Pipeline::read(&config.teacher.path, placement, config.run.precision)?;
        let data = TrainingData::open(&config.data, config.run.seed, device)?;
        ensure_fits(config, &teacher, &data)?;
        let data = if teacher.network.is_class_conditional() { data } else { data.ignore_labels() };
        let Pipeline { network: teacher, card, .. } = teacher;
        let (student, averaged) = (teacher.duplicate(true)?, teacher.duplicate(false)?);
        let schedule = teacher.schedule().clone();
        let stage = Stage::new(config, &schedule, 0)?;
        scheduler(&student, &config.thresholding, Some(&stage.grid))?;
        let streams = RandomStreams::new(config.run.seed, 0);
        let config = config.clone();
        Ok(Self {
            config,
            schedule,
            data,
            streams,
            card,
            teacher,
            student,
            averaged,
            stage,
            pending: None,
        })
    }

    fn device(&self) -> Device {
        self.student.placement().device
    }

    /// What backward trajectories are told: the batch's own labels in another order, so that classes come as often
    /// as in the data and no trajectory is tied to a sample.
    fn prompts(&self, step: u64, conditioning: &Conditioning, batch: i64) -> Result<Conditioning> {
        let mut generator = self.streams.generator(step, Stream::Condition, Device::Cpu)?;
        Ok(conditioning.index_select(&generator.randperm(batch)?)?)
    }

    /// How the present student is sampled.
    fn sample_plan(&self) -> SamplePlan {
        SamplePlan {
            steps: self.stage.grid.len() as u32,
            guidance_scale: 1.0,
            eta: 0.0,
            thresholding: self.config.thresholding.clone(),
            timesteps: Some(self.stage.grid.as_slice().to_vec()),
            batch_size: 100,
            seed: self.config.run.seed,
        }
    }

    fn student_card(&self) -> Card {
        let guidance_scale = match self.config.teacher.guidance {
            TeacherGuidance::Cfg { scale } => Some(scale),
            _ => self.card.guidance_scale,
        };
        Card {
            method: self.config.objective.as_str().to_owned(),
            guidance_scale,
            priors: Some(self.config.mixing.priors.at(1.0)),
            seed: self.config.run.seed,
            ..self.card.clone()
        }
    }

    /// The loss by source and the share of each source, for the record.
    fn figures(states: &States, per_sample: &Tensor) -> Result<Vec<(String, f64)>> {
        let values: Vec<f64> = Vec::try_from(per_sample.detach().to_kind(Kind::Double))
            .map_err(Error::torch("DistillTask::figures"))?;
        let mut figures = Vec::new();
        for source in Source::ALL {
            let of_source: Vec<f64> = states
                .sources
                .iter()
                .zip(&values)
                .filter(|(s, _)| **s == source)
                .map(|(_, value)| *value)
                .collect();
            if !of_source.is_empty() {
                let name = source.as_str();
                let mean = of_source.iter().sum::<f64>() / of_source.len() as f64;
                figures.push((format!("loss_{name}"), mean));
                let share = of_source.len() as f64 / values.len() as f64;
                figures.push((format!("share_{name}"), share));
            }
        }
        Ok(figures)
    }
}

impl Stage {
    fn new(config: &DistillConfig, schedule: &NoiseSchedule, index: usize) -> Result<Self> {
        let steps = config.student.stages[index];
        let grid = config.objective.training_grid(schedule, steps)?;
        let objective = config.objective.build(schedule, &grid)?;
        let mixer =
            MixerConfig { thresholding: config.thresholding.clone(), ..config.mixing.clone() };
        let mixer = Mixer::new(mixer, grid.clone(), Box::new(Ddim::new(schedule.clone())))?;
        // What the first student learned is guided already.
        let guidance = if index == 0 { config.teacher.guidance } else { TeacherGuidance::BakedIn };
        let streams = stage_streams(config.run.seed, index);
        Ok(Self { index, grid, objective, mixer, guidance, streams })
    }
}

/// The run's own streams in the first stage, others in each later one.
fn stage_streams(seed: u64, index: usize) -> RandomStreams {
    let streams = RandomStreams::new(seed, 0);
    match index {
        0 => streams,
        _ => RandomStreams::new(streams.seed_of(index as u64, Stream::Weights), 0),
    }
}

impl Task for DistillTask {
    fn kind(&self) -> &'static str {
        "distill"
    }

    fn total_updates(&self) -> u64 {
        self.config.total_updates()
    }

    fn updates_per_stage(&self) -> u64 {
        self.config.student.updates_per_stage
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.student.parameters().learned()
    }

    fn loss(&mut self, step: u64) -> Result<UpdateLoss> {
        // The student's dropout draws from the global generator.
        tch::manual_seed(self.streams.seed_of(step, Stream::Loss) as i64);
        let data = self.data.batch_at(step)?;
        let prompts = self.prompts(step, &data.conditioning, data.x0.size()[0])?;
        let per_stage = self.updates_per_stage();
        let stage_step = step % per_stage;
        let teacher =
            asked(&self.teacher, self.stage.guidance, &self.card, &self.config.thresholding)?;
        let states = {
            let request = MixRequest {
                step: stage_step,
                total_steps: per_stage,
                data: &data,
                prompts: &prompts,
                student: &self.student,
                teacher: &*teacher,
                streams: &self.stage.streams,
            };
            self.stage.mixer.next_states(&request)?
        };
        let networks = Networks::new(&self.student, &*teacher);
        let streams = &self.stage.streams;
        let request = LossRequest::new(stage_step, Phase::Student, &states, networks, streams);
        let terms = self.stage.objective.loss(&request)?;
        drop(teacher);
        let figures = Self::figures(&states, &terms.per_sample)?;
        self.pending = Some(Pending {
            states,
            student_x0: terms.student_x0,
            teacher_next: terms.teacher_next,
        });
        Ok(UpdateLoss { per_sample: terms.per_sample, figures })
    }

    fn after_update(&mut self, step: u64) -> Result<()> {
        let Some(Pending { states, student_x0, teacher_next }) = self.pending.take() else {
            return Ok(());
        };
        let (next, step) = (teacher_next.as_ref(), step % self.updates_per_stage());
        let Stage { mixer, streams, .. } = &mut self.stage;
        Ok(mixer.after_loss(step, &states, &student_x0, next, streams)?)
    }

    fn start_stage(&mut self, step: u64, average: &[(String, Tensor)]) -> Result<()> {
        let index = (step / self.updates_per_stage()) as usize;
        // The student as it was to be used, the averaged one, is the next teacher and the next student's start.
        state::restore("teacher", &self.teacher.parameters().learned(), average)?;
        state::restore("student", &self.student.parameters().learned(), average)?;
        self.stage = Stage::new(&self.config, &self.schedule, index)?;
        Ok(())
    }

    fn samples(&mut self, average: &[(String, Tensor)]) -> Result<Picture> {
        state::restore("moving average", &self.averaged.parameters().learned(), average)?;
        let per_class = self.config.output.samples_per_class;
        let (shape, device) = (self.data.image_shape(), self.device());
        grid_of_classes(
            &self.averaged,
            &self.sample_plan(),
            &self.student_card(),
            shape,
            per_class,
            device,
        )
    }

    fn save(&self, writer: &mut CheckpointWriter) -> Result<()> {
        if self.stage.index > 0 {
            writer.tensors(TEACHER, &self.teacher.parameters().named())?;
        }
        let SavedState { tensors, metadata } = self.stage.mixer.state()?;
        writer.tensors(MIXER, &tensors)?;
        writer.json(MIXER_STATE, &metadata)?;
        Ok(())
    }

    fn restore(&mut self, checkpoint: &Checkpoint, step: u64) -> Result<()> {
        // A checkpoint at the border of two stages is still of the first: the second starts with its first update.
        let index = (step.saturating_sub(1) / self.updates_per_stage()) as usize;
        if index > 0 {
            let saved = checkpoint.tensors(TEACHER)?;
            state::restore("teacher", &self.teacher.parameters().named(), &saved)?;
        }
        self.stage = Stage::new(&self.config, &self.schedule, index)?;
        let device = self.device();
        let tensors = checkpoint.tensors(MIXER)?;
        let on_device = |tensor: Tensor| tensor.f_to_device(device);
        let tensors: std::result::Result<Vec<_>, _> =
            tensors.into_iter().map(|(name, tensor)| Ok((name, on_device(tensor)?))).collect();
        let tensors = tensors.map_err(Error::torch("restore"))?;
        let metadata = checkpoint.json(MIXER_STATE)?;
        Ok(self.stage.mixer.restore(&SavedState { tensors, metadata })?)
    }

    fn export(&self, folder: &Path, average: &[(String, Tensor)], spent: Spent) -> Result<()> {
        let Spent { updates, seconds } = spent;
        state::restore("moving average", &self.averaged.parameters().learned(), average)?;
        Pipeline::write(
            folder,
            &self.averaged,
            &self.config.thresholding,
            Some(&self.stage.grid),
            &Card { updates, seconds, ..self.student_card() },
        )
    }
}

/// A teacher as it is asked: guided, then held inside the data's range.
fn asked<'a>(
    teacher: &'a Network,
    guidance: TeacherGuidance,
    card: &Card,
    thresholding: &Thresholding,
) -> Result<Box<dyn Denoiser + 'a>> {
    let null = match guidance {
        TeacherGuidance::Cfg { .. } | TeacherGuidance::CfgRange { .. } => {
            card.null_conditioning()?
        }
        TeacherGuidance::Embedded { .. } | TeacherGuidance::BakedIn => Conditioning::none(),
    };
    let guided = guidance.wrap(teacher, null)?;
    Ok(Box::new(Thresholded::new(guided, thresholding.clone())?))
}

fn ensure_fits(config: &DistillConfig, teacher: &Pipeline, data: &TrainingData) -> Result<()> {
    let invalid = |field: &str, value: String, expected: String| {
        Err(Error::InvalidConfig { field: field.to_owned(), value, expected })
    };
    let (taught, found) = (teacher.card.image_shape, data.image_shape());
    if taught != found {
        return invalid(
            "data",
            format!("images of channels, height, width {found:?}"),
            format!("{taught:?}, which the teacher was trained on"),
        );
    }
    if config.teacher.guidance.is_told_to_student() {
        return invalid(
            "teacher.guidance",
            config.teacher.guidance.as_str().to_owned(),
            "cfg or baked_in: the teacher takes no guidance weight".to_owned(),
        );
    }
    let has_null = teacher.card.null_class.is_some();
    if matches!(config.teacher.guidance, TeacherGuidance::Cfg { .. }) && !has_null {
        return invalid(
            "teacher.guidance",
            "cfg".to_owned(),
            "baked_in: the teacher was trained without a null class and cannot be guided"
                .to_owned(),
        );
    }
    if teacher.network.is_class_conditional() && data.null_class().is_none() {
        return invalid(
            "data",
            "without labels".to_owned(),
            "with labels, which the teacher asks for".to_owned(),
        );
    }
    ensure_classes(teacher, data)?;
    match &config.objective {
        ObjectiveConfig::Progressive(_) => Ok(()),
        other => invalid("objective.method", other.as_str().to_owned(), "progressive".to_owned()),
    }
}

/// Labels of the data must be those that the teacher learned.
fn ensure_classes(teacher: &Pipeline, data: &TrainingData) -> Result<()> {
    let (Some(embeds), Some(found)) =
        (teacher.network.config().num_class_embeds.map(i64::from), data.null_class())
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
    let (field, value) = ("data".to_owned(), format!("of {found} classes"));
    Err(Error::InvalidConfig { field, value, expected })
}
