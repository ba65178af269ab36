//! States visited by the student.

mod chains;

use ddil_files::Invalid;
use ddil_schedulers::Timesteps;
use rand::Rng;
use serde::{Deserialize, Serialize};

use self::chains::Chains;
use super::{Grids, LossFeedback, Selected, Shared, SourceRequest, TrajectorySource};
use crate::buffer::{AggregationBuffer, BufferConfig};
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::random::{Draws, Stream};
use crate::rollout::{MixedVariant, Visited};
use crate::rows::{index, inverse, on_device};
use crate::saved::SavedState;
use crate::states::{Source, States};

/// How the student's states are made.
///
/// Cost per state in student evaluations, with `n` the length of the grid: `Fresh` about `n / 2`, `FreshAll` about 1,
/// `Buffer` about `new_fraction` times `n`, `Chain` about `refresh_fraction` times `n / 2`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum StudentPolicy {
    /// A separate rollout for each state: independent and from the current student.
    Fresh,
    /// Rollouts whose states are all used in the batch.
    FreshAll,
    /// An [`AggregationBuffer`] filled by fresh rollouts.
    Buffer {
        /// Share of the requested states that are rolled out afresh; default 0.25. All states of such a rollout are
        /// inserted into the buffer. An index without a state within the age limit is always rolled out.
        #[serde(default = "default_new_fraction")]
        new_fraction: f64,
        /// The buffer.
        #[serde(default)]
        buffer: BufferConfig,
    },
    /// Trajectories that each loss advances by one step, from the clean estimate that it computes anyway: no extra
    /// evaluations, and states are at most a few updates old. States missing at an index are made by advancing existing
    /// ones.
    Chain {
        /// Share of the requested states that are rolled out afresh, so that consecutive batches are less correlated;
        /// default 0.1.
        #[serde(default = "default_refresh_fraction")]
        refresh_fraction: f64,
    },
}

fn default_new_fraction() -> f64 {
    0.25
}

fn default_refresh_fraction() -> f64 {
    0.1
}

impl Default for StudentPolicy {
    fn default() -> Self {
        Self::Chain { refresh_fraction: default_refresh_fraction() }
    }
}

/// Settings of the student's source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct StudentConfig {
    /// How states are made; default chains.
    pub policy: StudentPolicy,
    /// When the teacher acts instead of the student; default never.
    pub mixed: Option<MixedVariant>,
    /// Minimum and maximum number of steps of a rollout; each trajectory draws its own, so that the student is also
    /// trained on states of other step counts. Default: the grid on which it is sampled. For students whose sampler can
    /// go to any timestep, with the policies `fresh` and `buffer`.
    ///
    /// `n` steps are spaced evenly over the training grid, as in [`Timesteps::lcm`].
    pub rollout_steps: Option<RolloutSteps>,
}

/// Range of the number of steps of a rollout, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutSteps {
    /// Minimum, at least 1.
    pub min: usize,
    /// Maximum, at most the length of the training grid.
    pub max: usize,
}

impl RolloutSteps {
    /// A grid for each number of steps.
    fn grids(self, training: &Timesteps) -> Result<Vec<Timesteps>> {
        let Self { min, max } = self;
        let (all, len) = (training.as_slice(), training.len());
        if !(1 <= min && min <= max && max <= len) {
            return Err(Error::Invalid(Invalid::new(
                "student.rollout_steps",
                format!("{min}..={max}"),
                format!("in order and in 1..={len}, the length of the training grid"),
            )));
        }
        let num_train_timesteps = all[0] as u32 + 1;
        let grid = |n: usize| (0..n).map(|step| all[step * len / n]).collect();
        (min..=max).map(|n| Ok(Timesteps::explicit(grid(n), num_train_timesteps)?)).collect()
    }
}

