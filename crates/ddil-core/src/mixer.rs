//! The mixture of sources that a student is trained on.

mod mixture;

use ddil_files::Invalid;
use ddil_libtorch::{ArgumentError, ensure_real, ensure_same_shape};
use ddil_schedulers::{Ddim, MAX_TRAIN_TIMESTEPS, Sampler, Timesteps};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use self::mixture::{Mixture, PureNoise};
use crate::conditioning::Conditioning;
use crate::denoiser::Counted;
use crate::error::{Error, Result};
use crate::inputs::{Clock, Feedback, RolloutNetworks};
use crate::priors::{Adaptation, PriorSchedule, Priors};
use crate::random::Stream;
use crate::saved::SavedState;
use crate::source::{
    ForwardSource, Grids, LossFeedback, SourceRequest, StudentConfig, StudentSource, TeacherConfig,
    TeacherSource, TrajectorySource,
};
use crate::source_name::SourceName;
use crate::states::{Data, Source, States};

/// The `mixer` section of a config file: which states a student is trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct MixerConfig {
    /// Share of each source over the run; default [`PriorSchedule::default_for_pd`].
    pub priors: PriorSchedule,
    /// The student's trajectories.
    pub student: StudentConfig,
    /// The teacher's trajectories.
    pub teacher: TeacherConfig,
    /// Whether dataset samples at the noisiest timestep are replaced by pure noise, from which sampling starts; default
    /// true. A noised sample still contains a trace of its data there if the schedule's last `alpha` is not 0.
    pub pure_noise_at_tmax: bool,
}

impl Default for MixerConfig {
    fn default() -> Self {
        Self {
            priors: PriorSchedule::default(),
            student: StudentConfig::default(),
            teacher: TeacherConfig::default(),
            pure_noise_at_tmax: true,
        }
    }
}

impl MixerConfig {
    /// The same settings with a change: `MixerConfig::default().with(|config| config.pure_noise_at_tmax = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Plain distillation, without imitation learning: only noised dataset samples, bit for bit.
    pub fn forward_only() -> Self {
        Self {
            priors: PriorSchedule::constant(Priors::FORWARD_ONLY),
            pure_noise_at_tmax: false,
            ..Self::default()
        }
    }
}

/// The inputs of a batch of states.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MixBatch<'a> {
    /// Dataset samples, one per state.
    pub data: &'a Data,
    /// The conditioning of backward trajectories: one row per sample, with the same parts as that of the data.
    pub prompts: &'a Conditioning,
    /// Whether pure noise in the place of a dataset sample has the conditioning of trajectories instead of the
    /// sample's: it is their first state, from which chains continue.
    pub prompted_noise: bool,
}

impl<'a> MixBatch<'a> {
    /// Dataset samples, whose conditioning is also used for backward trajectories.
    pub fn new(data: &'a Data) -> Self {
        Self { data, prompts: &data.conditioning, prompted_noise: false }
    }

    /// The same with another conditioning for backward trajectories.
    #[must_use]
    pub fn with_prompts(self, prompts: &'a Conditioning) -> Self {
        Self { prompts, ..self }
    }

    /// The same with [`prompted_noise`](Self::prompted_noise), for prompts that the data do not have.
    #[must_use]
    pub fn with_prompted_noise(self, prompted_noise: bool) -> Self {
        Self { prompted_noise, ..self }
    }
}

/// Number of states made, and of samples that the networks evaluated in rollouts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MixerCounters {
    /// Number of samples that the student evaluated in rollouts.
    pub student_evaluations: u64,
    /// Number of samples that the teacher evaluated in rollouts.
    pub teacher_evaluations: u64,
    /// Number of states of each source, in the order of [`Source::ALL`].
    pub states: [u64; Source::ALL.len()],
    /// Number of states of each added source.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub added: Vec<(SourceName, u64)>,
    /// Number of states with the conditioning of trajectories, [`MixBatch::prompts`]; that of the others is the data's.
    #[serde(default)]
    pub prompted: u64,
}

impl MixerCounters {
    /// Share of a source among all states; 0 before the first.
    pub fn fraction(&self, source: Source) -> f64 {
        let added = self.added.iter().map(|(name, count)| (Source::Added(*name), *count));
        let mut counts = Source::ALL.into_iter().zip(self.states).chain(added);
        let total: u64 = counts.clone().map(|(_, count)| count).sum();
        let of_source = counts.find(|(other, _)| *other == source).map_or(0, |(_, count)| count);
        if total == 0 { 0.0 } else { of_source as f64 / total as f64 }
    }

