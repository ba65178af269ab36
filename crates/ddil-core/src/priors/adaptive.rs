//! Priors that follow measurements of the student.

use ddil_files::Invalid;
use ddil_schedulers::Timesteps;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::Priors;
use crate::buffer::{AggregationBuffer, BufferConfig};
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::loss_meter::{LossMeter, LossTable};
use crate::random::{RandomStreams, Stream};
use crate::saved::SavedState;
use crate::shift::{directions, sliced_w2};
use crate::states::{Source, States};

/// The signal that adaptive priors follow; between 0 and 1 at each grid index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdaptiveSignal {
    /// `1 - D_null / D`, where `D` is the sliced squared 2-Wasserstein distance from noised dataset samples to the
    /// student's states, and `D_null` that between two sets of noised dataset samples: 0 if the shift is no larger than
    /// chance, towards 1 if it is much larger.
    ///
    /// Measured on states that the batches contain anyway, so it needs no network calls.
    #[default]
    Shift,
    /// `L_student / (L_student + L_forward)`, the losses on the student's states and on noised dataset samples: one
    /// half if the student is equally good on both, towards 1 if it fails on its own states.
    ///
    /// Requires [`Feedback::losses`](crate::Feedback::losses).
    LossRatio,
}

/// Separate priors for each grid index, from measurements there: the share of the student's states is
/// `min + (max - min) signal`, and the rest is divided between dataset samples and teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct AdaptivePriors {
    /// The signal; default the shift.
    pub signal: AdaptiveSignal,
    /// The student's share if the signal is 0, and before the first measurement; default 0.1. Must be above 0, or there
    /// would be nothing to measure.
    pub min: f64,
    /// The student's share if the signal is 1; default 0.8. Must be below 1, as the student's states are compared with
    /// dataset samples.
    pub max: f64,
    /// The teacher's share of the states that are not the student's, the others are dataset samples; default 0.25,
    /// below 1.
    pub teacher_fraction: f64,
    /// Updates between measurements; default 200.
    pub interval: u64,
    /// Progress up to which only dataset samples are used; default 0.05.
    pub warm_up: f64,
    /// For the shift: maximum number of student states kept at each grid index, the newest, and twice as many noised
    /// dataset samples; default 128. At least 16 are needed for a measurement.
    pub states: usize,
    /// For the shift: maximum bytes of those states; default 256 MiB.
    pub byte_budget: u64,
    /// For the loss ratio: weight of the mean of earlier intervals against that of the newest, in 0..1; default 0.5.
    pub decay: f64,
}

impl Default for AdaptivePriors {
    fn default() -> Self {
        Self {
            signal: AdaptiveSignal::default(),
            min: 0.1,
            max: 0.8,
            teacher_fraction: 0.25,
            interval: 200,
            warm_up: 0.05,
            states: 128,
            byte_budget: 256 << 20,
            decay: 0.5,
        }
    }
}

/// Minimum number of states for an estimate of their distribution.
const FEWEST_STATES: usize = 16;

/// Number of directions of the sliced distance.
const PROJECTIONS: i64 = 64;

impl AdaptivePriors {
    /// The same settings with a change: `AdaptivePriors::default().with(|config| config.interval = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Checks the settings; call it once, before training.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] that names the setting.
    pub fn ensure(&self) -> Result<()> {
        let Self { min, max, teacher_fraction, interval, warm_up, states, decay, .. } = *self;
        // Written so that NaN is rejected.
        let in_order = 0.0 < min && min <= max && max < 1.0;
        let problems = [
            (
                in_order,
                "priors.min, priors.max",
                format!("{min}, {max}"),
                "in order, above 0 and below 1",
            ),
            (
                (0.0..1.0).contains(&teacher_fraction),
                "priors.teacher_fraction",
                teacher_fraction.to_string(),
                "at least 0 and below 1",
            ),
            (interval > 0, "priors.interval", interval.to_string(), "at least 1"),
            ((0.0..=1.0).contains(&warm_up), "priors.warm_up", warm_up.to_string(), "in 0..=1"),
            (states >= FEWEST_STATES, "priors.states", states.to_string(), "at least 16"),
            (
                (0.0..1.0).contains(&decay),
                "priors.decay",
                decay.to_string(),
                "at least 0 and below 1",
            ),
        ];
        match problems.into_iter().find(|(fine, ..)| !fine) {
            Some((_, field, value, expected)) => {
                Err(Error::Invalid(Invalid::new(field, value, expected)))
            }
            None => Ok(()),
        }
    }

