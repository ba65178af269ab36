//! The mixing prior over sources.

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_schedulers::{Ddim, MAX_TRAIN_TIMESTEPS, Sampler, Thresholding, Timesteps};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::conditioning::Conditioning;
use crate::denoiser::{ClipMeter, Counted, Denoiser, Thresholded};
use crate::error::{Error, Result};
use crate::priors::{Adaptation, PriorSchedule, Priors};
use crate::random::{RandomStreams, Stream};
use crate::rollout::first_state;
use crate::rows::{index, inverse, on_device};
use crate::saved::SavedState;
use crate::source::{
    ForwardSource, Grids, LossFeedback, Selected, SourceRequest, StudentConfig, StudentSource,
    TeacherConfig, TeacherSource, TrajectorySource,
};
use crate::states::{Data, Source, States};

/// The `mixer` part of a config file: which states a student is trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MixerConfig {
    /// Share of each source over the run; default [`PriorSchedule::default_for_pd`].
    pub priors: PriorSchedule,
    /// The student's trajectories.
    pub student: StudentConfig,
    /// The teacher's trajectories.
    pub teacher: TeacherConfig,
    /// Whether dataset samples at the noisiest timestep are replaced by pure noise, which is what sampling starts
    /// from; default true. A noised sample still shows a trace of its data there wherever the schedule's last
    /// `alpha` is not 0.
    pub pure_noise_at_tmax: bool,
    /// What is done in rollouts to clean estimates beyond the data's range; default nothing. Should be what is done
    /// when the student samples.
    pub thresholding: Thresholding,
    /// Whether it is done to the student's estimates; default true.
    pub threshold_student: bool,
    /// Whether it is done to the teacher's; default true. Otherwise they are taken as the teacher gives them, which
    /// is right, and saves the work, where the teacher that is lent holds them already.
    pub threshold_teacher: bool,
}

impl Default for MixerConfig {
    fn default() -> Self {
        Self {
            priors: PriorSchedule::default(),
            student: StudentConfig::default(),
            teacher: TeacherConfig::default(),
            pure_noise_at_tmax: true,
            thresholding: Thresholding::None,
            threshold_student: true,
            threshold_teacher: true,
        }
    }
}

impl MixerConfig {
    /// What is done to the student's estimates.
    fn student_thresholding(&self) -> Thresholding {
        if self.threshold_student { self.thresholding.clone() } else { Thresholding::None }
    }

    /// What is done to the teacher's estimates.
    fn teacher_thresholding(&self) -> Thresholding {
        if self.threshold_teacher { self.thresholding.clone() } else { Thresholding::None }
    }

    /// Plain distillation, without imitation learning: noised dataset samples and nothing else, bit for bit.
    pub fn forward_only() -> Self {
        Self {
            priors: PriorSchedule::constant(Priors::FORWARD_ONLY),
            pure_noise_at_tmax: false,
            ..Self::default()
        }
    }
}

/// What the mixer is asked for, and what it may use.
#[derive(Clone, Copy)]
pub struct MixRequest<'a> {
    /// Updates of the student so far.
    pub step: u64,
    /// Updates of the student in the whole run or stage; priors follow `step / total_steps`.
    pub total_steps: u64,
    /// Dataset samples; their number is that of the states.
    pub data: &'a Data,
    /// What backward trajectories may be told, as many rows as there are samples and the same parts as the data's.
    pub prompts: &'a Conditioning,
    /// The learner, with the weights that it will be sampled with.
    pub student: &'a dyn Denoiser,
    /// The expert, with the guidance that its labels have.
    pub teacher: &'a dyn Denoiser,
    /// Random numbers.
    pub streams: &'a RandomStreams,
}

/// How often what was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixerCounters {
    /// Samples that the student was asked about in rollouts.
    pub student_evaluations: u64,
    /// Samples that the teacher was asked about in rollouts.
    pub teacher_evaluations: u64,
    /// States given of each source, in the order of [`Source::ALL`].
    pub states: [u64; Source::ALL.len()],
}

impl MixerCounters {
    /// Share of a source among all states given; 0 before the first.
    pub fn fraction(&self, source: Source) -> f64 {
        let total: u64 = self.states.iter().sum();
        if total == 0 { 0.0 } else { self.states[source.place()] as f64 / total as f64 }
    }

