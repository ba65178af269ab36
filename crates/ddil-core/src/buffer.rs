//! Visited states, kept for a while.

use std::collections::{HashMap, VecDeque};

use ddil_schedulers::Timesteps;
use rand::Rng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::rows::RowStore;
use crate::saved::SavedState;
use crate::states::{Source, States};

/// What states are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StorageKind {
    /// Half precision: half the memory, an error of 2⁻¹¹ of the value.
    #[default]
    F16,
    /// Single precision: as they came.
    F32,
}

impl StorageKind {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::F16 => Kind::Half,
            Self::F32 => Kind::Float,
        }
    }
}

/// Settings of an [`AggregationBuffer`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BufferConfig {
    /// Most states kept, over all grid indices; default 2048.
    pub capacity: usize,
    /// Most bytes kept, states and conditioning together; fewer states than `capacity` where they are large.
    /// Default 512 MiB.
    pub byte_budget: u64,
    /// Most updates of the student that a state may be old; default 1000. Older ones show what a student did that
    /// is no more: early, bad rollouts kept too long can double the final error.
    pub max_age: u64,
    /// What states are stored as; default f16.
    pub storage: StorageKind,
}

impl Default for BufferConfig {
    fn default() -> Self {
        Self {
            capacity: 2048,
            byte_budget: 512 << 20,
            max_age: 1000,
            storage: StorageKind::default(),
        }
    }
}

/// A bounded store of visited states: DAgger's aggregate, except that it forgets.
///
/// One ring per grid index, each with the same share of the room; a full ring overwrites its oldest state, and states
/// beyond the age limit are never given out. Keeping everything for ever, as the classic algorithm does
/// ([Ross et al. 2011](https://arxiv.org/abs/1011.0686)), would tie a moving student to what it did long ago.
/// Holds no labels. Index 0, pure noise, is drawn afresh and not stored.
#[derive(Debug)]
pub struct AggregationBuffer {
    config: BufferConfig,
    timesteps: Vec<i64>,
    /// One a grid index from 1.
    rings: Vec<Ring>,
    /// States per ring, known once the size of a state is.
    ring_len: Option<usize>,
    rows: RowStore,
}

/// The items of one grid index, oldest first; the item of sequence number `n` is in place `n % ring_len`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ring {
    /// Sequence number of the next item.
    next: u64,
    items: VecDeque<Item>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Item {
    birth: u64,
    source: Source,
}

/// What an [`AggregationBuffer`] is saved as, beside its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    timesteps: Vec<i64>,
    ring_len: Option<usize>,
    rings: Vec<Ring>,
}

/// How full an [`AggregationBuffer`] is, and of what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BufferStatistics {
    /// States kept.
    pub len: usize,
    /// States that there is room for; 0 before the first insertion, when the size of a state is not known.
    pub capacity: usize,
    /// Bytes of memory taken.
    pub bytes: u64,
    /// States kept at each grid index; 0 for the first, which is noise.
    pub per_index: Vec<usize>,
    /// Mean age in updates; 0 if there are none.
    pub mean_age: f64,
    /// Largest age in updates; 0 if there are none.
    pub oldest_age: u64,
}

const WHAT: &str = "buffer";

/// No run inserts so many states: half of what can be counted.
const MAX_SEQUENCE: u64 = u64::MAX / 2;

impl AggregationBuffer {
    /// An empty buffer for states on a grid.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] unless there is room for a state at each grid index but the first.
    pub fn new(config: BufferConfig, timesteps: &Timesteps) -> Result<Self> {
        let num_rings = timesteps.len() - 1;
        if config.capacity < num_rings.max(1) {
            return Err(Error::InvalidConfig {
                field: "buffer.capacity",
                value: config.capacity.to_string(),
                expected: format!("at least {}, a state a grid index", num_rings.max(1)),
            });
        }
        Ok(Self {
            rows: RowStore::new(WHAT, Some(config.storage.kind())),
            config,
            timesteps: timesteps.as_slice().to_vec(),
            rings: vec![Ring::default(); num_rings],
            ring_len: None,
        })
    }

    /// The settings.
    pub fn config(&self) -> &BufferConfig {
        &self.config
    }

    /// Checks that there is room for a batch, so that what one draws is not overwritten before the next.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] if all rings together hold fewer states.
    pub fn ensure_batch_size(&self, batch: usize) -> Result<()> {
        let rings = self.rings.len();
        let per_ring = self.config.capacity / rings.max(1);
        // Without rings all states are noise, which is not kept.
        if rings == 0 || per_ring * rings >= batch {
            return Ok(());
        }
        Err(Error::InvalidConfig {
            field: "buffer.capacity",
            value: format!(
                "{}, which is {per_ring} states at each of {rings} grid indices",
                self.config.capacity
            ),
            expected: format!("room for at least {batch} states, a batch"),
        })
    }

    /// States kept, whatever their age.
    pub fn len(&self) -> usize {
        self.rings.iter().map(|ring| ring.items.len()).sum()
    }