    fn count(&mut self, states: &States, assigned: &[Source], prompted_noise: bool) {
        for (&source, &assigned) in states.sources.iter().zip(assigned) {
            *self.place(source) += 1;
            let is_prompted =
                assigned != Source::Forward || (prompted_noise && source == Source::Noise);
            self.prompted += u64::from(is_prompted);
        }
    }

    fn place(&mut self, source: Source) -> &mut u64 {
        if let Source::Added(name) = source {
            let at = self.added.iter().position(|(other, _)| *other == name);
            let at = at.unwrap_or_else(|| {
                self.added.push((name, 0));
                self.added.len() - 1
            });
            return &mut self.added[at].1;
        }
        // Every source except the added ones is in the list.
        &mut self.states[source.place_among(&[]).unwrap_or(0)]
    }
}

/// Makes training batches from a mixture of sources.
///
/// The distribution of a training state at grid time `t` and progress `p` is the mixture
/// `mu = forward(p) q_t + student(p) p_student + teacher(p) p_teacher` of the forward marginal and the states that
/// student and teacher visit: DAgger ([Ross et al. 2011](https://arxiv.org/abs/1011.0686)) for few-step diffusion,
/// [Garrepalli et al. 2024](https://arxiv.org/abs/2410.11971). The grid index is drawn first and the source second, so
/// that no source changes how often a timestep is trained. At the noisiest timestep, all backward sources return pure
/// noise.
///
/// The data, grid index and noise of a sample do not depend on the priors: runs that differ only in their priors are
/// paired.
///
/// Your own source can replace one of the three ([`replace_source`](Self::replace_source)) or be added with a name and
/// a share ([`with_source`](Self::with_source)); the priors then divide the remaining share.
///
/// # Example
///
/// ```
/// use ddil_core::{
///     Clock, Conditioning, Data, Feedback, FnDenoiser, MixBatch, Mixer, MixerConfig, PriorSchedule, Priors,
///     RandomStreams, RolloutNetworks,
/// };
/// use ddil_schedulers::{Ddim, NoiseScheduleConfig, PredictionType, TimestepSpacing, Timesteps};
/// use tch::{Tensor, kind};
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// let priors = PriorSchedule::constant(Priors::new(0.5, 0.25, 0.25)?);
/// let config = MixerConfig::default().with(|config| config.priors = priors);
/// let mut mixer = Mixer::new(config, grid, Box::new(Ddim::new(schedule.clone())))?;
///
/// // Networks that estimate all data as 0.
/// let zero = || {
///     FnDenoiser::new(schedule.clone(), PredictionType::Sample, |x_t, _timesteps, _conditioning| {
///         Ok(x_t.zeros_like())
///     })
/// };
/// let (student, teacher) = (zero(), zero());
/// let networks = RolloutNetworks::new(&student, &teacher);
/// for step in 0..3 {
///     let clock = Clock::new(step, 3, RandomStreams::new(0, 0));
///     let data = Data::new(Tensor::ones([8, 2], kind::FLOAT_CPU));
///     let states = mixer.next_states(&clock, &MixBatch::new(&data), &networks)?;
///     assert_eq!(states.len(), 8);
///     // The loss goes here; its clean estimates advance the student's chains.
///     let student_x0 = states.x_t.zeros_like();
///     mixer.feed_back(&clock, &states, &Feedback::new(&student_x0))?;
/// }
/// # Ok::<(), ddil_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Mixer {
    config: MixerConfig,
    grids: Grids,
    sampler: Box<dyn Sampler>,
    teacher_sampler: Ddim,
    mixture: Mixture,
    /// Present with adaptive priors.
    adaptation: Option<Adaptation>,
    counters: MixerCounters,
}

/// Metadata of a saved [`Mixer`], in addition to its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    timesteps: Vec<i64>,
    counters: MixerCounters,
    /// Metadata of forward, student and teacher.
    sources: [serde_json::Value; 3],
    /// Metadata of the added sources.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    added: Vec<(SourceName, serde_json::Value)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adaptation: Option<serde_json::Value>,
}

const WHAT: &str = "mixer";

