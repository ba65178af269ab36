//! States visited by the teacher.

use ddil_files::Invalid;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Grids, Shared, SourceRequest, TrajectorySource};
use crate::buffer::StorageKind;
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::random::{Draws, Stream};
use crate::rollout::{MixedVariant, Visited};
use crate::rows::{RowStore, index, on_device};
use crate::saved::SavedState;
use crate::states::{Source, States};

/// Which states of the teacher's trajectories are used for training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherStates {
    /// The states on the way: for a sampler that follows the teacher's ODE, such as DDIM.
    #[default]
    Visited,
    /// The noised end points: the states of a sampler that adds fresh noise to its clean estimate at each step, as
    /// those of LCM and DMD2 do, with the teacher as network. One trajectory serves every timestep.
    Renoised,
}

impl TeacherStates {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
    fn is_visited(&self) -> bool {
        *self == Self::Visited
    }
}

/// Settings of the teacher's source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TeacherConfig {
    /// Number of trajectories kept for reuse; default 1024, 0 makes new rollouts each time. The teacher does not
    /// change, so its states never expire. The pool is filled on demand; until it is full, it saves nothing.
    pub pool: usize,
    /// Which states of a trajectory are used; default those on the way.
    // Omitted if default, so that runs from before the setting existed keep their name.
    #[serde(skip_serializing_if = "TeacherStates::is_visited")]
    pub states: TeacherStates,
    /// Number of states kept per trajectory; default all. For grids of many timesteps.
    pub states_per_trajectory: Option<usize>,
    /// DDIM steps of the teacher in each interval of the student's grid; default 2.
    pub substeps: u32,
    /// Number format that states in the pool are stored in; default f16.
    pub storage: StorageKind,
}

impl Default for TeacherConfig {
    fn default() -> Self {
        Self {
            pool: 1024,
            states: TeacherStates::default(),
            states_per_trajectory: None,
            substeps: 2,
            storage: StorageKind::default(),
        }
    }
}

impl TeacherConfig {
    /// The same settings with a change: `TeacherConfig::default().with(|config| config.substeps = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

/// The teacher's backward trajectories, with a pool of them that is filled on demand.
#[derive(Debug)]
pub struct TeacherSource {
    config: TeacherConfig,
    /// Number of states kept per trajectory.
    kept: usize,
    pool: Pool,
    rows: RowStore,
}

/// The contents of the rows: those of one trajectory are adjacent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pool {
    /// Step at which each trajectory was made.
    #[serde(rename = "births")]
    created_at_step: Vec<u64>,
    /// Rows of each grid index; end points of trajectories are at 0, where no state is kept.
    at: Vec<Vec<usize>>,
}

/// Timestep of clean data.
const END: i64 = -1;

const WHAT: &str = "teacher pool";

/// The teacher acts in every interval.
const TEACHER_ALONE: MixedVariant = MixedVariant::TeacherThenStudent { switch: usize::MAX };

impl TeacherSource {
    /// # Errors
    ///
    /// [`Error::Invalid`] if the settings keep no states of a trajectory.
    pub fn new(config: TeacherConfig, grids: &Grids) -> Result<Self> {
        if config.states_per_trajectory == Some(0) {
            return Err(Error::Invalid(Invalid::new(
                "teacher.states_per_trajectory",
                "0",
                "at least 1",
            )));
        }
        let all = match config.states {
            TeacherStates::Visited => grids.student.len() - 1,
            TeacherStates::Renoised => 1,
        };
        let kept = config.states_per_trajectory.map_or(all, |kept| kept.min(all));
        if config.pool.checked_mul(kept.max(1)).is_none_or(|rows| i64::try_from(rows).is_err()) {
            return Err(Error::Invalid(Invalid::new(
                "teacher.pool",
                config.pool,
                "fewer trajectories: the number of their states overflows",
            )));
        }
        Ok(Self {
            kept,
            pool: Pool { created_at_step: vec![], at: vec![vec![]; grids.student.len()] },
            rows: RowStore::new(WHAT, Some(config.storage.kind())),
            config,
        })
    }

    /// Number of trajectories in the pool.
    pub fn pooled(&self) -> usize {
        self.pool.created_at_step.len()
    }

    /// Index in [`Pool::at`] of the states for a grid index.
    fn slot(&self, grid_index: usize) -> usize {
        match self.config.states {
            TeacherStates::Visited => grid_index,
            TeacherStates::Renoised => 0,
        }
    }

    /// The timestep that a trajectory has to reach for a state at another timestep.
    fn source_of(&self, timestep: i64) -> i64 {
        match self.config.states {
            TeacherStates::Visited => timestep,
            TeacherStates::Renoised => END,
        }
    }