    /// Whether none are kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// States at a grid index that are young enough at `step`.
    pub fn available(&mut self, grid_index: usize, step: u64) -> usize {
        let max_age = self.config.max_age;
        let ring = grid_index.checked_sub(1).and_then(|ring| self.rings.get_mut(ring));
        ring.map_or(0, |ring| ring.forget(step, max_age))
    }

    /// Keeps states; the oldest of their rings make room.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] for grid index 0 or one beyond the grid, or if the byte budget cannot hold a state a
    /// ring; [`Error::OutOfOrder`] if a state is older than one that is kept at its index; [`Error::Shape`] or
    /// [`Error::Conditioning`] if states are not like those before.
    pub fn insert(&mut self, states: &States) -> Result<()> {
        if states.is_empty() {
            return Ok(());
        }
        self.ensure_insertable(states)?;
        let ring_len = self.fit(states)?;
        // The last state wins where a batch goes round a ring more than once: rows must be named once.
        let mut at = HashMap::with_capacity(states.len());
        for (i, &grid_index) in states.grid_indices.iter().enumerate() {
            let item = Item { birth: states.births[i], source: states.sources[i] };
            let place = self.rings[grid_index - 1].push(item, ring_len);
            at.insert((grid_index - 1) * ring_len + place, i);
        }
        let mut written: Vec<(usize, usize)> = at.into_iter().collect();
        written.sort_unstable();
        let (rows, from): (Vec<usize>, Vec<usize>) = written.into_iter().unzip();
        let from = crate::rollout::index(&from, states.x_t.device());
        let x_t = states.x_t.index_select(0, &from);
        let conditioning = states.conditioning.index_select(&from)?;
        self.rows.write(ring_len * self.rings.len(), &rows, &x_t, &conditioning)
    }

    /// Draws a state for each grid index asked for, evenly and with replacement, of those young enough at `step`.
    ///
    /// # Errors
    ///
    /// [`Error::NoState`] if there is none at an index.
    pub fn sample(
        &mut self,
        grid_indices: &[usize],
        step: u64,
        rng: &mut impl Rng,
    ) -> Result<States> {
        let mut rows = Vec::with_capacity(grid_indices.len());
        let mut items = Vec::with_capacity(grid_indices.len());
        for &grid_index in grid_indices {
            let available = self.available(grid_index, step);
            let Some(ring_len) = self.ring_len.filter(|_| available > 0) else {
                return Err(Error::NoState {
                    source_name: WHAT,
                    reason: format!("none at grid index {grid_index} is young enough"),
                });
            };
            let ring = &self.rings[grid_index - 1];
            let chosen = rng.random_range(0..available);
            rows.push((grid_index - 1) * ring_len + ring.place(chosen, ring_len));
            items.push(ring.items[chosen]);
        }
        let (x_t, conditioning) = self.rows.read(&rows)?;
        let timesteps: Vec<i64> = grid_indices.iter().map(|&i| self.timesteps[i]).collect();
        Ok(States {
            timesteps: Tensor::from_slice(&timesteps).to_device(x_t.device()),
            x_t,
            grid_indices: grid_indices.to_vec(),
            conditioning,
            sources: items.iter().map(|item| item.source).collect(),
            births: items.iter().map(|item| item.birth).collect(),
        })
    }

    /// The newest states at a grid index, oldest first, as many as were asked for.
    pub(crate) fn newest(&self, grid_index: usize, states: usize) -> Result<Tensor> {
        let ring = grid_index.checked_sub(1).and_then(|ring| self.rings.get(ring));
        let enough = ring.filter(|ring| ring.items.len() >= states).zip(self.ring_len);
        let Some((ring, ring_len)) = enough else {
            let reason = format!("there are fewer than {states} at grid index {grid_index}");
            return Err(Error::NoState { source_name: WHAT, reason });
        };
        let first_row = (grid_index - 1) * ring_len;
        let newest = ring.items.len() - states..ring.items.len();
        let rows: Vec<usize> =
            newest.map(|position| first_row + ring.place(position, ring_len)).collect();
        Ok(self.rows.read(&rows)?.0)
    }

    /// States per ring, once the size of a state is known.
    pub(crate) fn ring_len(&self) -> Option<usize> {
        self.ring_len
    }

    /// Forgets everything: at a new stage, or when guidance or thresholding changes.
    pub fn flush(&mut self) {
        self.rings.fill(Ring::default());
        self.ring_len = None;
        self.rows.clear();
    }

    /// How full it is at `step`.
    pub fn statistics(&self, step: u64) -> BufferStatistics {
        let ages: Vec<u64> = self
            .rings
            .iter()
            .flat_map(|ring| ring.items.iter().map(|item| step.saturating_sub(item.birth)))
            .collect();
        let total: u128 = ages.iter().copied().map(u128::from).sum();
        let per_index = self.rings.iter().map(|ring| ring.items.len());
        BufferStatistics {
            len: ages.len(),
            capacity: self.rows.capacity().unwrap_or(0),
            bytes: self.rows.bytes(),
            per_index: std::iter::once(0).chain(per_index).collect(),
            mean_age: if ages.is_empty() { 0.0 } else { total as f64 / ages.len() as f64 },
            oldest_age: ages.into_iter().max().unwrap_or(0),
        }
    }

