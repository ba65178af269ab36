//! Sources of training states.

mod forward;
mod student;
mod teacher;

pub use forward::ForwardSource;
pub use student::{RolloutSteps, StudentConfig, StudentPolicy, StudentSource};
pub use teacher::{TeacherConfig, TeacherSource, TeacherStates};

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::ensure_same_shape;
use ddil_schedulers::{Sampler, Timesteps};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::conditioning::Conditioning;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::inputs::{Clock, Feedback, RolloutNetworks};
use crate::random::RandomStreams;
use crate::rollout::{MixedRollout, MixedVariant, ensure_part_of};
use crate::rows::{index, on_device};
use crate::saved::SavedState;
use crate::states::{Data, States};

/// Returns training states at the requested grid indices.
///
/// The networks are borrowed for the call and never kept. A source draws from the streams of the request, so that it
/// has no random state.
pub trait TrajectorySource: std::fmt::Debug + Send {
    /// A state for each of the request's grid indices, in their order.
    ///
    /// # Errors
    ///
    /// [`Error::NoState`] if there is none; errors of the networks.
    fn states(&mut self, request: &SourceRequest<'_>) -> Result<States>;

    /// Receives the student's estimates for a batch. A no-op for most sources.
    ///
    /// # Errors
    ///
    /// The errors of the source.
    fn after_loss(&mut self, _feedback: &LossFeedback<'_>) -> Result<()> {
        Ok(())
    }

    /// Checks that the source supports batches of this size, once, before training. Most sources support any size.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is too little room for a batch.
    fn ensure_batch_size(&self, _batch: usize) -> Result<()> {
        Ok(())
    }

    /// Drops all states, at a new stage.
    fn flush(&mut self) {}

    /// Copies everything that [`restore`](Self::restore) needs; empty for a source without state.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] if the metadata cannot be written.
    fn save(&self) -> Result<SavedState> {
        Ok(SavedState::default())
    }

    /// Restores a saved state: the next states are the same, bit for bit.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] if the saved state does not fit this source.
    fn restore(&mut self, saved: &SavedState) -> Result<()> {
        if saved.tensors.is_empty() {
            return Ok(());
        }
        let problem = "this source has no state, but the saved one is not empty".to_owned();
        Err(Error::Restore { what: "source", problem })
    }
}

/// The grids of a run, noisiest first.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Grids {
    /// The timesteps at which the student is trained.
    pub student: Timesteps,
    /// The timesteps at which the student is evaluated when it samples; a subset of `student`, and equal to it in most
    /// methods. A latent consistency model is trained at 50 timesteps and sampled at 4.
    pub rollout: Timesteps,
    /// The timesteps of the teacher's rollouts; those of `student`, with more in between.
    pub teacher: Timesteps,
}

impl Grids {
    /// One grid for all three.
    pub fn new(student: Timesteps) -> Self {
        Self { rollout: student.clone(), teacher: student.clone(), student }
    }

    /// The same with other timesteps for the student's sampling.
    #[must_use]
    pub fn with_rollout(self, rollout: Timesteps) -> Self {
        Self { rollout, ..self }
    }

    /// The same with other timesteps for the teacher's rollouts.
    #[must_use]
    pub fn with_teacher(self, teacher: Timesteps) -> Self {
        Self { teacher, ..self }
    }

    /// Checks that the grids fit each other.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `rollout` is a subset of `student`, `student` a subset of `teacher`, all begin at the
    /// same timestep, and each step goes to the next entry.
    pub fn ensure(&self) -> Result<()> {
        ensure_part_of("rollout_timesteps", &self.rollout, &self.student)?;
        ensure_part_of("timesteps", &self.student, &self.teacher)?;
        let first = self.student.as_slice()[0];
        for (field, grid) in
            [("rollout_timesteps", &self.rollout), ("teacher_timesteps", &self.teacher)]
        {
            if grid.as_slice()[0] != first {
                let value = grid.as_slice()[0].to_string();
                let expected = format!("a grid that starts at {first}, as in training");
                return Err(Error::Invalid(Invalid::new(field, value, expected)));
            }
        }
        let next = self.student.as_slice().iter().skip(1).copied().chain([-1]);
        match self.student.pairs().zip(next).find(|((_, prev), next)| prev != next) {
            Some(((timestep, prev), next)) => Err(Error::Invalid(Invalid::new(
                "timesteps",
                format!("a step from {timestep} to {prev}"),
                format!("a step to the next entry, {next}"),
            ))),
            None => Ok(()),
        }
    }

