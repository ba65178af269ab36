//! One training variant with its own networks, optimizers and mixer.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use ddil_core::{
    Clock, Conditioning, Data, Denoiser, Feedback, Guided, MixBatch, Mixer, RandomStreams,
    RolloutNetworks, States, Stream, Thresholded, with_boundary,
};
use ddil_libtorch::{TensorList, foreach_lerp_};
use ddil_losses::{Critic, LossRequest, LossTerms, Networks, Objective, ObjectiveConfig, Phase};
use ddil_models::{DiscriminatorHeadConfig, NetworkConfig, NetworkDenoiser, NetworkDiscriminator};
use ddil_schedulers::{NoiseSchedule, Prediction, Thresholding};
use ddil_trainer::{AdamW, AdamWConfig, Ema, EmaConfig, ensure_finite};
use tch::{Device, Kind, Tensor};

use super::meter::{Metered, Meters, Role};
use super::variant::Variant;
use super::{Result, Workload};
use crate::process::{processor_time, wait_for};

const STEPS: u32 = 4;
const GUIDANCE_SCALE: f64 = 3.0;

/// The class index for no condition, and the number of the other classes.
const NULL_CLASS: i64 = 10;

/// The cost of a round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Round {
    /// Wall time.
    pub wall: Duration,
    /// Processor time of all threads, if the system reports it.
    pub processor: Option<Duration>,
    /// The mixer, including rollouts.
    pub states: Duration,
    /// Backward passes.
    pub backward: Duration,
    /// Clipping, optimizer steps, moving averages.
    pub optimizer: Duration,
}

/// A training variant and its state.
pub struct TrainingLoop {
    /// The variant.
    pub variant: Variant,
    /// Passes of its networks.
    pub meters: Meters,
    /// The rounds measured so far.
    pub rounds: Vec<Round>,
    batch: i64,
    side: i64,
    device: Device,
    learning_rate: f64,
    method: ObjectiveConfig,
    objective: Box<dyn Objective>,
    mixer: Mixer,
    streams: RandomStreams,
    teacher: NetworkDenoiser,
    student: NetworkDenoiser,
    student_optimizer: AdamW,
    ema: Ema,
    target: Option<Target>,
    critic: Option<CriticNetworks>,
}

/// The inputs and the results of an update.
pub struct Update {
    /// The mixer's batch.
    pub states: States,
    /// The discriminator's real data.
    pub real: Data,
    /// The loss of each phase.
    pub losses: Vec<f64>,
}

/// The moving average of the student that computes targets.
struct Target {
    network: NetworkDenoiser,
    decay: f64,
}

/// The critic, the head of its discriminator, and the optimizer of both.
struct CriticNetworks {
    fake_score: NetworkDenoiser,
    discriminator: NetworkDiscriminator,
    optimizer: AdamW,
}

/// Returns 0 for all clean data, at no cost.
struct Free<'a>(&'a NoiseSchedule);

impl Denoiser for Free<'_> {
    fn predict(&self, x_t: &Tensor, _: &Tensor, _: &Conditioning) -> ddil_core::Result<Prediction> {
        Ok(Prediction { x0: x_t.zeros_like(), epsilon: x_t.shallow_clone() })
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.0
    }
}

impl TrainingLoop {
    /// Creates networks, optimizers and mixer before the first update.
    ///
    /// # Errors
    ///
    /// Errors of the parts about their settings.
    pub fn new(variant: Variant, workload: &Workload) -> Result<Self> {
        let schedule = Workload::schedule()?;
        let method = variant.method.objective();
        let training = method.training_grid(&schedule, STEPS)?;
        let sampling = method.sampling_grid(&schedule, STEPS)?;
        let objective = method.build(&schedule, &training)?;
        let sampler = method.sampler_config(&schedule).build(&schedule)?;
        let mixer =
            Mixer::with_rollout(variant.mixer(workload.pool)?, training, sampling, sampler)?;
        let teacher = workload.teacher()?;
        let student = teacher.duplicate(true)?;
        let learned = || student.parameters().learned();
        let requirements = objective.requirements();
        let target = requirements
            .target_decay
            .map(|decay| {
                Ok::<_, ddil_trainer::Error>(Target { network: student.duplicate(false)?, decay })
            })
            .transpose()?;
        let critic = requirements.critic.then(|| CriticNetworks::new(&teacher)).transpose()?;
        Ok(Self {
            student_optimizer: AdamWConfig::default().build(learned())?,
            ema: EmaConfig::default().build(learned())?,
            variant,
            meters: Meters::default(),
            rounds: Vec::new(),
            batch: workload.batch,
            side: workload.side,
            device: workload.device,
            learning_rate: workload.learning_rate,
            method,
            objective,
            mixer,
            streams: RandomStreams::new(0, 0),
            teacher,
            student,
            target,
            critic,
        })
    }

