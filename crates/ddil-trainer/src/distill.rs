//! The task of `ddil distill`: a few-step student from a teacher.

mod averaged;
mod checks;
mod conditioned;
mod meters;
mod prompted;
mod prompts;
mod roles;
mod spilling;
mod stage;
mod teacher_plan;

use std::fs::File;
use std::path::{Path, PathBuf};

use ddil_core::{
    Clock, Conditioning, Data, Denoiser, Feedback, MixBatch, RandomStreams, RolloutNetworks,
    SavedState, Source, States, Stream, Thresholded, with_boundary,
};
use ddil_evaluate::{Drawing, Scores};
use ddil_losses::{Critic, LossRequest, LossTerms, Networks, Phase, Requirements, TeacherGuidance};
use ddil_models::{NetworkDenoiser, Placement};
use ddil_pipelines::{
    Card, Guidance, Image, Pipeline, PipelineParts, SamplePlan, Scheduler, grid_of_classes,
    grid_of_prompts, write_model_card,
};
use ddil_schedulers::{NoiseSchedule, PreviousTimestep, SamplerConfig, Thresholding, Timesteps};
use tch::{Device, Kind, Tensor};

pub(crate) use self::averaged::restore_average;
use self::checks::ensure_fits;
use self::conditioned::Conditioned;
use self::meters::{Meters, Place};
use self::prompted::Prompted;
use self::prompts::{PromptPlan, TrajectoryPrompts};
use self::roles::Roles;
use self::stage::Stage;
use self::teacher_plan::TeacherPlan;
use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::config::{DistillConfig, LoraExport, PromptSource};
use crate::data::{DataSource, TrainingData};
use crate::error::{Error, Result};
use crate::evaluation::{EvaluationConfig, Evaluator, not_evaluated};
use crate::evidence::Evidence;
use crate::interrupt::Interrupt;
use crate::memory::warn_of_byte_budget;
use crate::roster::Roster;
use crate::session::{Spent, Task, UpdateLoss};
use crate::state;
use crate::teacher_classes::TeacherClasses;

/// A distillation in progress: the mixer collects states, the teacher labels them, the objective computes the loss.
#[derive(Debug)]
pub struct DistillTask {
    config: DistillConfig,
    schedule: NoiseSchedule,
    data: TrainingData,
    /// The conditioning of backward trajectories.
    prompts: TrajectoryPrompts,
    /// What states were conditioned on so far, if that is recorded.
    conditioned: Option<Conditioned>,
    streams: RandomStreams,
    card: Card,
    /// The other parts of the teacher's pipeline, which the exported student shares.
    parts: PipelineParts,
    /// Text conditioning of a text-to-image model.
    prompted: Option<Prompted>,
    guide: Guidance,
    /// How the teacher of the first stage is sampled for a grid.
    teacher_plan: Option<TeacherPlan>,
    roles: Roles,
    stage: Stage,
    meters: Meters,
    /// None unless the run is evaluated.
    evaluator: Option<Evaluator>,
    run_folder: PathBuf,
    /// The lock of the buffer's spill folder, held while this is open.
    spill_lock: Option<File>,
    /// The batch of the present update, shared by its phases and the mixer.
    pending: Option<Pending>,
}

/// The states of an update and the outputs computed for them so far.
#[derive(Debug)]
struct Pending {
    states: States,
    real: Option<Data>,
    student_x0: Option<Tensor>,
    teacher_next: Option<Tensor>,
    /// The losses of the student's phase.
    losses: Option<Tensor>,
}

/// Samples per call of a network when a grid is sampled; each pixel of a latent is decoded to many pixels.
fn samples_at_once(are_latents: bool) -> u32 {
    if are_latents { 4 } else { 100 }
}

const TEACHER: &str = "teacher.safetensors";
const TARGET: &str = "target.safetensors";
const MIXER: &str = "mixer.safetensors";
const MIXER_STATE: &str = "mixer.json";
const CONDITIONED: &str = "conditioned.json";

/// The task that a config describes with its teacher and its data.
struct Fitted {
    config: DistillConfig,
    data: DataSource,
    prompts: PromptPlan,
    stage: Stage,
}

