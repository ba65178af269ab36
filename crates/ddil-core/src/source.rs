//! Where training states come from.

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
use crate::random::RandomStreams;
use crate::rollout::{MixedRollout, MixedVariant, ensure_part_of};
use crate::rows::{index, on_device};
use crate::saved::SavedState;
use crate::states::{Data, States};

/// Gives training states at the grid indices that it is asked for.
///
/// The networks are lent for the call and never kept. What a source draws, it draws from the streams of the request,
/// so that it has no random state of its own.
pub trait TrajectorySource: std::fmt::Debug + Send {
    /// A state for each of the request's grid indices, in their order.
    ///
    /// # Errors
    ///
    /// [`Error::NoState`] if there is none to give; whatever the networks say.
    fn states(&mut self, request: &SourceRequest<'_>) -> Result<States>;

    /// Sees what the student said of a batch. Most sources look away.
    ///
    /// # Errors
    ///
    /// As the source says.
    fn after_loss(&mut self, _feedback: &LossFeedback<'_>) -> Result<()> {
        Ok(())
    }

    /// Checks that batches of this size can be served, once, before any work. Most sources can serve any.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no room for what a batch needs.
    fn ensure_batch_size(&self, _batch: usize) -> Result<()> {
        Ok(())
    }

    /// Forgets everything, at a new stage.
    fn flush(&mut self) {}

    /// Copies all that [`restore`](Self::restore) needs; nothing for a source without a memory.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] if the metadata cannot be written.
    fn save(&self) -> Result<SavedState> {
        Ok(SavedState::default())
    }

    /// Becomes what was saved: the next states are the same, bit for bit.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] if what was saved is not like this source.
    fn restore(&mut self, saved: &SavedState) -> Result<()> {
        if saved.tensors.is_empty() {
            return Ok(());
        }
        let problem = "this source keeps nothing, but something was saved".to_owned();
        Err(Error::Restore { what: "source", problem })
    }
}

/// The grids of a run, noisiest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grids {
    /// Where the student is trained.
    pub student: Timesteps,
    /// Where the student is asked when it samples; a part of `student`, and the same in most methods. A latent
    /// consistency model is trained at 50 timesteps and sampled at 4.
    pub rollout: Timesteps,
    /// Where the teacher is asked in its rollouts; `student` and more between.
    pub teacher: Timesteps,
}

impl Grids {
    /// Checks that the grids fit each other.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `rollout` is part of `student`, `student` part of `teacher`, all begin at the
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
                let expected = format!("a grid that begins at {first}, as training does");
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

/// What a source is asked for, and what it may use.
#[derive(Clone, Copy)]
pub struct SourceRequest<'a> {
    /// Updates of the student so far.
    pub step: u64,
    /// Index in the student's grid of each state wanted; never 0 for backward sources.
    pub grid_indices: &'a [usize],
    /// Dataset samples, one a state wanted.
    pub data: &'a Data,
    /// Unit noise, one a state wanted, of the shape of the data.
    pub noise: &'a Tensor,
    /// What trajectories may be told, one row a state wanted.
    pub prompts: &'a Conditioning,
    /// The grids of the run.
    pub grids: &'a Grids,
    /// How the student steps.
    pub sampler: &'a dyn Sampler,
    /// How the teacher steps.
    pub teacher_sampler: &'a dyn Sampler,
    /// The learner, as it samples.
    pub student: &'a dyn Denoiser,
    /// The expert.
    pub teacher: &'a dyn Denoiser,
    /// Random numbers.
    pub streams: &'a RandomStreams,
}

impl<'a> SourceRequest<'a> {
    /// Number of states wanted.
    pub fn len(&self) -> usize {
        self.grid_indices.len()
    }

    /// Whether none are.
    pub fn is_empty(&self) -> bool {
        self.grid_indices.is_empty()
    }