    /// The random streams of an update.
    pub fn streams(&self) -> &RandomStreams {
        &self.streams
    }

    /// Writes the current weights, one safetensors file per network: `teacher`, `student` and its average `ema`, and,
    /// if the method has them, `target`, `critic` and the discriminator's `head`.
    ///
    /// # Errors
    ///
    /// If the folder does not exist or a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let networks = [("teacher", &self.teacher), ("student", &self.student)].into_iter();
        let target = self.target.as_ref().map(|target| ("target", &target.network));
        let critic = self.critic.as_ref().map(|critic| ("critic", &critic.fake_score));
        for (name, network) in networks.chain(target).chain(critic) {
            network.parameters().save(folder.join(format!("{name}.safetensors")))?;
        }
        if let Some(critic) = &self.critic {
            critic.discriminator.head().parameters().save(folder.join("head.safetensors"))?;
        }
        let averages = folder.join("ema.safetensors");
        Ok(ddil_models::weights::save(self.ema.tensors(), averages, &BTreeMap::new())?)
    }

    /// Random data of an update, and the same data in another order.
    fn data(&self, step: u64, stream: Stream) -> Result<Data> {
        let mut generator = self.streams.generator(step, stream, self.device)?;
        let labels = generator.randint(0, NULL_CLASS, [self.batch])?;
        let x0 = generator.normal([self.batch, 1, self.side, self.side], Kind::Float)?;
        let conditioning = Conditioning::class_labels(labels);
        Ok(Data::new(x0.clamp(-1.0, 1.0)).with_conditioning(conditioning))
    }

    /// Runs a number of updates of the mixer alone, with networks that cost nothing, to fill its buffers.
    ///
    /// # Errors
    ///
    /// Errors of the mixer.
    pub fn fill(&mut self, updates: u64) -> Result<()> {
        let schedule = Workload::schedule()?;
        for step in 0..updates {
            let data = self.data(step, Stream::Data)?;
            let clock = Clock::new(step, u64::MAX, self.streams);
            let free = Free(&schedule);
            let networks = RolloutNetworks::new(&free, &free);
            let states = self.mixer.next_states(&clock, &MixBatch::new(&data), &networks)?;
            let student_x0 = states.x_t.zeros_like();
            self.mixer.feed_back(&clock, &states, &Feedback::new(&student_x0))?;
        }
        Ok(())
    }

    /// Starts a round, to which the following updates count.
    pub fn begin_round(&mut self) {
        let processor = processor_time().map(|_| Duration::ZERO);
        self.rounds.push(Round { processor, ..Round::default() });
    }

    /// Discards the measurements.
    pub fn clear_rounds(&mut self) {
        self.rounds.clear();
        self.meters = Meters::default();
    }

    /// Number of trajectories that the teacher computed, derived from its passes: two of a guided network at each
    /// timestep on the way to the student's last one.
    pub fn teacher_trajectories(&self) -> f64 {
        let grids = self.mixer.grids();
        let last = grids.student.as_slice().iter().min().copied().unwrap_or(-1);
        let evaluated =
            grids.teacher.as_slice().iter().filter(|timestep| **timestep > last).count();
        self.meters.of(Role::TeacherRollout).passes as f64 / (2 * evaluated) as f64
    }

    /// Performs one update and adds its cost to the current round.
    ///
    /// # Errors
    ///
    /// Errors of networks, method or optimizer; a loss that is NaN or infinite.
    pub fn update(&mut self, step: u64) -> Result<Update> {
        let [data, real] = [Stream::Data, Stream::Condition].map(|stream| self.data(step, stream));
        let (data, real) = (data?, real?);
        let (processor, started) = (processor_time(), Instant::now());
        let mut spent = Round::default();

        let states = self.collect(step, &data)?;
        spent.states += started.elapsed();
        let (mut said, mut losses) = (None::<LossTerms>, Vec::new());
        let phases = self.objective.phases(step);
        for phase in phases {
            let earlier = said.as_ref().map(|terms| &terms.student_x0);
            let (terms, loss) = self.train((step, *phase), &states, &real, earlier, &mut spent)?;
            said = Some(terms);
            losses.push(loss);
        }
        if phases.contains(&Phase::Student) {
            let before = Instant::now();
            self.target.as_ref().map_or(Ok(()), |target| target.follow(&self.student))?;
            spent.optimizer += before.elapsed();
        }
        if let Some(LossTerms { student_x0, teacher_next, .. }) = said {
            let before = Instant::now();
            let student_x0 = Thresholding::clamp_pixels().apply(&student_x0)?;
            let next = teacher_next.as_ref();
            let clock = Clock::new(step, u64::MAX, self.streams);
            let feedback = Feedback::new(&student_x0).with_teacher_next(next);
            self.mixer.feed_back(&clock, &states, &feedback)?;
            spent.states += before.elapsed();
        }

        wait_for(self.device);
        spent.wall = started.elapsed();
        spent.processor =
            processor_time().zip(processor).map(|(after, before)| after.saturating_sub(before));
        if let Some(round) = self.rounds.last_mut() {
            round.add(&spent);
        }
        Ok(Update { states, real, losses })
    }

    fn collect(&mut self, step: u64, data: &Data) -> Result<States> {
        let mut generator = self.streams.generator(step, Stream::Condition, self.device)?;
        let prompts = data.conditioning.index_select(&generator.randperm(self.batch)?)?;
        let teacher = guided(self.meters.put_on(Role::TeacherRollout, &self.teacher))?;
        let student = held(self.meters.put_on(Role::StudentRollout, &self.student))?;
        let sampler = self.method.sampler_config(student.schedule());
        let student = with_boundary(student, &sampler);
        let clock = Clock::new(step, u64::MAX, self.streams);
        let batch = MixBatch::new(data).with_prompts(&prompts);
        let networks = RolloutNetworks::new(&*student, &teacher);
        Ok(self.mixer.next_states(&clock, &batch, &networks)?)
    }

    /// One phase of an update: loss, gradients, step.
    fn train(
        &mut self,
        (step, phase): (u64, Phase),
        states: &States,
        real: &Data,
        student_x0: Option<&Tensor>,
        spent: &mut Round,
    ) -> Result<(LossTerms, f64)> {
        let before = Instant::now();
        if let Some(critic) = &self.critic {
            critic.open_for(phase);
        }
        self.optimizer(phase)?.zero_grad()?;
        spent.optimizer += before.elapsed();
        let terms = self.terms((step, phase), states, real, student_x0)?;

        let before = Instant::now();
        let loss = terms.per_sample.mean(terms.per_sample.kind());
        loss.f_backward()?;
        spent.backward += before.elapsed();

        let before = Instant::now();
        let learning_rate = self.learning_rate;
        let optimizer = self.optimizer(phase)?;
        let norm = optimizer.clip()?;
        let loss = loss.double_value(&[]);
        ensure_finite(step, "loss", loss, || None)?;
        ensure_finite(step, "gradient norm", norm.double_value(&[]), || None)?;
        optimizer.step(learning_rate)?;
        if phase == Phase::Student {
            self.ema.update()?;
        }
        spent.optimizer += before.elapsed();
        Ok((terms, loss))
    }

    fn optimizer(&mut self, phase: Phase) -> Result<&mut AdamW> {
        match (phase, &mut self.critic) {
            (Phase::Student, _) => Ok(&mut self.student_optimizer),
            (Phase::Critic, Some(critic)) => Ok(&mut critic.optimizer),
            (Phase::Critic, None) => Err("the method has no critic".into()),
        }
    }

    /// The method's loss on the states.
    fn terms(
        &self,
        (step, phase): (u64, Phase),
        states: &States,
        real: &Data,
        student_x0: Option<&Tensor>,
    ) -> Result<LossTerms> {
        let meters = &self.meters;
        let student = meters.put_on(Role::Student, &self.student);
        let teacher = guided(meters.put_on(Role::Teacher, &self.teacher))?;
        let target = self.target.as_ref();
        let target =
            target.map(|target| held(meters.put_on(Role::Target, &target.network))).transpose()?;
        let critic = self.critic.as_ref();
        let fake_score = critic.map(|critic| meters.put_on(Role::Critic, &critic.fake_score));
        let thresholded = critic
            .map(|critic| held(meters.put_on(Role::Critic, &critic.fake_score)))
            .transpose()?;
        let judge =
            critic.map(|critic| meters.put_on(Role::Discriminator, critic.discriminator.clone()));
        let critic =
            fake_score.as_ref().zip(thresholded.as_ref()).map(|(fake_score, thresholded)| {
                let mut critic = Critic::new(fake_score).with_thresholded(thresholded);
                critic.discriminator = judge.as_ref().map(|judge| judge as _);
                critic
            });
        let mut networks = Networks::new(&student, &teacher);
        networks.target = target.as_ref().map(|target| target as _);
        networks.critic = critic;
        let real = Some(real);
        let request = LossRequest::new(step, phase, states, networks, &self.streams);
        Ok(self.objective.loss(&request.with_student_x0(student_x0).with_real(real))?)
    }
}