    fn count(&mut self, states: &States) {
        for &source in &states.sources {
            self.states[source.place()] += 1;
        }
    }
}

/// Makes training batches from the three sources.
///
/// The law of a training state at grid time `t` and progress `p` is the mixture
/// `mu = forward(p) q_t + student(p) p_student + teacher(p) p_teacher` of the forward marginal and the states that
/// student and teacher visit: DAgger ([Ross et al. 2011](https://arxiv.org/abs/1011.0686)) for few-step diffusion,
/// [Garrepalli et al. 2024](https://arxiv.org/abs/2410.11971). The grid index is drawn first and the source second,
/// so that no source changes how often a timestep is trained. At the noisiest timestep all backward sources are pure
/// noise.
///
/// Which data, which index and which noise a sample gets does not depend on the priors: runs that differ in them
/// alone are paired.
///
/// # Example
///
/// ```
/// use ddil_core::{
///     Conditioning, Data, Denoiser, MixRequest, Mixer, MixerConfig, PriorSchedule, Priors, RandomStreams, Result,
/// };
/// use ddil_schedulers::{Ddim, NoiseSchedule, NoiseScheduleConfig, Prediction, TimestepSpacing, Timesteps};
/// use tch::{Tensor, kind};
///
/// /// Believes that all data are 0.
/// struct Zero(NoiseSchedule);
///
/// impl Denoiser for Zero {
///     fn predict(&self, x_t: &Tensor, timesteps: &Tensor, _: &Conditioning) -> Result<Prediction> {
///         Ok(Prediction::from_x0(&self.0, x_t.zeros_like(), x_t, timesteps)?)
///     }
///
///     fn schedule(&self) -> &NoiseSchedule {
///         &self.0
///     }
/// }
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// let priors = PriorSchedule::constant(Priors::new(0.5, 0.25, 0.25)?);
/// let config = MixerConfig { priors, ..MixerConfig::default() };
/// let mut mixer = Mixer::new(config, grid, Box::new(Ddim::new(schedule.clone())))?;
///
/// let (student, teacher) = (Zero(schedule.clone()), Zero(schedule));
/// let streams = RandomStreams::new(0, 0);
/// for step in 0..3 {
///     let data = Data { x0: Tensor::ones([8, 2], kind::FLOAT_CPU), conditioning: Conditioning::none() };
///     let states = mixer.next_states(&MixRequest {
///         step,
///         total_steps: 3,
///         data: &data,
///         prompts: &Conditioning::none(),
///         student: &student,
///         teacher: &teacher,
///         streams: &streams,
///     })?;
///     assert_eq!(states.len(), 8);
///     // The loss goes here; its clean estimates move the student's chains on.
///     let student_x0 = states.x_t.zeros_like();
///     mixer.after_loss(step, &states, &student_x0, None, &streams)?;
/// }
/// # Ok::<(), ddil_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Mixer {
    config: MixerConfig,
    grids: Grids,
    sampler: Box<dyn Sampler>,
    teacher_sampler: Ddim,
    sources: Sources,
    /// There with adaptive priors.
    adaptation: Option<Adaptation>,
    counters: MixerCounters,
    meters: RolloutMeters,
}

/// Who measures what thresholding changes in rollouts.
#[derive(Debug, Default)]
struct RolloutMeters {
    student: Option<ClipMeter>,
    teacher: Option<ClipMeter>,
}

/// One a prior.
#[derive(Debug)]
struct Sources {
    forward: Box<dyn TrajectorySource>,
    student: Box<dyn TrajectorySource>,
    teacher: Box<dyn TrajectorySource>,
}

/// What a [`Mixer`] is saved as, beside its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    timesteps: Vec<i64>,
    counters: MixerCounters,
    sources: [serde_json::Value; 3],
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adaptation: Option<serde_json::Value>,
}

const WHAT: &str = "mixer";

impl Mixer {
    /// A mixer for a student that is trained and sampled on the same grid.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] that names the setting.
    pub fn new(config: MixerConfig, grid: Timesteps, sampler: Box<dyn Sampler>) -> Result<Self> {
        let rollout = grid.clone();
        Self::with_rollout(config, grid, rollout, sampler)
    }