impl Fitted {
    /// Reads the data's properties and checks that everything fits; the teacher is not evaluated.
    fn new(config: &DistillConfig, teacher: &Pipeline) -> Result<Self> {
        let data = DataSource::find(&config.data, teacher)?;
        data.ensure_batch_size(config.data.batch_size)?;
        let output = teacher.network.prediction_type();
        let objective = config.objective.clone().trained_to_predict(output);
        let config = DistillConfig { objective, ..config.clone() };
        let stage = Stage::new(&config, teacher.network.schedule(), 0, &config.run.path())?;
        ensure_fits(&config, &stage, teacher, &data)?;
        warn_of_byte_budget(&config, teacher)?;
        stage.mixer.ensure_batch_size(config.data.batch_size as usize)?;
        let prompts = PromptPlan::new(&config, teacher, &data, stage.objective.requirements())?;
        Ok(Self { config, data, prompts, stage })
    }
}

/// A distillation whose parts have been checked against each other, before its data are encoded.
struct Prepared {
    config: DistillConfig,
    placement: Placement,
    schedule: NoiseSchedule,
    data: DataSource,
    prompts: PromptPlan,
    /// Number of the teacher's labels; none without classes.
    num_labels: Option<u32>,
    card: Card,
    parts: PipelineParts,
    teacher_plan: Option<TeacherPlan>,
    roles: Roles,
    stage: Stage,
}

impl Prepared {
    /// Reads the teacher, checks the data and builds the networks: everything that can fail fails here.
    fn new(config: &DistillConfig) -> Result<Self> {
        config.ensure()?;
        let device = config.run.device()?;
        let placement =
            Placement { device, kind: Kind::Float, channels_last: config.run.channels_last };
        let teacher = Pipeline::open(&config.teacher.path, placement, config.run.precision)?;
        // No effect on the teacher, which has no backward pass, but student and critic are built from its
        // configuration.
        teacher
            .network
            .model()
            .set_activation_checkpointing(config.run.activation_checkpointing)?;
        let Fitted { config, data, prompts, stage } = Fitted::new(config, &teacher)?;
        let schedule = teacher.network.schedule().clone();
        let num_labels = teacher.network.config().num_class_embeds();
        // Grids, and `ddil sample` of the student, require a name for each class.
        let class_names =
            TeacherClasses::of(&teacher).map_or_else(Vec::new, |own| own.card_names());
        // A latent U-Net accepts other sizes than its training size.
        let card = Card { image_shape: data.image_shape(), class_names, ..teacher.card.clone() };
        let student = student_card(&config, &card);
        let batch_size = samples_at_once(data.is_encoded());
        let teacher_plan = TeacherPlan::new(&teacher, &config, &student, batch_size)?;
        let Pipeline { network: teacher, parts, .. } = teacher;
        let requirements = stage.objective.requirements();
        let roster = Roster::first(&config, requirements, teacher.config(), card.image_shape)?;
        let roles = Roles::new(&roster, teacher, config.run.seed)?;
        let prepared = Self {
            config,
            placement,
            schedule,
            data,
            prompts,
            num_labels,
            card,
            parts,
            teacher_plan,
            roles,
            stage,
        };
        let sampling = &prepared.stage.sampling;
        scheduler(&prepared.config, &prepared.schedule, sampling, &prepared.roles.student)?;
        Ok(prepared)
    }