/// The teacher as used in all places.
fn guided<'a>(
    teacher: Metered<'a, &'a NetworkDenoiser>,
) -> Result<Thresholded<Guided<Metered<'a, &'a NetworkDenoiser>>>> {
    let null = Conditioning::class_labels(Tensor::from_slice(&[NULL_CLASS]));
    held(Guided::new(teacher, GUIDANCE_SCALE, null)?)
}

/// Clips to the data's range.
fn held<D: Denoiser>(network: D) -> Result<Thresholded<D>> {
    Ok(Thresholded::new(network, Thresholding::clamp_pixels())?)
}

impl Target {
    fn follow(&self, student: &NetworkDenoiser) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let values = |network: &NetworkDenoiser| {
            let learned = network.parameters().learned();
            TensorList::new(learned.iter().map(|(_, tensor)| tensor))
        };
        Ok(foreach_lerp_(&values(&self.network)?, &values(student)?, 1.0 - self.decay)?)
    }
}

impl CriticNetworks {
    fn new(teacher: &NetworkDenoiser) -> Result<Self> {
        let fake_score = teacher.duplicate(true)?;
        let head = DiscriminatorHeadConfig::for_model(&teacher.config())?;
        let head = head.build(teacher.placement(), 0)?;
        let of_head = head.parameters().learned().into_iter();
        let of_head = of_head.map(|(name, tensor)| (format!("head.{name}"), tensor));
        let parameters = fake_score.parameters().learned().into_iter().chain(of_head).collect();
        let optimizer = AdamWConfig::default().build(parameters)?;
        let discriminator = NetworkDiscriminator::new(&fake_score, head)?;
        Ok(Self { fake_score, discriminator, optimizer })
    }

    fn open_for(&self, phase: Phase) {
        self.fake_score.parameters().set_trainable(phase == Phase::Critic);
        self.discriminator.head().parameters().set_trainable(phase == Phase::Critic);
    }
}

impl Round {
    fn add(&mut self, other: &Self) {
        self.wall += other.wall;
        self.processor = self.processor.zip(other.processor).map(|(a, b)| a + b);
        self.states += other.states;
        self.backward += other.backward;
        self.optimizer += other.optimizer;
    }
}