    /// A mixer for a student that is trained on `grid` and sampled at `rollout`, a part of it.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_rollout(
        config: MixerConfig,
        grid: Timesteps,
        rollout: Timesteps,
        sampler: Box<dyn Sampler>,
    ) -> Result<Self> {
        config.priors.ensure()?;
        config.thresholding.ensure()?;
        let num_train_timesteps = sampler.schedule().num_train_timesteps() as u32;
        let teacher = grid.refined(config.teacher.substeps, num_train_timesteps)?;
        let grids = Grids { student: grid, rollout, teacher };
        grids.ensure()?;
        let sources = Sources {
            forward: Box::new(ForwardSource),
            student: Box::new(StudentSource::new(config.student.clone(), &grids)?),
            teacher: Box::new(TeacherSource::new(config.teacher.clone(), &grids)?),
        };
        let adaptation = match &config.priors {
            PriorSchedule::Adaptive(priors) => {
                Some(Adaptation::new(priors.clone(), &grids.student)?)
            }
            _ => None,
        };
        let teacher_sampler = Ddim::new(sampler.schedule().clone());
        let (counters, meters) = (MixerCounters::default(), RolloutMeters::default());
        Ok(Self { config, grids, sampler, teacher_sampler, sources, adaptation, counters, meters })
    }

    /// The same with a source of one's own in place of one of the three.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a place that has no prior.
    pub fn with_source(mut self, place: Source, source: Box<dyn TrajectorySource>) -> Result<Self> {
        match place {
            Source::Forward => self.sources.forward = source,
            Source::Student => self.sources.student = source,
            Source::Teacher => self.sources.teacher = source,
            Source::Mixed | Source::Noise => {
                return Err(Error::Invalid(Invalid::new(
                    "place",
                    place.as_str().to_owned(),
                    "forward, student or teacher",
                )));
            }
        }
        Ok(self)
    }

    /// The same with meters of what thresholding changes in the rollouts of student and teacher.
    ///
    /// They see what the mixer itself changes: not what a teacher that is lent held already, nor the estimates of
    /// [`after_loss`](Self::after_loss), which chains go on from, and whose meter is the loss's.
    #[must_use]
    pub fn with_rollout_meters(self, student: ClipMeter, teacher: ClipMeter) -> Self {
        let meters = RolloutMeters { student: Some(student), teacher: Some(teacher) };
        Self { meters, ..self }
    }

    /// The settings.
    pub fn config(&self) -> &MixerConfig {
        &self.config
    }

    /// The grids of the run.
    pub fn grids(&self) -> &Grids {
        &self.grids
    }

    /// How the student steps.
    pub fn sampler(&self) -> &dyn Sampler {
        &*self.sampler
    }

    /// What has been done so far.
    pub fn counters(&self) -> &MixerCounters {
        &self.counters
    }

    /// The priors at a step; of adaptive ones, which differ from index to index, the mean over those past noise.
    pub fn priors_at(&self, step: u64, total_steps: u64) -> Priors {
        if self.adaptation.is_none() {
            return self.config.priors.at(progress(step, total_steps));
        }
        let priors = self.priors_by_index(step, total_steps);
        Priors::mean(priors.get(1..).filter(|past| !past.is_empty()).unwrap_or(&priors))
    }

    /// The priors at a step, one a grid index.
    pub fn priors_by_index(&self, step: u64, total_steps: u64) -> Vec<Priors> {
        let progress = progress(step, total_steps);
        let at = |index: usize| match &self.adaptation {
            None => self.config.priors.at(progress),
            Some(adaptation) => adaptation.priors(progress, index),
        };
        (0..self.grids.student.len()).map(at).collect()
    }

    /// A source for each sample.
    fn assign(&self, request: &MixRequest<'_>, grid_indices: &[usize]) -> Vec<Source> {
        let MixRequest { step, total_steps, streams, .. } = *request;
        let mut rng = streams.rng(step, Stream::Source);
        if self.adaptation.is_none() {
            return self.priors_at(step, total_steps).assign(grid_indices.len(), &mut rng);
        }
        let by_index = self.priors_by_index(step, total_steps);
        let priors: Vec<Priors> = grid_indices.iter().map(|&index| by_index[index]).collect();
        Priors::assign_each(&priors, grid_indices, &mut rng)
    }

    /// Checks that batches of this size can be made, once, before any work.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an empty batch, and for a buffer that holds fewer states than a batch: it would
    /// forget what was just put into it.
    pub fn ensure_batch_size(&self, batch: usize) -> Result<()> {
        if batch == 0 {
            return Err(Error::Invalid(Invalid::new("batch_size", "0", "at least 1")));
        }
        let Sources { forward, student, teacher } = &self.sources;
        [forward, student, teacher].iter().try_for_each(|source| source.ensure_batch_size(batch))
    }

    /// The next training batch: a state for each dataset sample.
    ///
    /// # Errors
    ///
    /// [`Error::Conditioning`] or [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if data and prompts do not fit each other; whatever the networks
    /// say in rollouts.
    pub fn next_states(&mut self, request: &MixRequest<'_>) -> Result<States> {
        const OP: &str = "Mixer::next_states";
        let _no_grad = tch::no_grad_guard();
        let batch = ensure_batch(OP, request)?;
        let MixRequest { step, streams, .. } = *request;
        let grid_indices = draw_grid_indices(
            batch,
            self.grids.student.len(),
            &mut streams.rng(step, Stream::Timesteps),
        );
        let x0 = &request.data.x0;
        let noise =
            streams.generator(step, Stream::Noise, x0.device())?.normal(x0.size(), x0.kind())?;
        if let Some(adaptation) = &mut self.adaptation {
            adaptation.refresh(step, streams)?;
        }
        let assigned = self.assign(request, &grid_indices);

        let RolloutMeters { student, teacher } = &self.meters;
        let (student, teacher) = (
            in_rollouts(request.student, self.config.student_thresholding(), student.as_ref())?,
            in_rollouts(request.teacher, self.config.teacher_thresholding(), teacher.as_ref())?,
        );
        let whole = SourceRequest {
            step,
            grid_indices: &grid_indices,
            data: request.data,
            noise: &noise,
            prompts: request.prompts,
            grids: &self.grids,
            sampler: &*self.sampler,
            teacher_sampler: &self.teacher_sampler,
            student: &student,
            teacher: &teacher,
            streams,
        };
        let pure_noise = self.config.pure_noise_at_tmax;
        let states = self.sources.collect(&whole, &assigned, pure_noise)?;
        self.counters.student_evaluations += student.evaluations();
        self.counters.teacher_evaluations += teacher.evaluations();
        self.counters.count(&states);
        if let Some(adaptation) = &mut self.adaptation {
            adaptation.see_states(step, &states)?;
        }
        Ok(states)
    }

    /// Shows the sources what the loss computed of a batch, so that chains can go on without calls of their own.
    ///
    /// # Shapes and units
    ///
    /// - `student_x0`: of the shape of `states.x_t`, the student's clean estimates, unclamped as in the loss
    /// - `teacher_next`: of the same shape, the teacher's states at the next grid index, where the loss has them
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] if the shapes differ; [`Error::Invalid`] if chains are mixed and there is no
    /// `teacher_next`.
    pub fn after_loss(
        &mut self,
        step: u64,
        states: &States,
        student_x0: &Tensor,
        teacher_next: Option<&Tensor>,
        streams: &RandomStreams,
    ) -> Result<()> {
        const OP: &str = "Mixer::after_loss";
        let _no_grad = tch::no_grad_guard();
        states.ensure(OP)?;
        let x_t = ("x_t", &states.x_t);
        ddil_libtorch::ensure_same_shape(OP, ("student_x0", student_x0), x_t)?;
        if let Some(teacher_next) = teacher_next {
            ddil_libtorch::ensure_same_shape(OP, ("teacher_next", teacher_next), x_t)?;
        }
        let student_x0 = &self.config.student_thresholding().apply(&student_x0.detach())?;
        let feedback = LossFeedback {
            step,
            states,
            student_x0,
            teacher_next,
            grids: &self.grids,
            sampler: &*self.sampler,
            streams,
        };
        self.sources.each().into_iter().try_for_each(|source| source.after_loss(&feedback))
    }

    /// Shows adaptive priors the losses of a batch, one a sample; others look away. Waits for no device.
    ///
    /// # Shapes and units
    ///
    /// - `per_sample`: `[batch]`, as the states
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) unless there is a loss a state.
    pub fn see_losses(&mut self, states: &States, per_sample: &Tensor) -> Result<()> {
        self.adaptation
            .as_mut()
            .map_or(Ok(()), |adaptation| adaptation.see_losses(per_sample, states))
    }

    /// Forgets all states and what adaptive priors measured: at a new stage, or when guidance or thresholding
    /// changes. Counters go on.
    pub fn flush(&mut self) {
        if let Some(adaptation) = &mut self.adaptation {
            adaptation.flush();
        }
        self.sources.each().into_iter().for_each(|source| source.flush());
    }

    /// Copies everything that the next batch depends on.
    ///
    /// # Errors
    ///
    /// Whatever a source says.
    pub fn state(&self) -> Result<SavedState> {
        let [forward, student, teacher] = [
            self.sources.forward.save()?,
            self.sources.student.save()?,
            self.sources.teacher.save()?,
        ];
        let adaptation = self.adaptation.as_ref().map(Adaptation::save).transpose()?;
        let metadata = Metadata {
            timesteps: self.grids.student.as_slice().to_vec(),
            counters: self.counters,
            sources: [&forward, &student, &teacher].map(|saved| saved.metadata.clone()),
            adaptation: adaptation.as_ref().map(|saved| saved.metadata.clone()),
        };
        let parts = NAMES.into_iter().zip([&forward, &student, &teacher]);
        let files = parts.flat_map(|(name, saved)| saved.prefixed_files(name)).collect();
        let adaptation = adaptation.into_iter().flat_map(|saved| saved.prefixed(ADAPTATION));
        let tensors = forward
            .prefixed(NAMES[0])
            .chain(student.prefixed(NAMES[1]))
            .chain(teacher.prefixed(NAMES[2]))
            .chain(adaptation)
            .collect();
        Ok(SavedState::new(WHAT, tensors, &metadata)?.with_files(files))
    }

    /// Becomes what was saved: the next batches are the same, bit for bit.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] if it was saved with another grid or other sources.
    pub fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let metadata: Metadata = saved.metadata(WHAT)?;
        if metadata.timesteps != self.grids.student.as_slice() {
            let here = self.grids.student.as_slice();
            let problem = format!("it is of the grid {:?}, not of {here:?}", metadata.timesteps);
            return Err(Error::Restore { what: WHAT, problem });
        }
        if self.adaptation.is_some() != metadata.adaptation.is_some() {
            let named = |adaptive: bool| if adaptive { "adaptive" } else { "settled" };
            let (was, is) = (metadata.adaptation.is_some(), self.adaptation.is_some());
            let problem = format!("its priors are {}, not {}", named(was), named(is));
            return Err(Error::Restore { what: WHAT, problem });
        }
        let parts = NAMES.into_iter().zip(&metadata.sources);
        for (source, (name, metadata)) in self.sources.each().into_iter().zip(parts) {
            source.restore(&saved.part(name, metadata))?;
        }
        if let Some((here, there)) = self.adaptation.as_mut().zip(metadata.adaptation.as_ref()) {
            here.restore(&saved.part(ADAPTATION, there))?;
        }
        self.counters = metadata.counters;
        Ok(())
    }
}