impl Mixer {
    /// A mixer for a student that is trained and sampled on one grid.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] that names the setting.
    pub fn new(config: MixerConfig, grid: Timesteps, sampler: Box<dyn Sampler>) -> Result<Self> {
        let rollout = grid.clone();
        Self::with_rollout(config, grid, rollout, sampler)
    }

    /// A mixer for a student that is trained on `grid` and sampled on `rollout`, a subset of it.
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
        let num_train_timesteps = sampler.schedule().num_train_timesteps() as u32;
        let teacher = grid.refined(config.teacher.substeps, num_train_timesteps)?;
        let grids = Grids { student: grid, rollout, teacher };
        grids.ensure()?;
        let mixture = Mixture::new([
            Box::new(ForwardSource),
            Box::new(StudentSource::new(config.student.clone(), &grids)?),
            Box::new(TeacherSource::new(config.teacher.clone(), &grids)?),
        ]);
        let adaptation = match &config.priors {
            PriorSchedule::Adaptive(priors) => {
                Some(Adaptation::new(priors.clone(), &grids.student)?)
            }
            _ => None,
        };
        let teacher_sampler = Ddim::new(sampler.schedule().clone());
        let counters = MixerCounters::default();
        Ok(Self { config, grids, sampler, teacher_sampler, mixture, adaptation, counters })
    }

    /// Adds your own source with a name and a share of all states; the priors divide the remaining share.
    ///
    /// [`States::sources`] contains this name for its states, whatever the source writes there. The source is used at
    /// the noisiest timestep only without [`MixerConfig::pure_noise_at_tmax`].
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a name that is in use or not a [`SourceName`], and for a share that is not at least 0 or,
    /// together with those of other added sources, above 1.
    pub fn with_source(
        mut self,
        name: &str,
        share: f64,
        source: Box<dyn TrajectorySource>,
    ) -> Result<Self> {
        self.mixture.add(name, share, source)?;
        Ok(self)
    }

    /// Replaces one of the three sources with your own.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a source that has no prior.
    pub fn replace_source(
        mut self,
        place: Source,
        source: Box<dyn TrajectorySource>,
    ) -> Result<Self> {
        self.mixture.replace(place, source)?;
        Ok(self)
    }

    /// The settings.
    pub fn config(&self) -> &MixerConfig {
        &self.config
    }

    /// The grids of the run.
    pub fn grids(&self) -> &Grids {
        &self.grids
    }

    /// The student's sampler.
    pub fn sampler(&self) -> &dyn Sampler {
        &*self.sampler
    }

    /// Counters so far.
    pub fn counters(&self) -> &MixerCounters {
        &self.counters
    }

    /// The priors at a step. Adaptive priors differ by grid index: the mean over all indices except noise.
    ///
    /// They divide the share that added sources leave.
    pub fn priors_at(&self, step: u64, total_steps: u64) -> Priors {
        if self.adaptation.is_none() {
            return self.config.priors.at(progress(step, total_steps));
        }
        let priors = self.priors_by_index(step, total_steps);
        Priors::mean(priors.get(1..).filter(|past| !past.is_empty()).unwrap_or(&priors))
    }

    /// The priors at a step, one per grid index.
    pub fn priors_by_index(&self, step: u64, total_steps: u64) -> Vec<Priors> {
        let progress = progress(step, total_steps);
        let at = |index: usize| match &self.adaptation {
            None => self.config.priors.at(progress),
            Some(adaptation) => adaptation.priors(progress, index),
        };
        (0..self.grids.student.len()).map(at).collect()
    }

    /// A source for each sample.
    fn assign(&self, clock: &Clock, grid_indices: &[usize]) -> Vec<Source> {
        let Clock { step, total_steps, streams } = clock;
        let mut rng = streams.rng(*step, Stream::Source);
        let added = self.mixture.added();
        if self.adaptation.is_none() {
            let priors = self.priors_at(*step, *total_steps);
            return priors.assign_with_added(&added, grid_indices.len(), &mut rng);
        }
        let by_index = self.priors_by_index(*step, *total_steps);
        let priors: Vec<Priors> = grid_indices.iter().map(|&index| by_index[index]).collect();
        Priors::assign_each(&priors, &added, grid_indices, &mut rng)
    }

    /// Checks that batches of this size can be made; call it once, before training.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an empty batch, and for a buffer that holds fewer states than a batch: it would drop
    /// states that were just inserted.
    pub fn ensure_batch_size(&self, batch: usize) -> Result<()> {
        if batch == 0 {
            return Err(Error::Invalid(Invalid::new("batch_size", "0", "at least 1")));
        }
        self.mixture.sources().try_for_each(|source| source.ensure_batch_size(batch))
    }

    /// The next training batch: one state per dataset sample.
    ///
    /// # Errors
    ///
    /// [`Error::Conditioning`] or [`Error::Argument`] if data and prompts do not fit each other; errors of the networks
    /// in rollouts.
    pub fn next_states(
        &mut self,
        clock: &Clock,
        batch: &MixBatch<'_>,
        networks: &RolloutNetworks<'_>,
    ) -> Result<States> {
        const OP: &str = "Mixer::next_states";
        let _no_grad = tch::no_grad_guard();
        let rows = ensure_batch(OP, batch)?;
        let Clock { step, streams, .. } = *clock;
        let mut rng = streams.rng(step, Stream::Timesteps);
        let grid_indices = draw_grid_indices(rows, self.grids.student.len(), &mut rng);
        let x0 = &batch.data.x0;
        let noise =
            streams.generator(step, Stream::Noise, x0.device())?.normal(x0.size(), x0.kind())?;
        if let Some(adaptation) = &mut self.adaptation {
            adaptation.refresh(step, &streams)?;
        }
        let assigned = self.assign(clock, &grid_indices);
        let (student, teacher) = (Counted::new(networks.student), Counted::new(networks.teacher));
        let full = SourceRequest::new(
            clock,
            &grid_indices,
            (batch.data, &noise),
            &self.grids,
            &*self.sampler,
            RolloutNetworks::new(&student, &teacher),
        )
        .with_prompts(batch.prompts)
        .with_teacher_sampler(&self.teacher_sampler);
        let noise = PureNoise {
            at_tmax: self.config.pure_noise_at_tmax,
            is_prompted: batch.prompted_noise,
        };
        let states = self.mixture.collect(&full, &assigned, noise)?;
        self.counters.student_evaluations += student.evaluations();
        self.counters.teacher_evaluations += teacher.evaluations();
        self.counters.count(&states, &assigned, batch.prompted_noise);
        if let Some(adaptation) = &mut self.adaptation {
            adaptation.see_states(step, &states)?;
        }
        Ok(states)
    }

    /// Passes on the results of the loss for a batch: chains continue from its estimates without further network calls,
    /// and adaptive priors read its losses, without waiting for a device.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if shapes differ; [`Error::Invalid`] if chains are mixed and there is no `teacher_next`.
    pub fn feed_back(
        &mut self,
        clock: &Clock,
        states: &States,
        feedback: &Feedback<'_>,
    ) -> Result<()> {
        const OP: &str = "Mixer::feed_back";
        let _no_grad = tch::no_grad_guard();
        states.ensure(OP)?;
        let Feedback { student_x0, teacher_next, losses } = *feedback;
        let x_t = ("x_t", &states.x_t);
        ensure_same_shape(OP, ("student_x0", student_x0), x_t)?;
        if let Some(teacher_next) = teacher_next {
            ensure_same_shape(OP, ("teacher_next", teacher_next), x_t)?;
        }
        if let Some((adaptation, losses)) = self.adaptation.as_mut().zip(losses) {
            adaptation.see_losses(losses, states)?;
        }
        let student_x0 = &student_x0.detach();
        let feedback = Feedback { student_x0, ..*feedback };
        let feedback = LossFeedback::new(clock, states, &feedback, &self.grids, &*self.sampler);
        self.mixture.sources_mut().try_for_each(|source| source.after_loss(&feedback))
    }

    /// Drops all states and the measurements of adaptive priors: at a new stage, or when guidance or thresholding
    /// changes. Counters continue.
    pub fn flush(&mut self) {
        if let Some(adaptation) = &mut self.adaptation {
            adaptation.flush();
        }
        self.mixture.sources_mut().for_each(|source| source.flush());
    }

    /// Copies everything that the next batch depends on.
    ///
    /// # Errors
    ///
    /// The errors of the sources.
    pub fn save(&self) -> Result<SavedState> {
        let sources = self.mixture.save()?;
        let adaptation = self.adaptation.as_ref().map(Adaptation::save).transpose()?;
        let metadata_of = |name| {
            let saved = sources.iter().find(|(other, _)| *other == name);
            saved.map(|(_, saved)| saved.metadata.clone()).unwrap_or_default()
        };
        let added = sources.iter().filter_map(|(source, saved)| match source {
            Source::Added(name) => Some((*name, saved.metadata.clone())),
            _ => None,
        });
        let metadata = Metadata {
            timesteps: self.grids.student.as_slice().to_vec(),
            counters: self.counters.clone(),
            sources: Mixture::BY_PRIOR.map(metadata_of),
            added: added.collect(),
            adaptation: adaptation.as_ref().map(|saved| saved.metadata.clone()),
        };
        let files = sources.iter().flat_map(|(name, saved)| saved.prefixed_files(name.as_str()));
        let files = files.collect();
        let tensors = sources.into_iter().flat_map(|(name, saved)| saved.prefixed(name.as_str()));
        let adaptation = adaptation.into_iter().flat_map(|saved| saved.prefixed(ADAPTATION));
        Ok(SavedState::serialized(WHAT, tensors.chain(adaptation).collect(), &metadata)?
            .with_files(files))
    }

    /// Restores a saved mixer: the next batches are the same, bit for bit.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] if it was saved with another grid or other sources.
    pub fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let metadata: Metadata = saved.metadata(WHAT)?;
        if metadata.timesteps != self.grids.student.as_slice() {
            let here = self.grids.student.as_slice();
            let problem = format!("its grid is {:?}, not {here:?}", metadata.timesteps);
            return Err(Error::Restore { what: WHAT, problem });
        }
        if self.adaptation.is_some() != metadata.adaptation.is_some() {
            let named = |adaptive: bool| if adaptive { "adaptive" } else { "settled" };
            let (was, is) = (metadata.adaptation.is_some(), self.adaptation.is_some());
            let problem = format!("its priors are {}, not {}", named(was), named(is));
            return Err(Error::Restore { what: WHAT, problem });
        }
        let added = metadata.added.iter().map(|(name, metadata)| (Source::Added(*name), metadata));
        let parts: Vec<_> =
            Mixture::BY_PRIOR.into_iter().zip(&metadata.sources).chain(added).collect();
        let names: Vec<Source> = parts.iter().map(|(name, _)| *name).collect();
        self.mixture.ensure_same(WHAT, &names)?;
        for (source, (name, metadata)) in self.mixture.sources_mut().zip(parts) {
            source.restore(&saved.part(name.as_str(), metadata))?;
        }
        if let Some((here, there)) = self.adaptation.as_mut().zip(metadata.adaptation.as_ref()) {
            here.restore(&saved.part(ADAPTATION, there))?;
        }
        self.counters = metadata.counters;
        Ok(())
    }
}