impl StudentConfig {
    /// The same settings with a change: `StudentConfig::default().with(|config| config.policy = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn ensure(&self, grids: &Grids) -> Result<()> {
        if let Some(mixed) = self.mixed {
            mixed.ensure()?;
        }
        let fraction = match self.policy {
            StudentPolicy::Buffer { new_fraction, .. } => ("policy.new_fraction", new_fraction),
            StudentPolicy::Chain { refresh_fraction } => {
                ("policy.refresh_fraction", refresh_fraction)
            }
            StudentPolicy::Fresh | StudentPolicy::FreshAll => ("", 0.0),
        };
        if !(0.0..=1.0).contains(&fraction.1) {
            return Err(Error::Invalid(Invalid::new(fraction.0, fraction.1, "in 0..=1")));
        }
        let everywhere =
            matches!(self.policy, StudentPolicy::FreshAll | StudentPolicy::Chain { .. });
        if everywhere && (grids.rollout != grids.student || self.rollout_steps.is_some()) {
            return Err(Error::Invalid(Invalid::new(
                "policy.kind",
                "fresh_all or chain",
                "fresh or buffer when the student is sampled at timesteps other than those it \
                           is trained at",
            )));
        }
        let chain = matches!(self.policy, StudentPolicy::Chain { .. });
        if chain && matches!(self.mixed, Some(MixedVariant::Conditional { .. })) {
            return Err(Error::Invalid(Invalid::new(
                "mixed.kind",
                "conditional",
                "another one with chains, which evaluate no network",
            )));
        }
        Ok(())
    }
}

/// The student's backward trajectories.
#[derive(Debug)]
pub struct StudentSource {
    paths: Paths,
    memory: Memory,
}

/// The possible paths of a trajectory.
#[derive(Debug)]
struct Paths {
    mixed: Option<MixedVariant>,
    /// Grids of which each trajectory draws one; empty if all use the grid of the run.
    grids: Vec<Timesteps>,
}

/// State kept between steps, by policy.
#[derive(Debug)]
enum Memory {
    Fresh,
    FreshAll,
    Buffer { new_fraction: f64, buffer: AggregationBuffer },
    Chain { refresh_fraction: f64, chains: Chains },
}

impl StudentSource {
    /// # Errors
    ///
    /// [`Error::Invalid`] that names the setting.
    pub fn new(config: StudentConfig, grids: &Grids) -> Result<Self> {
        config.ensure(grids)?;
        let drawn = config.rollout_steps.map(|steps| steps.grids(&grids.student)).transpose()?;
        let paths = Paths { mixed: config.mixed, grids: drawn.unwrap_or_default() };
        let memory = match config.policy {
            StudentPolicy::Fresh => Memory::Fresh,
            StudentPolicy::FreshAll => Memory::FreshAll,
            StudentPolicy::Buffer { new_fraction, buffer } => {
                let buffer = AggregationBuffer::new(buffer, &grids.student)?;
                Memory::Buffer { new_fraction, buffer }
            }
            StudentPolicy::Chain { refresh_fraction } => {
                Memory::Chain { refresh_fraction, chains: Chains::new(&grids.student) }
            }
        };
        Ok(Self { paths, memory })
    }

    /// The buffer, if the policy has one.
    pub fn buffer(&self) -> Option<&AggregationBuffer> {
        match &self.memory {
            Memory::Buffer { buffer, .. } => Some(buffer),
            _ => None,
        }
    }
}

impl TrajectorySource for StudentSource {
    fn states(&mut self, request: &SourceRequest<'_>) -> Result<States> {
        request.ensure()?;
        let mut draws = request.streams.draws(request.step, Stream::Student, request.device())?;
        let paths = &self.paths;
        match &mut self.memory {
            Memory::Fresh => fresh(request, paths, &Shared::alone(request.len()), &mut draws),
            Memory::FreshAll => {
                let shared = Shared::new(request.grid_indices, request.grids.student.len());
                fresh(request, paths, &shared, &mut draws)
            }
            Memory::Buffer { new_fraction, buffer } => {
                buffered(request, paths, *new_fraction, buffer, &mut draws)
            }
            Memory::Chain { refresh_fraction, chains } => {
                chains.states(request, paths.mixed, *refresh_fraction, &mut draws)
            }
        }
    }