    /// Opens the data, which are encoded first if necessary.
    fn open(self, interrupt: &Interrupt) -> Result<DistillTask> {
        let Self {
            config, placement, schedule, data, card, parts, teacher_plan, roles, stage, ..
        } = self;
        let (seed, device) = (config.run.seed, placement.device);
        let encoders = (&parts, placement);
        let data = data.open(&config.data, seed, device, Some(encoders), interrupt)?;
        let data = if self.num_labels.is_some() { data } else { data.ignore_labels() };
        let prompts = self.prompts.open(&config, &data, encoders, interrupt)?;
        let labels = (self.num_labels.unwrap_or(0) as usize, card.null_class);
        let conditioned = Conditioned::new(config.prompts.source, labels, device);
        let prompted = Prompted::new(&data, &config.output.prompts, &parts, placement)?;
        let guide = guide(&card, prompted.as_ref());
        let meters = Meters::new(&schedule, &config.objective);
        let evaluator = evaluation_of(&config).open(pixels_of(&card, &parts), device, interrupt)?;
        let streams = RandomStreams::new(seed, 0);
        Ok(DistillTask {
            run_folder: config.run.path(),
            spill_lock: None,
            config,
            schedule,
            data,
            prompts,
            conditioned,
            streams,
            card,
            parts,
            prompted,
            guide,
            teacher_plan,
            roles,
            stage,
            meters,
            evaluator,
            pending: None,
        })
    }
}

fn evaluation_of(config: &DistillConfig) -> EvaluationConfig<'_> {
    let DistillConfig { run, data, evaluate, output, .. } = config;
    EvaluationConfig { run, data, evaluate, output }
}

/// Channels, height and width of the images of a model of pixels; none for a model of latents.
fn pixels_of(card: &Card, parts: &PipelineParts) -> Option<[i64; 3]> {
    (!parts.class().is_text_to_image()).then_some(card.image_shape)
}

/// How a model with that card is guided.
fn guide(card: &Card, prompted: Option<&Prompted>) -> Guidance {
    match prompted.and_then(Prompted::empty) {
        Some(empty) => Guidance::of_prompts(card, empty),
        // By its classes, or by a guidance embedding.
        None => Guidance::of_classes(card),
    }
}

/// The teacher with its guidance; thresholding is applied after that.
fn guided<'a>(
    guide: &Guidance,
    teacher: impl Denoiser + 'a,
    guidance: TeacherGuidance,
) -> Result<Box<dyn Denoiser + 'a>> {
    let null = match guidance {
        TeacherGuidance::Cfg { .. } | TeacherGuidance::CfgRange { .. } => guide.null()?,
        TeacherGuidance::Embedded { .. } | TeacherGuidance::BakedIn => Conditioning::none(),
    };
    Ok(guidance.wrap(teacher, null)?)
}

/// The sampler of students of that method, in diffusers' terms; `sampling` are the timesteps of their stage.
fn scheduler(
    config: &DistillConfig,
    schedule: &NoiseSchedule,
    sampling: &Timesteps,
    student: &NetworkDenoiser,
) -> Result<Scheduler> {
    let thresholding = if config.thresholding_places.inference {
        config.thresholding.clone()
    } else {
        Thresholding::None
    };
    let sampler = config.objective.sampler_config(schedule);
    Ok(Scheduler::new(student, sampler, &thresholding, Some(sampling))?)
}

impl DistillTask {
    /// The task at its first update: the student has the teacher's weights.
    ///
    /// Images with captions, and prompts, are encoded first, unless a cache contains them.
    ///
    /// # Errors
    ///
    /// Errors of the config, the data and the teacher; [`Error::Invalid`] if they do not fit each other.
    pub fn new(config: &DistillConfig) -> Result<Self> {
        Self::interruptible(config, &Interrupt::default())
    }

    /// The same, with a stop request that is checked while data are encoded.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`Error::Interrupted`].
    pub fn interruptible(config: &DistillConfig, interrupt: &Interrupt) -> Result<Self> {
        Prepared::new(config)?.open(interrupt)
    }

    /// Checks that such a task can be built, without encoding or writing anything: config, data and the teacher's
    /// settings against each other, and names and shapes of the teacher's weights, whose values are not read.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), except for damaged values of the teacher's weights and lack of memory.
    pub fn check(config: &DistillConfig) -> Result<()> {
        config.ensure()?;
        let device = config.run.device()?;
        let teacher = Pipeline::open_without_weights(&config.teacher.path)?;
        let Fitted { config, data, stage, .. } = Fitted::new(config, &teacher)?;
        let (requirements, network) = (stage.objective.requirements(), &teacher.network);
        Roster::first(&config, requirements, network.config(), data.image_shape())?
            .ensure(network, config.run.seed)?;
        scheduler(&config, network.schedule(), &stage.sampling, network)?;
        let card = Card { image_shape: data.image_shape(), ..teacher.card.clone() };
        evaluation_of(&config).check(pixels_of(&card, &teacher.parts), device)?;
        Ok(Pipeline::ensure_weights(&config.teacher.path)?)
    }