    /// Index of a timestep in the student's grid.
    fn student_index(&self, timestep: i64) -> Option<usize> {
        self.student.as_slice().iter().position(|t| *t == timestep)
    }
}

/// A request for states, and the inputs a source may use.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct SourceRequest<'a> {
    /// Number of student updates so far.
    pub step: u64,
    /// Index in the student's grid of each requested state; never 0 for backward sources.
    pub grid_indices: &'a [usize],
    /// Dataset samples, one per requested state.
    pub data: &'a Data,
    /// Unit noise, one sample per requested state, in the shape of the data.
    pub noise: &'a Tensor,
    /// Conditioning for trajectories, one row per requested state.
    pub prompts: &'a Conditioning,
    /// The grids of the run.
    pub grids: &'a Grids,
    /// The student's sampler.
    pub sampler: &'a dyn Sampler,
    /// The teacher's sampler.
    pub teacher_sampler: &'a dyn Sampler,
    /// The student, as it samples.
    pub student: &'a dyn Denoiser,
    /// The teacher.
    pub teacher: &'a dyn Denoiser,
    /// Random numbers.
    pub streams: RandomStreams,
}

impl<'a> SourceRequest<'a> {
    /// A request for one state per sample of `data`, at `grid_indices`.
    ///
    /// Trajectories have the conditioning of the data, and the teacher has the student's sampler.
    pub fn new(
        clock: &Clock,
        grid_indices: &'a [usize],
        (data, noise): (&'a Data, &'a Tensor),
        grids: &'a Grids,
        sampler: &'a dyn Sampler,
        networks: RolloutNetworks<'a>,
    ) -> Self {
        let RolloutNetworks { student, teacher } = networks;
        let Clock { step, streams, .. } = *clock;
        let (prompts, teacher_sampler) = (&data.conditioning, sampler);
        Self {
            step,
            grid_indices,
            data,
            noise,
            prompts,
            grids,
            sampler,
            teacher_sampler,
            student,
            teacher,
            streams,
        }
    }

    /// The same with another conditioning for trajectories, a row per requested state.
    #[must_use]
    pub fn with_prompts(self, prompts: &'a Conditioning) -> Self {
        Self { prompts, ..self }
    }

    /// The same with another sampler for the teacher.
    #[must_use]
    pub fn with_teacher_sampler(self, teacher_sampler: &'a dyn Sampler) -> Self {
        Self { teacher_sampler, ..self }
    }

    /// Number of requested states.
    pub fn len(&self) -> usize {
        self.grid_indices.len()
    }

    /// Whether no states are requested.
    pub fn is_empty(&self) -> bool {
        self.grid_indices.is_empty()
    }