    fn after_loss(&mut self, feedback: &LossFeedback<'_>) -> Result<()> {
        feedback.ensure()?;
        match &mut self.memory {
            Memory::Chain { chains, .. } => chains.advance(feedback, self.paths.mixed),
            _ => Ok(()),
        }
    }

    fn ensure_batch_size(&self, batch: usize) -> Result<()> {
        self.buffer().map_or(Ok(()), |buffer| buffer.ensure_batch_size(batch))
    }

    fn flush(&mut self) {
        match &mut self.memory {
            Memory::Buffer { buffer, .. } => buffer.flush(),
            Memory::Chain { chains, .. } => chains.flush(),
            Memory::Fresh | Memory::FreshAll => {}
        }
    }

    fn save(&self) -> Result<SavedState> {
        match &self.memory {
            Memory::Buffer { buffer, .. } => buffer.save(),
            Memory::Chain { chains, .. } => chains.save(),
            Memory::Fresh | Memory::FreshAll => Ok(SavedState::default()),
        }
    }

    fn restore(&mut self, saved: &SavedState) -> Result<()> {
        match &mut self.memory {
            Memory::Buffer { buffer, .. } => buffer.restore(saved),
            Memory::Chain { chains, .. } => chains.restore(saved),
            Memory::Fresh | Memory::FreshAll if saved.tensors.is_empty() => Ok(()),
            Memory::Fresh | Memory::FreshAll => Err(Error::Restore {
                what: "student source",
                problem: "its policy has no state, but the saved one is not empty".to_owned(),
            }),
        }
    }
}

/// Rolls out trajectories from noise and selects the requested states.
fn fresh(
    request: &SourceRequest<'_>,
    paths: &Paths,
    shared: &Shared,
    draws: &mut Draws,
) -> Result<States> {
    let targets = shared.targets(&request.timesteps());
    let (visited, prompts) = roll_out(request, paths, shared, &targets, draws)?;
    requested(request, shared, &visited, &prompts)
}

/// Trajectories from fresh noise to `targets`, and the conditioning of each.
fn roll_out(
    request: &SourceRequest<'_>,
    paths: &Paths,
    shared: &Shared,
    targets: &[i64],
    draws: &mut Draws,
) -> Result<(Visited, Conditioning)> {
    let kind = request.data.x0.kind();
    let noise = draws.generator.normal(request.shape(targets.len()), kind)?;
    let prompts = shared.prompts(request.prompts, request.device())?;
    if paths.grids.is_empty() {
        let rollout = request.rollout(&request.grids.rollout, paths.mixed);
        return Ok((rollout.visit(&noise, &prompts, targets, draws)?, prompts));
    }
    let drawn: Vec<usize> =
        targets.iter().map(|_| draws.rng.random_range(0..paths.grids.len())).collect();
    let mut parts = Vec::new();
    for (i, grid) in paths.grids.iter().enumerate() {
        let rows: Vec<usize> = (0..targets.len()).filter(|&row| drawn[row] == i).collect();
        if rows.is_empty() {
            continue;
        }
        let order = index(&rows, request.device());
        let (noise, prompts) = (noise.index_select(0, &order), prompts.index_select(&order)?);
        let targets: Vec<i64> = rows.iter().map(|&row| targets[row]).collect();
        let request = *request;
        let visited =
            request.rollout(grid, paths.mixed).visit(&noise, &prompts, &targets, draws)?;
        parts.push(visited.renumbered(&rows));
    }
    Ok((Visited::cat(parts)?, prompts))
}