    /// The stage of that index, with an empty buffer.
    fn stage(&self, index: usize) -> Result<Stage> {
        Stage::new(&self.config, &self.schedule, index, &self.run_folder)
    }

    /// The networks of the present stage, whose teacher is the student of the previous stage with the weights
    /// `average`.
    fn next_roles(&self, average: &[(String, Tensor)]) -> Result<Roles> {
        let teacher = self.roles.student.config();
        let shape = self.card.image_shape;
        let roster = Roster::next(&self.config, self.requirements(), teacher, shape)?;
        self.roles.next(&roster, average, self.config.run.seed)
    }

    fn device(&self) -> Device {
        self.roles.student.placement().device
    }

    fn requirements(&self) -> Requirements {
        self.stage.objective.requirements()
    }

    /// The thresholding at a place, if it is enabled there.
    fn thresholding(&self, on: bool) -> Thresholding {
        if on { self.config.thresholding.clone() } else { Thresholding::None }
    }

    /// The states of an update.
    fn collect(&mut self, step: u64) -> Result<Pending> {
        let data = self.data.batch_at(step)?;
        let batch = data.x0.size()[0];
        let of_data = (&data.conditioning, batch);
        let prompts = self.prompts.at(step, &self.streams, of_data, self.device())?;
        // One weight per sample if guidance is drawn: a new one for each trajectory that may start here.
        let (guidance, device) = (self.config.teacher.guidance, self.device());
        let mut rng = self.streams.rng(step, Stream::Guidance);
        let mut condition =
            |conditioning| guidance.condition(conditioning, batch as usize, device, &mut rng);
        let data = Data::new(data.x0).with_conditioning(condition(data.conditioning)?);
        let prompts = condition(prompts)?;
        let real =
            self.requirements().discriminator.then(|| self.data.real_at(step)).transpose()?;

        let places = self.config.thresholding_places;
        let [of_teacher, of_student] =
            [places.teacher, places.rollout].map(|on| self.thresholding(on));
        let Roles { teacher, student, .. } = &self.roles;
        let (meters, logged) = (&self.meters, self.is_logged(step));
        let teacher = guided(&self.guide, teacher, self.stage.guidance)?;
        let teacher = Thresholded::new(teacher, of_teacher)?;
        let teacher = meters.put_on(teacher, Place::TeacherRollout, logged);
        let student = Thresholded::new(student, of_student)?;
        let student = meters.put_on(student, Place::StudentRollout, logged);
        let student = with_boundary(student, &self.sampler());
        let total_steps = self.config.student.updates_per_stage;
        let clock = Clock::new(step % total_steps, total_steps, self.stage.streams);
        let apart = self.config.prompts.source != PromptSource::Data;
        let batch = MixBatch::new(&data).with_prompts(&prompts).with_prompted_noise(apart);
        let networks = RolloutNetworks::new(&*student, &teacher);
        let mixer = &mut self.stage.mixer;
        let before = mixer.counters().prompted;
        let states = mixer.next_states(&clock, &batch, &networks)?;
        if let Some(conditioned) = &mut self.conditioned {
            conditioned.count(&states, mixer.counters().prompted - before)?;
        }
        Ok(Pending { states, real, student_x0: None, teacher_next: None, losses: None })
    }