    /// The priors for a value of the signal.
    pub(super) fn at(&self, progress: f64, signal: Option<f64>) -> Priors {
        if progress < self.warm_up {
            return Priors::FORWARD_ONLY;
        }
        let signal = signal.unwrap_or(0.0).clamp(0.0, 1.0);
        let student = self.min + (self.max - self.min) * signal;
        let teacher = (1.0 - student) * self.teacher_fraction;
        Priors { forward: 1.0 - student - teacher, student, teacher }
    }
}

/// Measures the signal of adaptive priors.
#[derive(Debug)]
pub(crate) struct Adaptation {
    config: AdaptivePriors,
    followed: Followed,
    memory: Memory,
}

/// The last measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Followed {
    /// One per grid index; none if there were too few states.
    signal: Vec<Option<f64>>,
    /// The update of that measurement.
    measured_at: u64,
}

#[derive(Debug)]
enum Memory {
    Shift(Box<Stores>),
    LossRatio { losses: LossMeter, means: Vec<Means> },
}

/// The newest states of both sides.
#[derive(Debug)]
struct Stores {
    forward: AggregationBuffer,
    student: AggregationBuffer,
}

/// Losses at one grid index over the intervals so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Means {
    forward: Option<f64>,
    student: Option<f64>,
}

/// Metadata of a saved [`Adaptation`], in addition to its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    followed: Followed,
    /// For the shift: both stores.
    #[serde(default)]
    stores: Vec<serde_json::Value>,
    /// For the loss ratio.
    #[serde(default)]
    means: Vec<Means>,
}

const WHAT: &str = "adaptive priors";
/// Names of both stores in the saved state.
const STORES: [&str; 2] = ["forward", "student"];
const LOSSES: &str = "losses";

/// Trajectories of the student, alone or in turn with the teacher.
const OF_STUDENT: [Source; 2] = [Source::Student, Source::Mixed];

impl Adaptation {
    pub(crate) fn new(config: AdaptivePriors, timesteps: &Timesteps) -> Result<Self> {
        config.ensure()?;
        let memory = Memory::new(&config, timesteps)?;
        let followed = Followed { signal: vec![None; timesteps.len()], measured_at: 0 };
        Ok(Self { config, followed, memory })
    }

    /// The priors at a grid index.
    pub(crate) fn priors(&self, progress: f64, grid_index: usize) -> Priors {
        let signal = self.followed.signal.get(grid_index).copied().flatten();
        self.config.at(progress.clamp(0.0, 1.0), signal)
    }

    /// Measures again if an interval has passed.
    pub(crate) fn refresh(&mut self, step: u64, streams: &RandomStreams) -> Result<()> {
        let Followed { signal, measured_at } = &mut self.followed;
        if step.saturating_sub(*measured_at) < self.config.interval {
            return Ok(());
        }
        *measured_at = step;
        match &mut self.memory {
            Memory::Shift(stores) => {
                for (index, signal) in signal.iter_mut().enumerate().skip(1) {
                    *signal = stores.signal(index, step, streams)?.or(*signal);
                }
            }
            Memory::LossRatio { losses, means } => {
                let table = losses.take()?;
                ensure_seen(&table, means.len())?;
                for (index, means) in means.iter_mut().enumerate().skip(1) {
                    means.take_in(&table, index, self.config.decay);
                    signal[index] = means.ratio().or(signal[index]);
                }
            }
        }
        Ok(())
    }