    /// Rolls out trajectories shared among the requests, and keeps those that fit.
    fn fresh(&mut self, request: &SourceRequest<'_>, draws: &mut Draws) -> Result<States> {
        let shared = if self.config.pool == 0 {
            Shared::alone(request.len())
        } else {
            Shared::new(request.grid_indices, request.grids.student.len())
        };
        let timesteps: Vec<i64> =
            request.timesteps().into_iter().map(|timestep| self.source_of(timestep)).collect();
        let pooling = self.pooled() < self.config.pool;
        let targets = if pooling {
            let last = request.grids.student.as_slice().last().copied().unwrap_or(END);
            vec![self.source_of(last); shared.prompts.len()]
        } else {
            shared.targets(&timesteps)
        };
        let x0 = &request.data.x0;
        let noise = draws.generator.normal(request.shape(targets.len()), x0.kind())?;
        let prompts = shared.prompts(request.prompts, request.device())?;
        let visited = request
            .rollout(&request.grids.student, Some(TEACHER_ALONE))
            .visit(&noise, &prompts, &targets, draws)?;
        if pooling {
            self.keep(request, &visited, &prompts, draws)?;
        }
        let wanted: Option<Vec<usize>> = shared
            .trajectories
            .iter()
            .zip(&timesteps)
            .map(|(&row, &timestep)| visited.position(row, timestep))
            .collect();
        let wanted = wanted.ok_or_else(|| Error::NoState {
            source_name: "teacher",
            reason: "grid index 0 is pure noise, not a state of a trajectory".to_owned(),
        })?;
        let device = visited.x_t.device();
        let x_t = visited.x_t.index_select(0, &index(&wanted, device));
        let conditioning = prompts.index_select(&index(&shared.trajectories, device))?;
        self.made(request, x_t, conditioning)
    }

    /// States from rows of trajectories, in the order of the request.
    fn made(
        &self,
        request: &SourceRequest<'_>,
        rows: Tensor,
        conditioning: Conditioning,
    ) -> Result<States> {
        let x_t = match self.config.states {
            TeacherStates::Visited => rows,
            TeacherStates::Renoised => {
                let timesteps = on_device(&request.timesteps(), rows.device());
                request.sampler.schedule().add_noise(&rows, request.noise, &timesteps)?
            }
        };
        Ok(request.made(x_t, conditioning, vec![Source::Teacher; request.len()]))
    }

    /// Inserts trajectories into the pool while there is room.
    fn keep(
        &mut self,
        request: &SourceRequest<'_>,
        visited: &Visited,
        prompts: &Conditioning,
        draws: &mut Draws,
    ) -> Result<()> {
        let trajectories = (self.config.pool - self.pooled()).min(prompts_len(visited));
        let mut indices: Vec<usize> = match self.config.states {
            TeacherStates::Visited => (1..request.grids.student.len()).collect(),
            TeacherStates::Renoised => vec![0],
        };
        let (mut rows, mut from) = (Vec::new(), Vec::new());
        for trajectory in 0..trajectories {
            if self.kept < indices.len() {
                indices.shuffle(&mut draws.rng);
            }
            for (slot, &grid_index) in indices.iter().take(self.kept).enumerate() {
                let timestep = self.source_of(request.grids.student.as_slice()[grid_index]);
                let Some(position) = visited.position(trajectory, timestep) else { continue };
                let row = self.pooled() * self.kept + slot;
                rows.push(row);
                from.push(position);
                self.pool.at[grid_index].push(row);
            }
            self.pool.created_at_step.push(request.step);
        }
        let device = visited.x_t.device();
        let x_t = visited.x_t.index_select(0, &index(&from, device));
        let kept_prompts: Vec<usize> =
            from.iter().map(|&position| visited.rows[position]).collect();
        let kept_prompts = prompts.index_select(&index(&kept_prompts, device))?;
        self.rows.write(self.config.pool * self.kept, &rows, &x_t, &kept_prompts)
    }

    /// Draws from the pool, uniformly with replacement.
    fn pooled_states(&self, request: &SourceRequest<'_>, rng: &mut impl Rng) -> Result<States> {
        let choose = |&grid_index: &usize| {
            let at = &self.pool.at[self.slot(grid_index)];
            at[rng.random_range(0..at.len())]
        };
        let rows: Vec<usize> = request.grid_indices.iter().map(choose).collect();
        let (x_t, conditioning) = self.rows.read(&rows)?;
        let mut states = self.made(request, x_t, conditioning)?;
        states.created_at_step =
            rows.iter().map(|row| self.pool.created_at_step[row / self.kept]).collect();
        Ok(states)
    }
}

impl TrajectorySource for TeacherSource {
    fn states(&mut self, request: &SourceRequest<'_>) -> Result<States> {
        request.ensure()?;
        let mut draws = request.streams.draws(request.step, Stream::Teacher, request.device())?;
        let full = self.pooled() >= self.config.pool;
        // With few states per trajectory, an index may be missing from the whole pool.
        let covered = request.grid_indices.iter().all(|&i| !self.pool.at[self.slot(i)].is_empty());
        if self.config.pool > 0 && full && covered {
            return self.pooled_states(request, &mut draws.rng);
        }
        self.fresh(request, &mut draws)
    }

    fn flush(&mut self) {
        self.pool.created_at_step.clear();
        self.pool.at.iter_mut().for_each(Vec::clear);
        self.rows.clear();
    }

    fn save(&self) -> Result<SavedState> {
        SavedState::serialized(WHAT, self.rows.tensors(), &self.pool)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let pool: Pool = saved.metadata(WHAT)?;
        let capacity = self.config.pool * self.kept;
        let rows_fit =
            pool.at.iter().flatten().all(|&row| row < pool.created_at_step.len() * self.kept);
        if pool.at.len() != self.pool.at.len()
            || pool.created_at_step.len() > self.config.pool
            || !rows_fit
        {
            let problem = format!(
                "{} trajectories over {} grid indices; there is room for {} over {}",
                pool.created_at_step.len(),
                pool.at.len(),
                self.config.pool,
                self.pool.at.len()
            );
            return Err(Error::Restore { what: WHAT, problem });
        }
        self.rows.restore(capacity, &saved.tensors)?;
        self.pool = pool;
        Ok(())
    }
}

/// Number of trajectories visited.
fn prompts_len(visited: &Visited) -> usize {
    visited.rows.iter().max().map_or(0, |row| row + 1)
}