    /// Checks that the parts fit each other; for implementations of a source.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a grid index beyond the grid;
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape), [`Error::Conditioning`] or [`Error::Scheduler`]
    /// for a part with another number of samples than there are indices, or without real numbers.
    pub fn ensure(&self) -> Result<()> {
        const OP: &str = "TrajectorySource::states";
        let len = self.grids.student.len();
        if let Some(index) = self.grid_indices.iter().find(|index| **index >= len) {
            return Err(Error::Invalid(Invalid::new(
                "grid_indices",
                index,
                format!("below {len}, the length of the grid"),
            )));
        }
        let (x0, batch) = (&self.data.x0, self.len() as i64);
        ensure_same_shape(OP, ("data.x0", x0), ("noise", self.noise))?;
        if x0.size().first() != Some(&batch) {
            let expected = format!("{batch} rows, one per grid index");
            return Err(Error::Argument(ArgumentError::Shape {
                op: OP,
                name: "data.x0",
                shape: x0.size(),
                expected,
            }));
        }
        self.data.conditioning.ensure_batch(OP, batch)?;
        self.prompts.ensure_batch(OP, batch)
    }

    /// The device of the requested states.
    pub fn device(&self) -> Device {
        self.data.x0.device()
    }

    /// Timestep of each requested state.
    pub fn timesteps(&self) -> Vec<i64> {
        self.grid_indices.iter().map(|&i| self.grids.student.as_slice()[i]).collect()
    }

    /// Shape of `batch` samples.
    fn shape(&self, batch: usize) -> Vec<i64> {
        let mut shape = self.data.x0.size();
        shape[0] = batch as i64;
        shape
    }

    /// Trajectories on `timesteps` in which the teacher acts according to `variant`.
    fn rollout(&self, timesteps: &'a Timesteps, variant: Option<MixedVariant>) -> MixedRollout<'a> {
        let student = (self.student, self.sampler, timesteps);
        let teacher = (self.teacher, self.teacher_sampler, &self.grids.teacher);
        MixedRollout::new(student, teacher, variant)
    }

    /// States of your own source, in the order of the request: `x_t` has a row per grid index, made at this step.
    ///
    /// An added source may pass any `source`: the mixer replaces it with the source's name.
    pub fn states(
        &self,
        x_t: Tensor,
        conditioning: Conditioning,
        source: crate::states::Source,
    ) -> States {
        self.made(x_t, conditioning, vec![source; self.len()])
    }

    /// States in the order of the request, with a source per state.
    fn made(
        &self,
        x_t: Tensor,
        conditioning: Conditioning,
        sources: Vec<crate::states::Source>,
    ) -> States {
        States {
            timesteps: on_device(&self.timesteps(), x_t.device()),
            x_t,
            grid_indices: self.grid_indices.to_vec(),
            conditioning,
            sources,
            created_at_step: vec![self.step; self.len()],
        }
    }
}

impl std::fmt::Debug for SourceRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceRequest")
            .field("step", &self.step)
            .field("grid_indices", &self.grid_indices)
            .finish_non_exhaustive()
    }
}

/// Some of the states of a request, with their own rows.
pub(crate) struct Selected {
    grid_indices: Vec<usize>,
    data: Data,
    noise: Tensor,
    prompts: Conditioning,
}

impl Selected {
    pub(crate) fn of(request: &SourceRequest<'_>, rows: &[usize]) -> Result<Self> {
        let order = index(rows, request.device());
        let x0 = request.data.x0.index_select(0, &order);
        let conditioning = request.data.conditioning.index_select(&order)?;
        Ok(Self {
            grid_indices: rows.iter().map(|&row| request.grid_indices[row]).collect(),
            data: Data { x0, conditioning },
            noise: request.noise.index_select(0, &order),
            prompts: request.prompts.index_select(&order)?,
        })
    }

    /// The request for these states; everything else is that of the whole request.
    pub(crate) fn request<'a>(&'a self, full: &SourceRequest<'a>) -> SourceRequest<'a> {
        SourceRequest {
            grid_indices: &self.grid_indices,
            data: &self.data,
            noise: &self.noise,
            prompts: &self.prompts,
            ..*full
        }
    }
}

/// Results of the loss for a batch, for sources that continue from them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LossFeedback<'a> {
    /// Number of student updates when the batch was made.
    pub step: u64,
    /// The batch.
    pub states: &'a States,
    /// The student's clean estimate of each state, treated as in rollouts.
    pub student_x0: &'a Tensor,
    /// The teacher's state at the next grid index, from each state.
    pub teacher_next: Option<&'a Tensor>,
    /// The grids of the run.
    pub grids: &'a Grids,
    /// The student's sampler.
    pub sampler: &'a dyn Sampler,
    /// Random numbers.
    pub streams: RandomStreams,
}