/// Names of the sources' parts of a saved mixer, in the order of [`Sources::each`].
const NAMES: [&str; 3] = ["forward", "student", "teacher"];

/// Name of what adaptive priors remember in a saved mixer.
const ADAPTATION: &str = "adaptation";

/// How much of a run is done.
fn progress(step: u64, total_steps: u64) -> f64 {
    step as f64 / total_steps.max(1) as f64
}

impl Sources {
    fn each(&mut self) -> [&mut Box<dyn TrajectorySource>; 3] {
        [&mut self.forward, &mut self.student, &mut self.teacher]
    }

    /// A state for each sample, from the source assigned to it, in the samples' order.
    fn collect(
        &mut self,
        whole: &SourceRequest<'_>,
        assigned: &[Source],
        pure_noise_at_tmax: bool,
    ) -> Result<States> {
        let source_of = |row: usize| match (whole.grid_indices[row], assigned[row]) {
            (0, Source::Forward) if !pure_noise_at_tmax => Source::Forward,
            (0, _) => Source::Noise,
            (_, source) => source,
        };
        let mut parts = Vec::new();
        let mut order = Vec::with_capacity(whole.len());
        for source in Source::ALL {
            let rows: Vec<usize> =
                (0..whole.len()).filter(|&row| source_of(row) == source).collect();
            if rows.is_empty() {
                continue;
            }
            let part = Selected::of(whole, &rows)?;
            let request = part.request(whole);
            parts.push(match source {
                Source::Forward => self.forward.states(&request)?,
                Source::Teacher => self.teacher.states(&request)?,
                Source::Student | Source::Mixed => self.student.states(&request)?,
                Source::Noise => noise(&request, &rows, assigned)?,
            });
            order.extend(rows);
        }
        let states = States::cat(&parts)?.index_select(&inverse(&order))?;
        let x0 = &whole.data.x0;
        Ok(States { x_t: states.x_t.to_device(x0.device()).to_kind(x0.kind()), ..states })
    }
}