    /// Checks that the parts fit each other, for whoever implements a source.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a grid index beyond the grid; [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape), [`Error::Conditioning`] or
    /// [`Error::Scheduler`] for a part that is not of as many samples as there are indices, or holds no real numbers.
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
            let expected = format!("{batch} rows, one a grid index");
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

    /// Where states are wanted.
    pub fn device(&self) -> Device {
        self.data.x0.device()
    }

    /// Timestep of each state wanted.
    pub fn timesteps(&self) -> Vec<i64> {
        self.grid_indices.iter().map(|&i| self.grids.student.as_slice()[i]).collect()
    }

    /// Shape of `batch` samples.
    fn shape(&self, batch: usize) -> Vec<i64> {
        let mut shape = self.data.x0.size();
        shape[0] = batch as i64;
        shape
    }

    /// Trajectories on `timesteps` that the teacher takes part in as `variant` says.
    fn rollout(&self, timesteps: &'a Timesteps, variant: Option<MixedVariant>) -> MixedRollout<'a> {
        MixedRollout {
            student: self.student,
            student_sampler: self.sampler,
            timesteps,
            teacher: self.teacher,
            teacher_sampler: self.teacher_sampler,
            teacher_timesteps: &self.grids.teacher,
            variant,
        }
    }

    /// States of a source of one's own, in the order of the request: `x_t` with a row per grid index, made at this step.
    ///
    /// A source that was added by name may pass any `source`: the mixer writes its name there.
    pub fn states(
        &self,
        x_t: Tensor,
        conditioning: Conditioning,
        source: crate::states::Source,
    ) -> States {
        self.made(x_t, conditioning, vec![source; self.len()])
    }

    /// States in the order of the request, each from a source of its own.
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
            births: vec![self.step; self.len()],
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

/// Some of the states of a request, with rows of their own.
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

    /// The request for these states; all else is that of the whole.
    pub(crate) fn request<'a>(&'a self, whole: &SourceRequest<'a>) -> SourceRequest<'a> {
        SourceRequest {
            grid_indices: &self.grid_indices,
            data: &self.data,
            noise: &self.noise,
            prompts: &self.prompts,
            ..*whole
        }
    }
}

/// What the loss computed of a batch, for sources that go on from there.
#[derive(Clone, Copy, Debug)]
pub struct LossFeedback<'a> {
    /// Updates of the student when the batch was made.
    pub step: u64,
    /// The batch.
    pub states: &'a States,
    /// The student's clean estimate of each state, treated as in rollouts.
    pub student_x0: &'a Tensor,
    /// Where the teacher goes from each state: its state at the next grid index.
    pub teacher_next: Option<&'a Tensor>,
    /// The grids of the run.
    pub grids: &'a Grids,
    /// How the student steps.
    pub sampler: &'a dyn Sampler,
    /// Random numbers.
    pub streams: &'a RandomStreams,
}

impl LossFeedback<'_> {
    /// Checks that the parts fit each other, for whoever implements a source.
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

/// Trajectories that serve several requests each: the `k`-th request at a grid index goes to trajectory `k`.
struct Shared {
    /// Trajectory of each request.
    trajectories: Vec<usize>,
    /// The first request of each trajectory, whose prompt it is told.
    prompts: Vec<usize>,
}

impl Shared {
    fn new(grid_indices: &[usize], num_indices: usize) -> Self {
        let mut asked = vec![0; num_indices];
        let mut prompts = Vec::new();
        let trajectories = grid_indices.iter().enumerate().map(|(request, &grid_index)| {
            let trajectory = asked[grid_index];
            asked[grid_index] += 1;
            if trajectory == prompts.len() {
                prompts.push(request);
            }
            trajectory
        });
        Self { trajectories: trajectories.collect(), prompts }
    }

    /// A trajectory for each request.
    fn alone(requests: usize) -> Self {
        Self { trajectories: (0..requests).collect(), prompts: (0..requests).collect() }
    }

    /// The least noisy of the requests of each trajectory.
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