    /// The objective's loss on the present states in one phase.
    fn terms(&self, step: u64, phase: Phase, pending: &Pending) -> Result<LossTerms> {
        let (roles, places) = (&self.roles, self.config.thresholding_places);
        self.meters.rows_are(&pending.states.sources);
        let logged = self.is_logged(step);
        let held = |network, on, place| -> Result<Thresholded<&NetworkDenoiser>> {
            let held = Thresholded::new(network, self.thresholding(on))?;
            Ok(self.meters.put_on(held, place, logged))
        };
        let teacher = guided(&self.guide, &roles.teacher, self.stage.guidance)?;
        let teacher = Thresholded::new(teacher, self.thresholding(places.teacher))?;
        let teacher = self.meters.put_on(teacher, Place::Teacher, logged);
        let student = held(&roles.student, places.student_loss, Place::Student)?;
        let target = roles.target.as_ref();
        let target =
            target.map(|target| held(&target.network, places.target, Place::Target)).transpose()?;
        let critic = roles.critic.as_ref();
        let in_gradient = critic
            .map(|critic| held(&critic.fake_score, places.critic, Place::Critic))
            .transpose()?;
        let mut networks =
            Networks::new(if places.student_loss { &student } else { &roles.student }, &teacher);
        networks.target = target.as_ref().map(|target| target as _);
        networks.critic = critic.zip(in_gradient.as_ref()).map(|(critic, thresholded)| {
            let networks = Critic::new(&critic.fake_score).with_thresholded(thresholded);
            match &critic.discriminator {
                Some(discriminator) => networks.with_discriminator(discriminator),
                None => networks,
            }
        });
        let stage_step = step % self.config.student.updates_per_stage;
        let streams = &self.stage.streams;
        let request = LossRequest::new(stage_step, phase, &pending.states, networks, streams)
            .with_student_x0(pending.student_x0.as_ref())
            .with_real(pending.real.as_ref());
        Ok(self.stage.objective.loss(&request)?)
    }

    /// Whether a line of the record may include this update: one is written now or before the student's next update.
    ///
    /// Figures make the host wait for the device, so they are computed for these updates only.
    fn is_logged(&self, step: u64) -> bool {
        let (interval, total) = (self.config.output.log_interval, self.config.total_updates());
        let trains = |step: &u64| self.phases(*step).contains(&Phase::Student);
        let next = (step + 1..total).find(trains).unwrap_or(total);
        next == total || next / interval > step / interval
    }

    /// The student's sampler.
    fn sampler(&self) -> SamplerConfig {
        self.config.objective.sampler_config(&self.schedule)
    }

    /// The sampling configuration of the present student.
    fn sample_plan(&self, card: &Card) -> SamplePlan {
        SamplePlan {
            steps: self.stage.sampling.len() as u32,
            guidance_scale: card.default_guidance_scale(),
            sampler: self.sampler(),
            solver: None,
            thresholding: self.thresholding(self.config.thresholding_places.inference),
            timesteps: Some(self.stage.sampling.as_slice().to_vec()),
            previous: PreviousTimestep::default(),
            batch_size: samples_at_once(self.prompted.is_some()),
            seed: self.config.run.seed,
        }
    }

    /// The sampling configuration of an evaluation.
    fn evaluation_plan(&self, card: &Card) -> SamplePlan {
        let (own, section) = (self.sample_plan(card), &self.config.evaluate);
        let of_latents = self.prompted.is_some().then_some(own.batch_size);
        let batch_size = of_latents.map_or(section.batch_size, |most| most.min(section.batch_size));
        let plan = SamplePlan { batch_size, seed: section.seed, ..own };
        match section.steps.filter(|steps| *steps != plan.steps) {
            Some(steps) => SamplePlan { steps, timesteps: None, ..plan },
            None => plan,
        }
    }

    /// The same in diffusers' terms.
    fn scheduler(&self) -> Result<Scheduler> {
        scheduler(&self.config, &self.schedule, &self.stage.sampling, &self.roles.student)
    }

    /// Whether only the adapter is exported.
    fn exports_adapter(&self) -> bool {
        let lora = self.config.student.lora.as_ref();
        lora.is_some_and(|lora| lora.export == LoraExport::Adapter)
    }

    fn student_card(&self) -> Card {
        student_card(&self.config, &self.card)
    }