/// A network as rollouts ask it.
fn in_rollouts<'a>(
    network: &'a dyn Denoiser,
    thresholding: Thresholding,
    meter: Option<&ClipMeter>,
) -> Result<Counted<Thresholded<&'a dyn Denoiser>>> {
    let thresholded = Thresholded::new(network, thresholding)?;
    Ok(Counted::new(match meter {
        Some(meter) => thresholded.metered(meter.clone()),
        None => thresholded,
    }))
}

/// Pure noise, told what the source it stands for would have been told.
fn noise(request: &SourceRequest<'_>, rows: &[usize], assigned: &[Source]) -> Result<States> {
    let timestep = request.grids.student.as_slice()[0];
    let x_t = first_state(request.sampler.schedule(), timestep, request.noise)?;
    let n = rows.len();
    let told: Vec<usize> =
        (0..n).map(|i| if assigned[rows[i]] == Source::Forward { i } else { n + i }).collect();
    let conditioning = Conditioning::cat(&[&request.data.conditioning, request.prompts])?
        .index_select(&index(&told, request.device()))?;
    Ok(States {
        timesteps: on_device(&request.timesteps(), x_t.device()),
        x_t,
        grid_indices: request.grid_indices.to_vec(),
        conditioning,
        sources: vec![Source::Noise; n],
        births: vec![request.step; n],
    })
}