    /// Keeps some of the states of a batch, if the signal is measured on states.
    pub(crate) fn see_states(&mut self, step: u64, states: &States) -> Result<()> {
        let Memory::Shift(stores) = &mut self.memory else { return Ok(()) };
        keep(&mut stores.forward, 2 * FEWEST_STATES, step, states, &[Source::Forward])?;
        keep(&mut stores.student, FEWEST_STATES, step, states, &OF_STUDENT)
    }

    /// Adds the losses of a batch, if the signal is measured on losses.
    pub(crate) fn see_losses(&mut self, per_sample: &Tensor, states: &States) -> Result<()> {
        match &mut self.memory {
            Memory::LossRatio { losses, .. } => losses.add(per_sample, states),
            Memory::Shift(_) => Ok(()),
        }
    }

    pub(crate) fn flush(&mut self) {
        let Followed { signal, measured_at } = &mut self.followed;
        signal.fill(None);
        *measured_at = 0;
        match &mut self.memory {
            Memory::Shift(stores) => {
                stores.forward.flush();
                stores.student.flush();
            }
            Memory::LossRatio { losses, means } => {
                *losses = LossMeter::new(means.len());
                means.fill(Means::default());
            }
        }
    }

    pub(crate) fn save(&self) -> Result<SavedState> {
        let followed = self.followed.clone();
        match &self.memory {
            Memory::Shift(stores) => {
                let (forward, student) = (stores.forward.save()?, stores.student.save()?);
                let stores = vec![forward.metadata.clone(), student.metadata.clone()];
                let tensors = forward.prefixed(STORES[0]).chain(student.prefixed(STORES[1]));
                let metadata = Metadata { followed, stores, means: vec![] };
                SavedState::serialized(WHAT, tensors.collect(), &metadata)
            }
            Memory::LossRatio { losses, means } => {
                let tensors = losses.tensor().map(|sums| (LOSSES.to_owned(), sums));
                let metadata = Metadata { followed, stores: vec![], means: means.clone() };
                SavedState::serialized(WHAT, tensors.into_iter().collect(), &metadata)
            }
        }
    }

    pub(crate) fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let Metadata { followed, stores, means: saved_means } = saved.metadata(WHAT)?;
        let refuse =
            |problem: &str| Err(Error::Restore { what: WHAT, problem: problem.to_owned() });
        if followed.signal.len() != self.followed.signal.len() {
            return refuse("they belong to a grid of another length");
        }
        match &mut self.memory {
            Memory::Shift(here) => {
                let [forward, student] = &stores[..] else {
                    return refuse("their signal is not the shift");
                };
                here.forward.restore(&saved.part(STORES[0], forward))?;
                here.student.restore(&saved.part(STORES[1], student))?;
            }
            Memory::LossRatio { losses, means } => {
                if saved_means.len() != means.len() {
                    return refuse("their signal is not the loss ratio");
                }
                let sums = saved.tensors.iter().find(|(name, _)| name == LOSSES);
                losses.restore(WHAT, sums.map(|(_, sums)| sums))?;
                *means = saved_means;
            }
        }
        self.followed = followed;
        Ok(())
    }
}

impl Memory {
    fn new(config: &AdaptivePriors, timesteps: &Timesteps) -> Result<Self> {
        match config.signal {
            AdaptiveSignal::Shift => {
                let rings = (timesteps.len() - 1).max(1);
                let store = |states: usize, bytes: u64| {
                    let store = BufferConfig {
                        capacity: states * rings,
                        byte_budget: bytes,
                        max_age: u64::MAX,
                        ..BufferConfig::default()
                    };
                    AggregationBuffer::new(store, timesteps)
                };
                let third = config.byte_budget / 3;
                let (states, twice) = (config.states, 2 * config.states);
                let (forward, student) = (store(twice, 2 * third)?, store(states, third)?);
                Ok(Self::Shift(Box::new(Stores { forward, student })))
            }
            AdaptiveSignal::LossRatio => Ok(Self::LossRatio {
                losses: LossMeter::new(timesteps.len()),
                means: vec![Means::default(); timesteps.len()],
            }),
        }
    }
}