    /// Copies everything, bit for bit.
    ///
    /// # Errors
    ///
    /// None that is known; writing metadata may fail in principle.
    pub fn save(&self) -> Result<SavedState> {
        let metadata = Metadata {
            timesteps: self.timesteps.clone(),
            ring_len: self.ring_len,
            rings: self.rings.clone(),
        };
        SavedState::new(WHAT, self.rows.tensors(), &metadata)
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] if that was a buffer of another grid or another size.
    pub fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let metadata: Metadata = saved.metadata(WHAT)?;
        let refuse = |problem: String| Err(Error::Restore { what: WHAT, problem });
        if metadata.timesteps != self.timesteps {
            let (found, here) = (&metadata.timesteps, &self.timesteps);
            return refuse(format!("it is of the grid {found:?}, not of {here:?}"));
        }
        if metadata.rings.len() != self.rings.len() {
            return refuse(format!("it has {} rings", metadata.rings.len()));
        }
        let ring_len = metadata.ring_len.unwrap_or(0);
        if ring_len.saturating_mul(self.rings.len()) > self.config.capacity {
            let capacity = self.config.capacity;
            return refuse(format!("it has rings of {ring_len}, beyond a capacity of {capacity}"));
        }
        if metadata.rings.iter().any(|ring| !ring.fits(ring_len)) {
            return refuse(format!(
                "a ring holds more than {ring_len} states, or more than it ever got"
            ));
        }
        self.rows.restore(ring_len * self.rings.len(), &saved.tensors)?;
        if self.rows.capacity().is_none() && metadata.ring_len.is_some() {
            return refuse("its tensors are missing".to_owned());
        }
        self.ring_len = metadata.ring_len;
        self.rings = metadata.rings;
        Ok(())
    }

    /// Checks everything before anything is changed.
    fn ensure_insertable(&self, states: &States) -> Result<()> {
        states.ensure("AggregationBuffer::insert")?;
        let mut latest: Vec<u64> =
            self.rings.iter().map(|ring| ring.items.back().map_or(0, |item| item.birth)).collect();
        for (&grid_index, &birth) in states.grid_indices.iter().zip(&states.births) {
            let ring = grid_index.checked_sub(1);
            let Some(latest) = ring.and_then(|ring| latest.get_mut(ring)) else {
                return Err(Error::InvalidConfig {
                    field: "grid_indices",
                    value: grid_index.to_string(),
                    expected: format!("in 1..={}; index 0 is noise", self.rings.len()),
                });
            };
            if birth < *latest {
                let latest = *latest;
                return Err(Error::OutOfOrder { op: "AggregationBuffer::insert", birth, latest });
            }
            *latest = birth;
        }
        self.rows.ensure_like(&states.x_t, &states.conditioning)
    }

    /// States per ring, from capacity and byte budget.
    fn fit(&mut self, states: &States) -> Result<usize> {
        if let Some(ring_len) = self.ring_len {
            return Ok(ring_len);
        }
        let bytes = self.rows.row_bytes(&states.x_t, &states.conditioning).max(1);
        let affordable = usize::try_from(self.config.byte_budget / bytes).unwrap_or(usize::MAX);
        let ring_len = self.config.capacity.min(affordable) / self.rings.len();
        if ring_len == 0 {
            return Err(Error::InvalidConfig {
                field: "buffer.byte_budget",
                value: self.config.byte_budget.to_string(),
                expected: format!(
                    "at least {}: {} grid indices times {bytes} bytes a state",
                    bytes * self.rings.len() as u64,
                    self.rings.len()
                ),
            });
        }
        Ok(*self.ring_len.insert(ring_len))
    }
}

impl Ring {
    /// Drops what is too old; says how many are left.
    fn forget(&mut self, step: u64, max_age: u64) -> usize {
        // Births never fall from front to back, so each item is looked at once in its life.
        while self.items.front().is_some_and(|item| step.saturating_sub(item.birth) > max_age) {
            self.items.pop_front();
        }
        self.items.len()
    }

    /// Adds an item; says in which place.
    fn push(&mut self, item: Item, ring_len: usize) -> usize {
        if self.items.len() == ring_len {
            self.items.pop_front();
        }
        self.items.push_back(item);
        self.next += 1;
        self.place(self.items.len() - 1, ring_len)
    }

    /// The place of the item at `position` from the oldest.
    fn place(&self, position: usize, ring_len: usize) -> usize {
        let sequence = self.next - (self.items.len() - position) as u64;
        (sequence % ring_len as u64) as usize
    }

    /// Whether a saved ring can be one of `ring_len` places.
    fn fits(&self, ring_len: usize) -> bool {
        let len = self.items.len() as u64;
        self.items.len() <= ring_len && (len..MAX_SEQUENCE).contains(&self.next)
    }
}
