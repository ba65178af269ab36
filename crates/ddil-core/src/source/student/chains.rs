//! Trajectories that advance by one interval per loss.

use std::collections::VecDeque;

use ddil_files::Invalid;
use ddil_schedulers::{Prediction, Timesteps};
use rand::Rng;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{noise_is_no_state, source};
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::random::{Draws, Stream};
use crate::rollout::{MixedVariant, sampler_step};
use crate::rows::{RowStore, index, inverse, on_device};
use crate::saved::SavedState;
use crate::source::{LossFeedback, Selected, SourceRequest};
use crate::states::{Source, States};

/// States queued at each grid index for training, made by the student of a few updates ago.
///
/// A batch draws its grid indices uniformly, so on average as many states arrive at an index as are requested there. If
/// by chance there are too few, a state is advanced from an earlier index; if there are too many, the oldest are
/// dropped.
#[derive(Debug)]
pub(super) struct Chains {
    /// Length of the grid.
    len: usize,
    queues: Queues,
    rows: RowStore,
}

/// The contents of the rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Queues {
    /// Maximum number of states queued at an index: the batch size of the first loss.
    most: usize,
    /// Unused rows.
    free: Vec<usize>,
    /// One queue per grid index from 1, oldest first.
    waiting: Vec<VecDeque<Waiting>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Waiting {
    row: usize,
    #[serde(rename = "birth")]
    created_at_step: u64,
    teacher_acted: bool,
}

/// Requests, and the queued states from which they continue; none if they start from noise.
#[derive(Default)]
struct Group {
    requests: Vec<usize>,
    from: Vec<Waiting>,
}

/// How the requests of a batch are served.
struct Plan {
    /// Requests whose states are queued at the requested index.
    ready: Group,
    /// Requests whose states have to be advanced, by the grid index at which they start; 0 is noise.
    advances: Vec<(usize, Group)>,
}

const WHAT: &str = "chains";

impl Chains {
    pub(super) fn new(timesteps: &Timesteps) -> Self {
        let waiting = vec![VecDeque::new(); timesteps.len() - 1];
        let queues = Queues { waiting, ..Queues::default() };
        Self { len: timesteps.len(), queues, rows: RowStore::new(WHAT, None) }
    }

    /// One state per request: one queued at its index, else one advanced from an earlier index.
    pub(super) fn states(
        &mut self,
        request: &SourceRequest<'_>,
        mixed: Option<MixedVariant>,
        refresh_fraction: f64,
        draws: &mut Draws,
    ) -> Result<States> {
        if request.grid_indices.contains(&0) {
            return Err(noise_is_no_state());
        }
        let Plan { ready, advances } = self.plan(request, refresh_fraction, &mut draws.rng);
        let mut parts = Vec::new();
        let mut order = ready.requests.clone();
        if !ready.requests.is_empty() {
            let part = Selected::of(request, &ready.requests)?;
            parts.push(self.waiting_states(&part.request(request), &ready.from)?);
        }
        for (start, group) in &advances {
            let part = Selected::of(request, &group.requests)?;
            parts.push(self.advance_from(
                &part.request(request),
                mixed,
                *start,
                &group.from,
                draws,
            )?);
            order.extend(&group.requests);
        }
        let groups = advances.iter().map(|(_, group)| group).chain([&ready]);
        self.queues.free.extend(groups.flat_map(|group| &group.from).map(|waiting| waiting.row));
        States::cat(&parts)?.index_select(&inverse(&order))
    }

    /// The queued state for each request. States queued at the requested index are assigned first, for all requests.
    fn plan(
        &mut self,
        request: &SourceRequest<'_>,
        refresh_fraction: f64,
        rng: &mut impl Rng,
    ) -> Plan {
        // States queued for longer than a trajectory takes are leftovers, made by an unnecessarily old student.
        self.queues.drop_old(request.step, self.len as u64);
        let mut ready = Group::default();
        let mut advances: Vec<(usize, Group)> =
            (0..self.len).map(|start| (start, Group::default())).collect();
        let mut unmet = Vec::new();
        for (i, &grid_index) in request.grid_indices.iter().enumerate() {
            if rng.random::<f64>() < refresh_fraction {
                advances[0].1.requests.push(i);
            } else if let Some(waiting) = self.queues.newest(grid_index) {
                ready.add(i, waiting);
            } else {
                unmet.push(i);
            }
        }
        for i in unmet {
            let mut earlier = (1..request.grid_indices[i]).rev();
            let found = earlier.find_map(|at| Some((at, self.queues.newest(at)?)));
            match found {
                Some((start, waiting)) => advances[start].1.add(i, waiting),
                None => advances[0].1.requests.push(i),
            }
        }
        advances.retain(|(_, group)| !group.requests.is_empty());
        Plan { ready, advances }
    }

