//! A bounded store of visited states.

mod places;
mod ring;
mod segment;
mod spill;

use std::collections::HashMap;

use ddil_files::Invalid;
use ddil_schedulers::Timesteps;
use rand::Rng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use self::places::{Place, Places};
use self::ring::{Item, Ring, SavedRing};
use self::segment::Column;
pub use self::spill::SpillConfig;
use self::spill::{Pick, Spill};
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::rows::RowStore;
use crate::saved::SavedState;
use crate::states::States;

/// Number format that states are stored in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StorageKind {
    /// Half precision: half the memory, a relative error of 2⁻¹¹.
    #[default]
    F16,
    /// Single precision.
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
#[non_exhaustive]
pub struct BufferConfig {
    /// Maximum number of states, over all grid indices; default 2048.
    pub capacity: usize,
    /// Maximum bytes of memory for states and conditioning together; default 512 MiB. If states are large, fewer than
    /// `capacity` are kept, unless they may spill.
    pub byte_budget: u64,
    /// Files on disk for states beyond `byte_budget`. Default none: fewer states are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spill: Option<SpillConfig>,
    /// Maximum age of a state in student updates; default 1000. Older states come from an earlier student: early, bad
    /// rollouts kept too long can double the final error.
    pub max_age: u64,
    /// Number format that states are stored in; default f16.
    pub storage: StorageKind,
}

impl Default for BufferConfig {
    fn default() -> Self {
        Self {
            capacity: 2048,
            byte_budget: 512 << 20,
            spill: None,
            max_age: 1000,
            storage: StorageKind::default(),
        }
    }
}

impl BufferConfig {
    /// The same settings with a change: `BufferConfig::default().with(|config| config.capacity = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

/// A bounded store of visited states: DAgger's aggregate, except that old states are dropped.
///
/// There is one ring per grid index, all of the same capacity. A full ring overwrites its oldest state, and states
/// beyond the age limit are never returned. Keeping everything, as the classic algorithm does ([Ross et al.
/// 2011](https://arxiv.org/abs/1011.0686)), would tie a changing student to what it did long ago. The buffer holds no
/// labels. Index 0, pure noise, is drawn afresh and not stored.
///
/// With [`BufferConfig::spill`], states beyond the memory budget are stored on disk: some places of each ring are rows
/// in memory, the others are rows of memory-mapped files, which are written once, one after the other. The cost of
/// inserting or sampling a state does not depend on how many there are. Which states are drawn does not depend on where
/// they are stored.
///
/// # Example
///
/// ```
/// use ddil_core::{AggregationBuffer, BufferConfig, Source, SpillConfig, States};
/// use ddil_schedulers::{TimestepSpacing, Timesteps};
/// use rand::{SeedableRng, rngs::StdRng};
/// use tch::{Tensor, kind};
///
/// # let folder = std::env::temp_dir().join(format!("ddil-spill-{}", std::process::id()));
/// let config = BufferConfig::default().with(|config| {
///     config.capacity = 300;
///     config.byte_budget = 1200;
///     config.spill = Some(SpillConfig::new(folder, 1 << 20));
/// });
/// let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// let mut buffer = AggregationBuffer::new(config, &grid)?;
/// for step in 0..80 {
///     let x_t = Tensor::full([3, 5], step as i64, kind::FLOAT_CPU);
///     buffer.insert(&States::new(x_t, &grid, vec![1, 2, 3], Source::Student)?.made_at(step))?;
/// }
/// let statistics = buffer.statistics(80);
/// assert_eq!((statistics.len, statistics.bytes), (240, 1200));
/// assert!(statistics.spilled_bytes > 0);
/// let states = buffer.sample(&[1, 2, 3, 3], 80, &mut StdRng::seed_from_u64(0))?;
/// assert_eq!(states.x_t.size(), [4, 5]);
/// # drop(buffer);
/// # std::fs::remove_dir(std::env::temp_dir().join(format!("ddil-spill-{}", std::process::id())))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AggregationBuffer {
    config: BufferConfig,
    timesteps: Vec<i64>,
    /// One per grid index, from 1.
    rings: Vec<Ring>,
    /// Set once the size of a state is known.
    places: Option<Places>,
    rows: RowStore,
    /// Present if some places are on disk.
    spill: Option<Spill>,
}