/// Name of the state of adaptive priors in a saved mixer.
const ADAPTATION: &str = "adaptation";

/// Fraction of a run that is done.
fn progress(step: u64, total_steps: u64) -> f64 {
    step as f64 / total_steps.max(1) as f64
}

/// A grid index for each sample of a batch, uniform over the grid, in random order.
///
/// Stratified: every index is drawn equally often, except for a remainder that is drawn without replacement. Empty if
/// `num_indices` is 0; `num_indices` is limited to [`MAX_TRAIN_TIMESTEPS`], the largest grid.
pub fn draw_grid_indices(batch: usize, num_indices: usize, rng: &mut impl Rng) -> Vec<usize> {
    let num_indices = num_indices.min(MAX_TRAIN_TIMESTEPS as usize);
    if num_indices == 0 {
        return Vec::new();
    }
    let mut rest: Vec<usize> = (0..num_indices).collect();
    rest.shuffle(rng);
    let even = batch - batch % num_indices;
    let mut indices: Vec<usize> = (0..even).map(|i| i % num_indices).collect();
    indices.extend(rest.into_iter().take(batch - even));
    indices.shuffle(rng);
    indices
}

fn ensure_batch(op: &'static str, batch: &MixBatch<'_>) -> Result<usize> {
    ensure_real(op, "data.x0", &batch.data.x0)?;
    let shape = batch.data.x0.size();
    if shape.len() < 2 || shape[0] == 0 {
        let expected = "[batch, ..] with at least one sample".to_owned();
        return Err(ArgumentError::Shape { op, name: "data.x0", shape, expected }.into());
    }
    batch.data.conditioning.ensure_batch(op, shape[0])?;
    batch.prompts.ensure_batch(op, shape[0])?;
    Ok(shape[0] as usize)
}