    /// States that are at the requested index.
    fn waiting_states(&self, request: &SourceRequest<'_>, from: &[Waiting]) -> Result<States> {
        let (x_t, conditioning) = self.read(request, from)?;
        let sources = from.iter().map(|waiting| source(waiting.teacher_acted)).collect();
        let created_at_step = from.iter().map(|waiting| waiting.created_at_step).collect();
        Ok(States { created_at_step, ..request.made(x_t, conditioning, sources) })
    }

    /// States that have to be advanced from grid index `start`.
    fn advance_from(
        &self,
        request: &SourceRequest<'_>,
        mixed: Option<MixedVariant>,
        start: usize,
        from: &[Waiting],
        draws: &mut Draws,
    ) -> Result<States> {
        let rollout = request.rollout(&request.grids.student, mixed);
        let targets = request.timesteps();
        let (visited, conditioning) = if start == 0 {
            let kind = request.data.x0.kind();
            let noise = draws.generator.normal(request.shape(request.len()), kind)?;
            let visited = rollout.visit(&noise, request.prompts, &targets, draws)?;
            (visited, request.prompts.shallow_clone())
        } else {
            let (x_t, conditioning) = self.read(request, from)?;
            (rollout.visit_from(start, &x_t, &conditioning, &targets, draws)?, conditioning)
        };
        let positions = (0..request.len())
            .map(|row| visited.position(row, targets[row]))
            .collect::<Option<Vec<usize>>>()
            .ok_or_else(noise_is_no_state)?;
        let x_t = visited.x_t.index_select(0, &index(&positions, visited.x_t.device()));
        let acted = |(row, &position): (usize, &usize)| {
            visited.teacher_acted[position] || from.get(row).is_some_and(|w| w.teacher_acted)
        };
        let sources = positions.iter().enumerate().map(acted).map(source).collect();
        Ok(request.made(x_t, conditioning, sources))
    }

    fn read(
        &self,
        request: &SourceRequest<'_>,
        from: &[Waiting],
    ) -> Result<(Tensor, Conditioning)> {
        let rows: Vec<usize> = from.iter().map(|waiting| waiting.row).collect();
        let (x_t, conditioning) = self.rows.read(&rows)?;
        Ok((x_t.to_device(request.device()), conditioning.to_device(request.device())?))
    }

    /// Advances the states of a batch from which trajectories can continue by one interval, and queues them there.
    pub(super) fn advance(
        &mut self,
        feedback: &LossFeedback<'_>,
        mixed: Option<MixedVariant>,
    ) -> Result<()> {
        let states = feedback.states;
        let goes_on = |&i: &usize| {
            let walked =
                matches!(states.sources[i], Source::Student | Source::Mixed | Source::Noise);
            walked && states.grid_indices[i] + 1 < self.len
        };
        let rows: Vec<usize> = (0..states.len()).filter(goes_on).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let device = states.x_t.device();
        let mut draws = feedback.streams.draws(feedback.step, Stream::Refresh, device)?;
        let teacher_acts: Vec<bool> = rows
            .iter()
            .map(|&i| {
                let acts = |mixed: MixedVariant| {
                    mixed.teacher_acts(states.grid_indices[i], &mut draws.rng)
                };
                mixed.and_then(acts).unwrap_or(false)
            })
            .collect();
        let x_t = next_states(feedback, &rows, &teacher_acts, &mut draws)?;
        let conditioning = states.conditioning.index_select(&index(&rows, device))?;
        let most = states.len();
        let places: Vec<usize> = rows
            .iter()
            .zip(&teacher_acts)
            .map(|(&i, &acts)| {
                let teacher_acted = acts || states.sources[i] == Source::Mixed;
                let waiting = Waiting { row: 0, created_at_step: feedback.step, teacher_acted };
                self.queues.push(states.grid_indices[i] + 1, waiting, most)
            })
            .collect();
        self.write(&places, &x_t, &conditioning)
    }

    /// Writes rows; if a row occurs twice in a batch, the later state is kept.
    fn write(&mut self, places: &[usize], x_t: &Tensor, conditioning: &Conditioning) -> Result<()> {
        let last: std::collections::BTreeMap<usize, usize> =
            places.iter().enumerate().map(|(i, &row)| (row, i)).collect();
        let (rows, from): (Vec<usize>, Vec<usize>) = last.into_iter().unzip();
        let from = index(&from, x_t.device());
        let capacity = self.queues.capacity();
        self.rows.write(
            capacity,
            &rows,
            &x_t.index_select(0, &from),
            &conditioning.index_select(&from)?,
        )
    }

    pub(super) fn flush(&mut self) {
        *self = Self {
            len: self.len,
            queues: Queues { waiting: vec![VecDeque::new(); self.len - 1], ..Queues::default() },
            rows: RowStore::new(WHAT, None),
        };
    }