impl<'a> LossFeedback<'a> {
    /// The feedback of a batch that was made at `clock`.
    pub fn new(
        clock: &Clock,
        states: &'a States,
        feedback: &Feedback<'a>,
        grids: &'a Grids,
        sampler: &'a dyn Sampler,
    ) -> Self {
        let Feedback { student_x0, teacher_next, .. } = *feedback;
        let Clock { step, streams, .. } = *clock;
        Self { step, states, student_x0, teacher_next, grids, sampler, streams }
    }

    /// Checks that the parts fit each other; for implementations of a source.
    ///
    /// # Errors
    ///
    /// As [`States::ensure`]; [`Error::Invalid`] for a grid index beyond the grid, [`Error::Scheduler`] for
    /// estimates of another shape than the states.
    pub fn ensure(&self) -> Result<()> {
        const OP: &str = "TrajectorySource::after_loss";
        let (states, len) = (self.states, self.grids.student.len());
        states.ensure(OP)?;
        if let Some(index) = states.grid_indices.iter().find(|index| **index >= len) {
            return Err(Error::Invalid(Invalid::new(
                "grid_indices",
                index,
                format!("below {len}, the length of the grid"),
            )));
        }
        let x_t = ("x_t", &states.x_t);
        ensure_same_shape(OP, ("student_x0", self.student_x0), x_t)?;
        match self.teacher_next {
            Some(next) => Ok(ensure_same_shape(OP, ("teacher_next", next), x_t)?),
            None => Ok(()),
        }
    }
}

/// The settings of a source, by kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case")]
pub enum SourceConfig {
    /// Dataset samples, noised.
    Forward,
    /// The student's own trajectories.
    Student(StudentConfig),
    /// The teacher's trajectories.
    Teacher(TeacherConfig),
}

impl SourceConfig {
    /// Checks the settings and builds the source.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] that names the setting.
    pub fn build(&self, grids: &Grids) -> Result<Box<dyn TrajectorySource>> {
        Ok(match self {
            Self::Forward => Box::new(ForwardSource),
            Self::Student(config) => Box::new(StudentSource::new(config.clone(), grids)?),
            Self::Teacher(config) => Box::new(TeacherSource::new(config.clone(), grids)?),
        })
    }
}

/// Trajectories that each serve several requests: the `k`-th request at a grid index is served by trajectory `k`.
struct Shared {
    /// Trajectory of each request.
    trajectories: Vec<usize>,
    /// The first request of each trajectory, which provides its prompt.
    prompts: Vec<usize>,
}

impl Shared {
    fn new(grid_indices: &[usize], num_indices: usize) -> Self {
        let mut num_requests = vec![0; num_indices];
        let mut prompts = Vec::new();
        let trajectories = grid_indices.iter().enumerate().map(|(request, &grid_index)| {
            let trajectory = num_requests[grid_index];
            num_requests[grid_index] += 1;
            if trajectory == prompts.len() {
                prompts.push(request);
            }
            trajectory
        });
        Self { trajectories: trajectories.collect(), prompts }
    }

    /// One trajectory per request.
    fn alone(requests: usize) -> Self {
        Self { trajectories: (0..requests).collect(), prompts: (0..requests).collect() }
    }

    /// The least noisy timestep requested from each trajectory.
    fn targets(&self, timesteps: &[i64]) -> Vec<i64> {
        let mut targets = vec![i64::MAX; self.prompts.len()];
        for (&trajectory, &timestep) in self.trajectories.iter().zip(timesteps) {
            targets[trajectory] = targets[trajectory].min(timestep);
        }
        targets
    }

    fn prompts(&self, prompts: &Conditioning, device: Device) -> Result<Conditioning> {
        prompts.index_select(&index(&self.prompts, device))
    }
}