/// A grid index for each sample of a batch, even over the grid, in random order.
///
/// Stratified: every index is drawn as often as every other, but for a rest that is drawn without replacement. None where
/// there are no indices; of more than [`MAX_TRAIN_TIMESTEPS`], which no grid has, those.
pub fn draw_grid_indices(batch: usize, num_indices: usize, rng: &mut impl Rng) -> Vec<usize> {
    let num_indices = num_indices.min(MAX_TRAIN_TIMESTEPS as usize);
    if num_indices == 0 {
        return Vec::new();
    }
    let mut rest: Vec<usize> = (0..num_indices).collect();
    rest.shuffle(rng);
    let whole = batch - batch % num_indices;
    let mut indices: Vec<usize> = (0..whole).map(|i| i % num_indices).collect();
    indices.extend(rest.into_iter().take(batch - whole));
    indices.shuffle(rng);
    indices
}

fn ensure_batch(op: &'static str, request: &MixRequest<'_>) -> Result<usize> {
    ddil_libtorch::ensure_real(op, "data.x0", &request.data.x0)?;
    let shape = request.data.x0.size();
    if shape.len() < 2 || shape[0] == 0 {
        let expected = "[batch, ..] with at least one sample".to_owned();
        return Err(Error::Argument(ArgumentError::Shape { op, name: "data.x0", shape, expected }));
    }
    request.data.conditioning.ensure_batch(op, shape[0])?;
    request.prompts.ensure_batch(op, shape[0])?;
    Ok(shape[0] as usize)
}

impl std::fmt::Debug for MixRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MixRequest")
            .field("step", &self.step)
            .field("total_steps", &self.total_steps)
            .finish_non_exhaustive()
    }
}