    /// A grid of a network's samples.
    fn grid(
        &self,
        network: &NetworkDenoiser,
        plan: &SamplePlan,
        card: &Card,
        guide: &Guidance,
    ) -> Result<Image> {
        let (per_class, shape) = (self.config.output.samples_per_class, self.data.image_shape());
        let Some(prompted) = &self.prompted else {
            return Ok(grid_of_classes(network, plan, card, shape, per_class, self.device())?);
        };
        let vae = self.parts.autoencoder(network.placement())?;
        let decode = |latents: &Tensor| {
            let _no_grad = tch::no_grad_guard();
            Ok(vae.decode_scaled(latents)?)
        };
        Ok(grid_of_prompts(network, plan, guide, &prompted.shown, per_class, shape, decode)?)
    }
}

/// The card of the student of a teacher with that card.
fn student_card(config: &DistillConfig, teacher: &Card) -> Card {
    let (guidance_scale, guidance_range) = match config.teacher.guidance {
        TeacherGuidance::Cfg { scale } => (Some(scale), None),
        TeacherGuidance::BakedIn => (teacher.guidance_scale, None),
        // Without the guidance weight as an input, an adapter has learned the average over the range.
        TeacherGuidance::CfgRange { min, max } if config.student.lora.is_some() => {
            (Some(1.0 + f64::midpoint(min, max)), None)
        }
        TeacherGuidance::Embedded { min, max } | TeacherGuidance::CfgRange { min, max } => {
            (None, Some([1.0 + min, 1.0 + max]))
        }
    };
    Card {
        method: config.objective.as_str().to_owned(),
        guidance_scale,
        guidance_range,
        priors: Some(config.mixing.priors.at(1.0)),
        adapter: None,
        seed: config.run.seed,
        ..teacher.clone()
    }
}