    pub(super) fn save(&self) -> Result<SavedState> {
        SavedState::serialized(WHAT, self.rows.tensors(), &self.queues)
    }

    pub(super) fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let refuse = |problem| Err(Error::Restore { what: WHAT, problem });
        let queues: Queues = saved.metadata(WHAT)?;
        if queues.waiting.len() + 1 != self.len {
            return refuse(format!(
                "they belong to a grid of {} timesteps, not {}",
                queues.waiting.len() + 1,
                self.len
            ));
        }
        if !queues.is_consistent() {
            let most = queues.most;
            return refuse(format!(
                "some rows are neither waiting nor free, or both, of {most} per grid index"
            ));
        }
        let capacity = queues.capacity();
        self.rows.restore(capacity, &saved.tensors)?;
        if capacity > 0 && self.rows.capacity().is_none() {
            return refuse("their tensors are missing".to_owned());
        }
        self.queues = queues;
        Ok(())
    }
}

/// The state at the next grid index of each of `rows`.
fn next_states(
    feedback: &LossFeedback<'_>,
    rows: &[usize],
    teacher_acts: &[bool],
    draws: &mut Draws,
) -> Result<Tensor> {
    let (states, grid) = (feedback.states, feedback.grids.student.as_slice());
    let device = states.x_t.device();
    let order = index(rows, device);
    let at = |ahead: usize| -> Vec<i64> {
        rows.iter().map(|&i| grid[states.grid_indices[i] + ahead]).collect()
    };
    let x_t = states.x_t.index_select(0, &order);
    let timesteps = states.timesteps.to_device(device).index_select(0, &order);
    let x0 = feedback.student_x0.detach().index_select(0, &order);
    let prediction = Prediction::from_x0(feedback.sampler.schedule(), x0, &x_t, &timesteps)?;
    let generator = Some(&mut draws.generator);
    let student = sampler_step(feedback.sampler, &prediction, &at(0), &at(1), generator)?;
    if !teacher_acts.contains(&true) {
        return Ok(student);
    }
    let Some(teacher) = feedback.teacher_next else {
        return Err(Error::Invalid(Invalid::new(
            "mixed",
            "a rollout with teacher steps",
            "none with chains, if the loss evaluates no teacher step",
        )));
    };
    let teacher = teacher.detach().index_select(0, &order);
    let mut shape = vec![1; student.dim()];
    shape[0] = -1;
    let acts = on_device(teacher_acts, device).view(shape.as_slice());
    Ok(teacher.where_self(&acts, &student))
}

impl Group {
    fn add(&mut self, request: usize, from: Waiting) {
        self.requests.push(request);
        self.from.push(from);
    }
}

impl Queues {
    /// Number of rows.
    fn capacity(&self) -> usize {
        self.most * self.waiting.len()
    }

    /// Whether each row is either queued or free, exactly once, and no queue exceeds its maximum. The row numbers are
    /// compared in order, so that a damaged capacity does not allocate more rows than are listed.
    fn is_consistent(&self) -> bool {
        let Some(capacity) = self.most.checked_mul(self.waiting.len()) else { return false };
        let waiting = self.waiting.iter().flatten().map(|waiting| waiting.row);
        let mut rows: Vec<usize> = self.free.iter().copied().chain(waiting).collect();
        rows.sort_unstable();
        rows.into_iter().eq(0..capacity)
            && self.waiting.iter().all(|queue| queue.len() <= self.most)
    }

    /// Drops states that have been queued for more than `max_age` updates.
    fn drop_old(&mut self, step: u64, max_age: u64) {
        for queue in &mut self.waiting {
            while queue
                .front()
                .is_some_and(|first| step.saturating_sub(first.created_at_step) > max_age)
            {
                self.free.extend(queue.pop_front().map(|waiting| waiting.row));
            }
        }
    }

    /// Removes and returns the newest state queued at a grid index.
    fn newest(&mut self, grid_index: usize) -> Option<Waiting> {
        self.waiting.get_mut(grid_index.checked_sub(1)?)?.pop_back()
    }

    /// Queues a state at a grid index; returns its row.
    fn push(&mut self, grid_index: usize, waiting: Waiting, batch: usize) -> usize {
        if self.most == 0 {
            self.most = batch;
            self.free = (0..self.capacity()).rev().collect();
        }
        let most = self.most;
        let queue = &mut self.waiting[grid_index - 1];
        if queue.len() == most {
            self.free.extend(queue.pop_front().map(|oldest| oldest.row));
        }
        // There are as many rows as queued states at most, so one is free.
        let row = self.free.pop().unwrap_or_default();
        queue.push_back(Waiting { row, ..waiting });
        row
    }
}