/// Inserts the states of these sources into a store, except pure noise, which is the same for every source.
fn keep(
    store: &mut AggregationBuffer,
    fewest: usize,
    step: u64,
    states: &States,
    sources: &[Source],
) -> Result<()> {
    let kept =
        |&row: &usize| sources.contains(&states.sources[row]) && states.grid_indices[row] > 0;
    let rows: Vec<usize> = (0..states.len()).filter(kept).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let kept = states.index_select(&rows)?;
    // The age counts from the step at which the student was trained on them; the conditioning is not used.
    store.insert(&States {
        created_at_step: vec![step; rows.len()],
        conditioning: Conditioning::none(),
        ..kept
    })?;
    match store.ring_len().filter(|len| *len < fewest) {
        Some(len) => Err(Error::Invalid(Invalid::new(
            "priors.byte_budget",
            format!("room for {len} states per grid index"),
            format!("room for at least {fewest}"),
        ))),
        None => Ok(()),
    }
}

impl Stores {
    /// `1 - D_null / D` at a grid index; none if either side has too few states.
    fn signal(
        &mut self,
        grid_index: usize,
        step: u64,
        streams: &RandomStreams,
    ) -> Result<Option<f64>> {
        let Self { forward, student } = self;
        let pairs = forward.available(grid_index, step) / 2;
        let n = pairs.min(student.available(grid_index, step));
        if n < FEWEST_STATES {
            return Ok(None);
        }
        let forward = forward.newest(grid_index, 2 * n)?.to_kind(Kind::Float);
        let student = student.newest(grid_index, n)?.to_kind(Kind::Float);
        let half = |start: usize| forward.narrow(0, start as i64, n as i64);
        let mut generator = streams.generator(step, Stream::Priors, student.device())?;
        let directions = directions(&student, PROJECTIONS, &mut generator)?;
        let found = sliced_w2(&half(n), &student, &directions);
        let chance = sliced_w2(&half(n), &half(0), &directions);
        // Undefined for two sets that are the same point and for states that are NaN or infinite.
        let signal = 1.0 - chance / found;
        Ok(signal.is_finite().then(|| signal.clamp(0.0, 1.0)))
    }
}

fn ensure_seen(losses: &LossTable, num_indices: usize) -> Result<()> {
    if (0..num_indices).any(|index| losses.samples(&Source::ALL, index) > 0) {
        return Ok(());
    }
    Err(Error::Invalid(Invalid::new(
        "priors.signal",
        "loss_ratio, but the mixer received no losses",
        "`shift`, or losses passed to `Mixer::feed_back` by `Feedback::with_losses`",
    )))
}

impl Means {
    /// Moves the means towards those of an interval.
    fn take_in(&mut self, losses: &LossTable, grid_index: usize, decay: f64) {
        let moved = |mean: &mut Option<f64>, sources: &[Source]| {
            let newest = losses.mean(sources, grid_index).filter(|loss| loss.is_finite());
            if let Some(newest) = newest {
                *mean = Some(mean.map_or(newest, |mean| decay * mean + (1.0 - decay) * newest));
            }
        };
        moved(&mut self.forward, &[Source::Forward]);
        moved(&mut self.student, &OF_STUDENT);
    }

    /// The student's share of the sum of both losses.
    fn ratio(self) -> Option<f64> {
        let (forward, student) = (self.forward?, self.student?);
        let ratio = student / (student + forward);
        // Both may be 0.
        ratio.is_finite().then_some(ratio)
    }
}