/// Metadata of a saved [`AggregationBuffer`], in addition to its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    timesteps: Vec<i64>,
    ring_len: Option<usize>,
    rings: Vec<SavedRing>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spill: Option<SavedSpill>,
}

/// How the places of a ring are split between memory and disk, if not all are in memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedSpill {
    kept: usize,
    segment_rows: usize,
}

/// Size, contents and ages of an [`AggregationBuffer`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BufferStatistics {
    /// Number of states kept.
    pub len: usize,
    /// Number of states that fit; 0 before the first insertion, when the size of a state is not known.
    pub capacity: usize,
    /// Bytes of memory used.
    pub bytes: u64,
    /// Bytes of disk used.
    pub spilled_bytes: u64,
    /// Number of states at each grid index; 0 for the first, which is noise.
    pub per_index: Vec<usize>,
    /// Mean age in updates; 0 if there are none.
    pub mean_age: f64,
    /// Largest age in updates; 0 if there are none.
    pub oldest_age: u64,
}

const WHAT: &str = "buffer";

impl AggregationBuffer {
    /// An empty buffer for states on a grid.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless there is room for a state at each grid index except the first, and a folder if states
    /// may spill.
    pub fn new(config: BufferConfig, timesteps: &Timesteps) -> Result<Self> {
        let num_rings = timesteps.len() - 1;
        if config.capacity < num_rings.max(1) {
            return Err(Error::Invalid(Invalid::new(
                "buffer.capacity",
                config.capacity,
                format!("at least {}, one state per grid index", num_rings.max(1)),
            )));
        }
        config.spill.as_ref().map_or(Ok(()), SpillConfig::ensure)?;
        Ok(Self {
            rows: RowStore::new(WHAT, Some(config.storage.kind())),
            config,
            timesteps: timesteps.as_slice().to_vec(),
            rings: vec![Ring::default(); num_rings],
            places: None,
            spill: None,
        })
    }

    /// The settings.
    pub fn config(&self) -> &BufferConfig {
        &self.config
    }

    /// Checks that a batch fits, so that the states of one batch are not overwritten before the next is drawn.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if all rings together hold fewer than `batch` states.
    pub fn ensure_batch_size(&self, batch: usize) -> Result<()> {
        let rings = self.rings.len();
        let per_ring = self.config.capacity / rings.max(1);
        // Without rings all states are noise, which is not stored.
        if rings == 0 || per_ring * rings >= batch {
            return Ok(());
        }
        Err(Error::Invalid(Invalid::new(
            "buffer.capacity",
            format!(
                "{}, which is {per_ring} states at each of {rings} grid indices",
                self.config.capacity
            ),
            format!("room for at least {batch} states per grid index, one batch"),
        )))
    }

    /// Number of states kept, of any age.
    pub fn len(&self) -> usize {
        self.rings.iter().map(|ring| ring.items.len()).sum()
    }

    /// Whether the buffer is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of states at a grid index within the age limit at `step`.
    pub fn available(&mut self, grid_index: usize, step: u64) -> usize {
        let max_age = self.config.max_age;
        let ring = grid_index.checked_sub(1).and_then(|ring| self.rings.get_mut(ring));
        ring.map_or(0, |ring| ring.drop_old(step, max_age))
    }