/// The requested states among those visited.
fn requested(
    request: &SourceRequest<'_>,
    shared: &Shared,
    visited: &Visited,
    prompts: &Conditioning,
) -> Result<States> {
    let positions = shared
        .trajectories
        .iter()
        .zip(request.timesteps())
        .map(|(&row, timestep)| visited.position(row, timestep))
        .collect::<Option<Vec<usize>>>()
        .ok_or_else(noise_is_no_state)?;
    let device = visited.x_t.device();
    let x_t = visited.x_t.index_select(0, &index(&positions, device));
    let conditioning = prompts.index_select(&index(&shared.trajectories, device))?;
    let sources = positions.iter().map(|&p| source(visited.teacher_acted[p])).collect();
    Ok(request.made(x_t, conditioning, sources))
}

/// States from the buffer, some of them rolled out and inserted first.
fn buffered(
    request: &SourceRequest<'_>,
    paths: &Paths,
    new_fraction: f64,
    buffer: &mut AggregationBuffer,
    draws: &mut Draws,
) -> Result<States> {
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for (i, &grid_index) in request.grid_indices.iter().enumerate() {
        let is_new = draws.rng.random::<f64>() < new_fraction;
        let kept = buffer.available(grid_index, request.step) > 0;
        if is_new || !kept { new.push(i) } else { old.push(i) }
    }
    let indices: Vec<usize> = old.iter().map(|&i| request.grid_indices[i]).collect();
    let mut parts = Vec::with_capacity(2);
    if !old.is_empty() {
        parts.push(buffer.sample(&indices, request.step, &mut draws.rng)?);
    }
    if !new.is_empty() {
        let part = Selected::of(request, &new)?;
        parts.push(rolled_into(&part.request(request), paths, buffer, draws)?);
    }
    let order = inverse(&[old, new].concat());
    States::cat(&parts)?.index_select(&order)
}

/// Rolls out whole trajectories, inserts all visited states into the buffer and selects the requested ones.
fn rolled_into(
    request: &SourceRequest<'_>,
    paths: &Paths,
    buffer: &mut AggregationBuffer,
    draws: &mut Draws,
) -> Result<States> {
    let shared = Shared::alone(request.len());
    let grids = request.grids;
    let targets = if grids.rollout == grids.student && paths.grids.is_empty() {
        vec![grids.student.as_slice().last().copied().unwrap_or(-1); request.len()]
    } else {
        // Between two timesteps of the rollout there are many to stop at; the requested one is as good as any.
        request.timesteps()
    };
    let (visited, prompts) = roll_out(request, paths, &shared, &targets, draws)?;
    let grid_indices: Option<Vec<usize>> =
        visited.timesteps.iter().map(|&t| grids.student_index(t)).collect();
    let device = visited.x_t.device();
    buffer.insert(&States {
        x_t: visited.x_t.shallow_clone(),
        timesteps: on_device(&visited.timesteps, device),
        grid_indices: grid_indices.ok_or_else(noise_is_no_state)?,
        conditioning: prompts.index_select(&index(&visited.rows, device))?,
        sources: visited.teacher_acted.iter().map(|&acted| source(acted)).collect(),
        created_at_step: vec![request.step; visited.rows.len()],
    })?;
    requested(request, &shared, &visited, &prompts)
}

/// The source of a trajectory.
fn source(teacher_acted: bool) -> Source {
    if teacher_acted { Source::Mixed } else { Source::Student }
}

fn noise_is_no_state() -> Error {
    Error::NoState {
        source_name: "student",
        reason: "grid index 0 is pure noise, not a state of a trajectory".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_grids_are_those_of_latent_consistency_models() -> Result<()> {
        let training = Timesteps::lcm(1000, 50, 50)?;
        let grids = RolloutSteps { min: 1, max: 50 }.grids(&training)?;
        for (n, grid) in (1..=50).zip(&grids) {
            assert_eq!(*grid, Timesteps::lcm(1000, 50, n)?);
        }
        Ok(())
    }
}