/// The loss by source and the share of each source in the student's phase, and the terms of the loss, for the record.
fn figures(
    states: Option<&States>,
    per_sample: &Tensor,
    parts: &[(&'static str, Tensor)],
) -> Result<Vec<(String, f64)>> {
    let mut figures = Vec::new();
    if let Some(states) = states {
        let values: Vec<f64> = Vec::try_from(per_sample.detach().to_kind(Kind::Double))
            .map_err(Error::torch("figures"))?;
        for source in Source::ALL {
            let of_source = states.sources.iter().zip(&values).filter(|(s, _)| **s == source);
            let of_source: Vec<f64> = of_source.map(|(_, value)| *value).collect();
            if !of_source.is_empty() {
                let name = source.as_str();
                let mean = of_source.iter().sum::<f64>() / of_source.len() as f64;
                figures.push((format!("loss_{name}"), mean));
                let share = of_source.len() as f64 / values.len() as f64;
                figures.push((format!("share_{name}"), share));
            }
        }
    }
    for (name, values) in parts {
        figures.push(((*name).to_owned(), values.mean(Kind::Double).double_value(&[])));
    }
    Ok(figures)
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

    fn trained(&self) -> &'static [Phase] {
        if self.roles.critic.is_some() {
            &[Phase::Student, Phase::Critic]
        } else {
            &[Phase::Student]
        }
    }

    fn phases(&self, step: u64) -> &'static [Phase] {
        self.stage.objective.phases(step % self.updates_per_stage())
    }

    fn parameters(&self, phase: Phase) -> Vec<(String, Tensor)> {
        self.roles.parameters(phase)
    }

    fn loss(&mut self, step: u64, phase: Phase) -> Result<UpdateLoss> {
        let mut pending = if let Some(pending) = self.pending.take() {
            pending
        } else {
            self.roles.watches.reset();
            // Dropout draws from the global generator.
            tch::manual_seed(self.streams.seed_of(step, Stream::Loss) as i64);
            self.collect(step)?
        };
        self.roles.open_for(phase);
        let LossTerms { per_sample, student_x0, teacher_next, parts, .. } =
            self.terms(step, phase, &pending)?;
        if phase == Phase::Student {
            pending.losses = Some(per_sample.detach());
        }
        let figures = if self.is_logged(step) {
            let of_student = (phase == Phase::Student).then_some(&pending.states);
            let conditioned = self.conditioned.as_ref().filter(|_| phase == Phase::Student);
            let conditioned = conditioned.map(Conditioned::figures).transpose()?;
            [
                figures(of_student, &per_sample, &parts)?,
                self.meters.figures()?,
                conditioned.unwrap_or_default(),
            ]
            .concat()
        } else {
            Vec::new()
        };
        pending.student_x0 = Some(student_x0);
        pending.teacher_next = teacher_next;
        self.pending = Some(pending);
        Ok(UpdateLoss { per_sample, figures, outputs_sum: self.roles.watches.sum()? })
    }

    fn inspect(&mut self, step: u64, phase: Phase) -> Result<Option<Evidence>> {
        let Some(pending) = &self.pending else { return Ok(None) };
        let data = self.data.batch_at(step)?;
        let mut evidence = Evidence::of_states(&pending.states)?;
        evidence.check("data", "data.x0", &data.x0)?;
        evidence.check_conditioning("data", &data.conditioning)?;
        if let Some(real) = &pending.real {
            evidence.check("real data", "real.x0", &real.x0)?;
            evidence.check_conditioning("real data", &real.conditioning)?;
        }
        for (name, network) in self.roles.named() {
            evidence.check_weights(name, &network.parameters().named())?;
        }
        self.roles.watches.inspect_values();
        evidence.check("states", "states.x_t", &pending.states.x_t)?;
        evidence.check("timesteps", "states.timesteps", &pending.states.timesteps)?;
        evidence.check_conditioning("states", &pending.states.conditioning)?;
        tch::manual_seed(self.streams.seed_of(step, Stream::Loss) as i64);
        self.terms(step, phase, pending)?;
        self.roles.watches.take().iter().for_each(|outputs| evidence.add_outputs(outputs));
        Ok(Some(evidence))
    }

    fn after_update(&mut self, step: u64) -> Result<()> {
        if self.phases(step).contains(&Phase::Student) {
            self.roles.follow()?;
        }
        let Some(pending) = self.pending.take() else { return Ok(()) };
        let Pending { states, student_x0: Some(student_x0), teacher_next, losses, .. } = pending
        else {
            return Ok(());
        };
        let thresholding = self.thresholding(self.config.thresholding_places.rollout);
        let student_x0 = thresholding.apply(&student_x0)?;
        let total_steps = self.updates_per_stage();
        let Stage { mixer, streams, .. } = &mut self.stage;
        let clock = Clock::new(step % total_steps, total_steps, *streams);
        let feedback = Feedback::new(&student_x0)
            .with_teacher_next(teacher_next.as_ref())
            .with_losses(losses.as_ref());
        Ok(mixer.feed_back(&clock, &states, &feedback)?)
    }

    fn enter(&mut self, folder: &Path) -> Result<()> {
        folder.clone_into(&mut self.run_folder);
        self.spill_lock = spilling::take_folder(&self.config, folder)?;
        self.stage = self.stage(self.stage.index)?;
        Ok(())
    }

    fn start_stage(&mut self, step: u64, average: &[(String, Tensor)]) -> Result<()> {
        self.stage = self.stage((step / self.updates_per_stage()) as usize)?;
        // The averaged student is the next teacher and the next student's initialisation.
        self.roles = self.next_roles(average)?;
        Ok(())
    }

    fn samples(&mut self, average: &[(String, Tensor)]) -> Result<Image> {
        let card = self.student_card();
        let (student, plan) = (self.roles.averaged(average)?, self.sample_plan(&card));
        self.grid(student, &plan, &card, &guide(&card, self.prompted.as_ref()))
    }

    fn teacher_samples(&mut self) -> Result<Option<(Image, String)>> {
        // The teacher of a later stage is a student.
        let Some(teacher) = self.teacher_plan.as_ref().filter(|_| self.stage.index == 0) else {
            return Ok(None);
        };
        let image = self.grid(&self.roles.teacher, &teacher.plan, &self.card, &self.guide)?;
        Ok(Some((image, teacher.description())))
    }

    fn evaluate(
        &mut self,
        average: &[(String, Tensor)],
        interrupt: &Interrupt,
    ) -> Result<Option<Scores>> {
        let Some(evaluator) = &self.evaluator else { return Err(not_evaluated()) };
        let (card, device) = (self.student_card(), self.device());
        let (plan, samples) = (self.evaluation_plan(&card), self.config.evaluate.samples);
        let student = self.roles.averaged(average)?;
        let drawing = Drawing::of_network(student, &card, &plan, device, samples);
        let (Some(prompted), Some(encoded)) = (&self.prompted, self.data.encoded()) else {
            return evaluator.scores(&drawing, interrupt);
        };
        // The data's own prompts in turn.
        let prompts = self.data.first_prompts(samples as usize);
        let vae = self.parts.autoencoder(student.placement())?;
        let drawing = drawing
            .with_conditioning(guide(&card, Some(prompted)), |rows| {
                let of_row = |row: i64| prompts.get(row as usize % prompts.len().max(1)).copied();
                let rows: Vec<i64> = rows.filter_map(of_row).collect();
                Ok(prompted::of_rows(encoded, &rows)?.to_device(device)?)
            })
            .with_decoder(|latents| {
                let one = |latent: &Tensor| {
                    let image = vae.decode_scaled(latent).map_err(ddil_pipelines::Error::from)?;
                    Ok(image.to_device(Device::Cpu))
                };
                let images: ddil_evaluate::Result<Vec<Tensor>> =
                    latents.split(1, 0).iter().map(one).collect();
                Ok(Tensor::cat(&images?, 0))
            });
        evaluator.scores(&drawing, interrupt)
    }

    fn save(&self, writer: &mut CheckpointWriter) -> Result<()> {
        if self.stage.index > 0 {
            writer.tensors(TEACHER, &self.roles.teacher.parameters().named())?;
        }
        if let Some(target) = &self.roles.target {
            writer.tensors(TARGET, &target.network.parameters().learned())?;
        }
        let SavedState { tensors, metadata, files, .. } = self.stage.mixer.save()?;
        writer.tensors(MIXER, &tensors)?;
        writer.json(MIXER_STATE, &metadata)?;
        for file in &files {
            writer.link(file)?;
        }
        if let Some(conditioned) = &self.conditioned {
            writer.json(CONDITIONED, &conditioned.saved()?)?;
        }
        Ok(())
    }

    fn restore(&mut self, checkpoint: &Checkpoint, step: u64) -> Result<()> {
        let index = stage::index_after(&self.config, step);
        self.stage = self.stage(index)?;
        if index > 0 {
            // A network of the student's configuration; its weights come from the file.
            let any = self.roles.student.parameters().learned();
            self.roles = self.next_roles(&any)?;
            let saved = checkpoint.tensors(TEACHER)?;
            state::restore("teacher", &self.roles.teacher.parameters().named(), &saved)?;
        }
        if let Some(target) = &self.roles.target {
            let saved = checkpoint.tensors(TARGET)?;
            state::restore("target", &target.network.parameters().learned(), &saved)?;
        }
        if let Some(conditioned) = &mut self.conditioned {
            conditioned.restore(&checkpoint.json(CONDITIONED)?)?;
        }
        let device = self.device();
        let tensors = checkpoint.tensors(MIXER)?;
        let on_device = |tensor: Tensor| tensor.f_to_device(device);
        let tensors: std::result::Result<Vec<_>, _> =
            tensors.into_iter().map(|(name, tensor)| Ok((name, on_device(tensor)?))).collect();
        let tensors = tensors.map_err(Error::torch("restore"))?;
        let metadata = checkpoint.json(MIXER_STATE)?;
        let files = checkpoint.linked();
        Ok(self.stage.mixer.restore(&SavedState::new(tensors, metadata).with_files(files))?)
    }

    fn export(&self, folder: &Path, average: &[(String, Tensor)], spent: Spent) -> Result<()> {
        let Spent { updates, seconds } = spent;
        let card = Card { updates, seconds, ..self.student_card() };
        let student = self.roles.averaged(average)?;
        if self.exports_adapter() {
            let scheduler = self.scheduler()?;
            return Ok(Pipeline::write_adapter(folder, student, &scheduler, card, &self.parts)?);
        }
        Pipeline::write(folder, student, &self.scheduler()?, &card, Some(&self.parts))?;
        Ok(write_model_card(folder).map(drop)?)
    }
}