    /// Inserts states; full rings overwrite their oldest.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for grid index 0 or one beyond the grid, or if a byte budget cannot hold one state per ring;
    /// [`Error::OutOfOrder`] if a state is older than one stored at its index;
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) or [`Error::Conditioning`] if the states differ in
    /// form from those stored; [`Error::Spill`] if the disk is full. After a failed write to disk, the oldest states
    /// that were to be replaced may be missing; the others are unchanged.
    pub fn insert(&mut self, states: &States) -> Result<()> {
        if states.is_empty() {
            return Ok(());
        }
        self.ensure_insertable(states)?;
        let places = self.fit(states)?;
        let mut of_rings = vec![Vec::new(); self.rings.len()];
        for (row, &grid_index) in states.grid_indices.iter().enumerate() {
            of_rings[grid_index - 1].push(row);
        }
        for (ring, rows) in self.rings.iter_mut().zip(&of_rings) {
            ring.make_room(rows.len(), places.ring_len);
        }
        self.keep(states, &of_rings, places)?;
        for (ring, rows) in of_rings.iter().enumerate() {
            self.append(ring, rows, states, places)?;
            for &row in rows {
                let item = Item {
                    created_at_step: states.created_at_step[row],
                    source: states.sources[row],
                };
                self.rings[ring].push(item, places.ring_len);
            }
        }
        Ok(())
    }

    /// Writes the states of a batch whose places are in memory.
    fn keep(&mut self, states: &States, of_rings: &[Vec<usize>], places: Places) -> Result<()> {
        // The last state wins if a batch wraps around a ring more than once: each row may be named only once.
        let mut at = HashMap::with_capacity(states.len());
        for (ring, rows) in of_rings.iter().enumerate() {
            for (&row, sequence) in rows.iter().zip(self.rings[ring].next..) {
                if let Place::Kept(place) = places.place(ring, sequence) {
                    at.insert(place, row);
                }
            }
        }
        let mut written: Vec<(usize, usize)> = at.into_iter().collect();
        written.sort_unstable();
        let (rows, from): (Vec<usize>, Vec<usize>) = written.into_iter().unzip();
        let from = crate::rows::index(&from, states.x_t.device());
        let x_t = states.x_t.index_select(0, &from);
        let conditioning = states.conditioning.index_select(&from)?;
        self.rows.write(places.kept * self.rings.len(), &rows, &x_t, &conditioning)
    }

    /// Writes the states of a ring whose places are on disk.
    fn append(
        &mut self,
        ring: usize,
        rows: &[usize],
        states: &States,
        places: Places,
    ) -> Result<()> {
        let Ring { next, items } = &self.rings[ring];
        let is_spilled =
            |(_, sequence): &(_, u64)| matches!(places.place(ring, *sequence), Place::Spilled(_));
        let spilled = rows.iter().copied().zip(*next..).filter(is_spilled);
        let spilled: Vec<usize> = spilled.map(|(row, _)| row).collect();
        if spilled.is_empty() {
            return Ok(());
        }
        let first = places.spilled_before(*next);
        let len = (items.len() + rows.len()).min(places.ring_len) as u64;
        let live = places.spilled_before(next + rows.len() as u64 - len);
        let spill = self.spill(places)?;
        spill.append(ring, first, live, (&states.x_t, &states.conditioning), &spilled)
    }

    /// The files for spilled states, created on first use.
    fn spill(&mut self, places: Places) -> Result<&mut Spill> {
        match (&mut self.spill, &self.config.spill) {
            (Some(spill), _) => Ok(spill),
            (none, Some(config)) => {
                let column = |(name, kind, shape)| Column { name, kind, shape };
                let columns = self.rows.columns().into_iter().map(column).collect();
                let rings = self.rings.len();
                Ok(none.insert(Spill::new(config, columns, places.segment_rows, rings)?))
            }
            (None, None) => Err(Error::Invalid(Invalid::new(
                "buffer.spill",
                "not set",
                "a folder for states that are on disk",
            ))),
        }
    }

    /// Draws a state for each grid index, uniformly with replacement, from those within the age limit at `step`.
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
        let mut chosen = Vec::with_capacity(grid_indices.len());
        let mut items = Vec::with_capacity(grid_indices.len());
        for &grid_index in grid_indices {
            let available = self.available(grid_index, step);
            let Some(places) = self.places.filter(|_| available > 0) else {
                return Err(Error::NoState {
                    source_name: WHAT,
                    reason: format!(
                        "all states at grid index {grid_index} are older than `max_age`"
                    ),
                });
            };
            let ring = &self.rings[grid_index - 1];
            let position = rng.random_range(0..available);
            chosen.push((grid_index - 1, places.place(grid_index - 1, ring.sequence(position))));
            items.push(ring.items[position]);
        }
        let (x_t, conditioning) = self.read(&chosen)?;
        let timesteps: Vec<i64> = grid_indices.iter().map(|&i| self.timesteps[i]).collect();
        Ok(States {
            timesteps: Tensor::from_slice(&timesteps).to_device(x_t.device()),
            x_t,
            grid_indices: grid_indices.to_vec(),
            conditioning,
            sources: items.iter().map(|item| item.source).collect(),
            created_at_step: items.iter().map(|item| item.created_at_step).collect(),
        })
    }

    /// The newest `states` states at a grid index, oldest first.
    pub(crate) fn newest(&self, grid_index: usize, states: usize) -> Result<Tensor> {
        let ring = grid_index.checked_sub(1).and_then(|ring| self.rings.get(ring));
        let enough = ring.filter(|ring| ring.items.len() >= states).zip(self.places);
        let Some((ring, places)) = enough else {
            let reason =
                format!("it contains fewer than {states} states at grid index {grid_index}");
            return Err(Error::NoState { source_name: WHAT, reason });
        };
        let newest = ring.items.len() - states..ring.items.len();
        let place = |position| places.place(grid_index - 1, ring.sequence(position));
        let chosen: Vec<_> = newest.map(|position| (grid_index - 1, place(position))).collect();
        Ok(self.read(&chosen)?.0)
    }

    /// Copies of the states at these rings and places.
    fn read(&self, chosen: &[(usize, Place)]) -> Result<(Tensor, Conditioning)> {
        let (mut rows, mut places, mut picks) = (Vec::new(), Vec::new(), Vec::new());
        for (to, &(ring, place)) in chosen.iter().enumerate() {
            match place {
                Place::Kept(row) => {
                    rows.push(row);
                    places.push(to);
                }
                Place::Spilled(row) => picks.push(Pick { to, ring, row }),
            }
        }
        let Some((spill, device)) = self.spill.as_ref().zip(self.rows.device()) else {
            return self.rows.read(&rows);
        };
        if picks.is_empty() {
            return self.rows.read(&rows);
        }
        let (x_t, conditioning) = spill.read(chosen.len(), &picks)?;
        let x_t = x_t.f_to_device(device).map_err(Error::torch("AggregationBuffer::sample"))?;
        let conditioning = conditioning.to_device(device)?;
        if !rows.is_empty() {
            self.rows.read_into((&x_t, &conditioning), &places, &rows)?;
        }
        Ok((x_t, conditioning))
    }

    /// States per ring, once the size of a state is known.
    pub(crate) fn ring_len(&self) -> Option<usize> {
        self.places.map(|places| places.ring_len)
    }

    /// Removes all states: at a new stage, or when guidance or thresholding changes.
    pub fn flush(&mut self) {
        self.rings.fill(Ring::default());
        self.places = None;
        self.rows.clear();
        self.spill = None;
    }

    /// Size, contents and ages at `step`.
    pub fn statistics(&self, step: u64) -> BufferStatistics {
        let ages: Vec<u64> = self
            .rings
            .iter()
            .flat_map(|ring| {
                ring.items.iter().map(|item| step.saturating_sub(item.created_at_step))
            })
            .collect();
        let total: u128 = ages.iter().copied().map(u128::from).sum();
        let per_index = self.rings.iter().map(|ring| ring.items.len());
        BufferStatistics {
            len: ages.len(),
            capacity: self.ring_len().unwrap_or(0) * self.rings.len(),
            bytes: self.rows.bytes(),
            spilled_bytes: self.spill.as_ref().map_or(0, Spill::bytes),
            per_index: std::iter::once(0).chain(per_index).collect(),
            mean_age: if ages.is_empty() { 0.0 } else { total as f64 / ages.len() as f64 },
            oldest_age: ages.into_iter().max().unwrap_or(0),
        }
    }

    /// Copies everything in memory, bit for bit, and lists the files on disk, see [`SavedState::files`]. These must be
    /// linked or copied before the next insertion, and flushed to disk.
    ///
    /// # Errors
    ///
    /// None known; writing metadata may fail in principle.
    pub fn save(&self) -> Result<SavedState> {
        let spilled = self.places.filter(|places| places.spilled() > 0);
        let metadata = Metadata {
            timesteps: self.timesteps.clone(),
            ring_len: self.ring_len(),
            rings: self.rings.iter().map(Ring::save).collect(),
            spill: spilled
                .map(|Places { kept, segment_rows, .. }| SavedSpill { kept, segment_rows }),
        };
        let saved = SavedState::serialized(WHAT, self.rows.tensors(), &metadata)?;
        let Some((places, spill)) = spilled.zip(self.spill.as_ref()) else { return Ok(saved) };
        let files =
            self.rings.iter().enumerate().flat_map(|(number, ring)| {
                spill.saved(number, places.spilled_before(ring.oldest()))
            });
        Ok(saved.with_files(files.collect()))
    }

    /// Restores a saved buffer.
    ///
    /// Reads and checks every byte of its files. A full file is linked into the folder of this buffer, or copied if
    /// that is on another file system; a file with room is copied.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] if the saved buffer had another grid or size; [`Error::SavedFile`] for a file that is damaged
    /// or not the one that was saved.
    pub fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let metadata: Metadata = saved.metadata(WHAT)?;
        let places = self.places_of(&metadata)?;
        let ring_len = places.map_or(0, |places| places.ring_len);
        let rings: Option<Vec<Ring>> =
            metadata.rings.iter().map(|ring| Ring::restore(ring, ring_len)).collect();
        let rings = rings.ok_or_else(|| Error::Restore {
            what: WHAT,
            problem: format!(
                "a ring has more than {ring_len} states, or more than were ever inserted"
            ),
        })?;
        self.flush();
        let kept = places.map_or(0, |places| places.kept);
        self.rows.restore(kept * rings.len(), &saved.tensors)?;
        if self.rows.capacity().is_none() && places.is_some() {
            return Err(Error::Restore {
                what: WHAT,
                problem: "its tensors are missing".to_owned(),
            });
        }
        if let Some(places) = places.filter(|places| places.spilled() > 0) {
            self.restore_spill(&rings, places, saved)?;
        }
        self.places = places;
        self.rings = rings;
        Ok(())
    }

    /// The split of places in the saved state, if it fits this buffer.
    fn places_of(&self, metadata: &Metadata) -> Result<Option<Places>> {
        let refuse = |problem: String| Err(Error::Restore { what: WHAT, problem });
        if metadata.timesteps != self.timesteps {
            let (found, here) = (&metadata.timesteps, &self.timesteps);
            return refuse(format!("its grid is {found:?}, not {here:?}"));
        }
        if metadata.rings.len() != self.rings.len() {
            return refuse(format!("it has {} rings", metadata.rings.len()));
        }
        let Some(ring_len) = metadata.ring_len else { return Ok(None) };
        if ring_len == 0 || ring_len > self.config.capacity / self.rings.len().max(1) {
            let capacity = self.config.capacity;
            return refuse(format!(
                "it has rings of {ring_len} states, more than a capacity of {capacity} allows"
            ));
        }
        let Some(SavedSpill { kept, segment_rows }) = metadata.spill else {
            return Ok(Some(Places::in_memory(ring_len)));
        };
        if self.config.spill.is_none() {
            return refuse(
                "some of its states are on disk, but `buffer.spill` is not set".to_owned(),
            );
        }
        if kept >= ring_len || !(1..=ring_len).contains(&segment_rows) {
            return refuse(format!(
                "{kept} of {ring_len} states per ring are in memory and {segment_rows} in each file"
            ));
        }
        Ok(Some(Places { ring_len, kept, segment_rows }))
    }

    fn restore_spill(&mut self, rings: &[Ring], places: Places, saved: &SavedState) -> Result<()> {
        let budget = self.config.spill.as_ref().map_or(0, |spill| spill.byte_budget);
        let spill = self.spill(places)?;
        let needed = places.bytes_on_disk(spill.row_bytes());
        let needed = needed.and_then(|bytes| bytes.checked_mul(rings.len() as u64));
        if needed.is_none_or(|needed| needed > budget) {
            let problem =
                format!("it requires more than `buffer.spill.byte_budget` = {budget} bytes");
            return Err(Error::Restore { what: WHAT, problem });
        }
        for (number, ring) in rings.iter().enumerate() {
            let live = places.spilled_before(ring.oldest())..places.spilled_before(ring.next);
            spill.restore(number, live, &saved.files)?;
        }
        Ok(())
    }

    /// Checks everything before anything is changed.
    fn ensure_insertable(&self, states: &States) -> Result<()> {
        states.ensure("AggregationBuffer::insert")?;
        let mut latest: Vec<u64> = self
            .rings
            .iter()
            .map(|ring| ring.items.back().map_or(0, |item| item.created_at_step))
            .collect();
        for (&grid_index, &created_at_step) in
            states.grid_indices.iter().zip(&states.created_at_step)
        {
            let ring = grid_index.checked_sub(1);
            let Some(latest) = ring.and_then(|ring| latest.get_mut(ring)) else {
                return Err(Error::Invalid(Invalid::new(
                    "grid_indices",
                    grid_index,
                    format!("in 1..={}; index 0 is noise", self.rings.len()),
                )));
            };
            if created_at_step < *latest {
                let latest = *latest;
                return Err(Error::OutOfOrder {
                    op: "AggregationBuffer::insert",
                    created_at_step,
                    latest,
                });
            }
            *latest = created_at_step;
        }
        self.rows.ensure_like(&states.x_t, &states.conditioning)
    }

    /// The number and location of places, from capacity and byte budgets.
    fn fit(&mut self, states: &States) -> Result<Places> {
        if let Some(places) = self.places {
            return Ok(places);
        }
        let rings = self.rings.len();
        let bytes = self.rows.row_bytes(&states.x_t, &states.conditioning).max(1);
        let affordable = usize::try_from(self.config.byte_budget / bytes).unwrap_or(usize::MAX);
        let wanted = self.config.capacity / rings;
        let places = Places::in_memory(wanted.min(affordable / rings));
        let places = match &self.config.spill {
            Some(spill) if places.kept < wanted => {
                let more = wanted - places.kept;
                let budget = spill.byte_budget / rings as u64;
                places.and_on_disk(more, budget, bytes).ok_or_else(|| {
                    // The minimum is two files, with a head and a state each.
                    let least = rings as u64 * 2 * (segment::HEAD_BYTES as u64 + bytes);
                    too_little("buffer.spill.byte_budget", spill.byte_budget, least, rings, bytes)
                })?
            }
            _ => places,
        };
        if places.ring_len == 0 {
            let least = bytes * rings as u64;
            let budget = self.config.byte_budget;
            return Err(too_little("buffer.byte_budget", budget, least, rings, bytes));
        }
        Ok(*self.places.insert(places))
    }
}

fn too_little(field: &'static str, budget: u64, least: u64, rings: usize, bytes: u64) -> Error {
    Error::Invalid(Invalid::new(
        field,
        budget,
        format!("at least {least}: {rings} grid indices, and {bytes} bytes per state"),
    ))
}
