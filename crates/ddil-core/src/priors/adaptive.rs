//! Priors that follow what is measured of the student.

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

/// What adaptive priors follow; between 0 and 1 at each grid index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdaptiveSignal {
    /// `1 - D_null / D` with the sliced squared 2-Wasserstein distance `D` from noised dataset samples to the student's
    /// states, and that between two sets of the former: 0 where there is no more than chance, towards 1 where chance
    /// explains nothing.
    ///
    /// Measured on states that batches are made of anyway, so no network is asked.
    #[default]
    Shift,
    /// `L_student / (L_student + L_forward)`, the losses on the student's states and on noised dataset samples: one
    /// half where the student is as good on either, towards 1 where it is lost on its own.
    ///
    /// Needs [`Mixer::see_losses`](crate::Mixer::see_losses).
    LossRatio,
}

/// Priors of each grid index by itself, from what is measured there: the student's states get the share
/// `min + (max - min) signal`, and the rest is divided between dataset samples and teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdaptivePriors {
    /// What is measured; default the shift.
    pub signal: AdaptiveSignal,
    /// The student's share where the signal is 0, and before anything is measured; default 0.1. Above 0, or there
    /// would never be anything to measure.
    pub min: f64,
    /// The student's share where the signal is 1; default 0.8. Below 1, as it is dataset samples that the student's
    /// states are compared with.
    pub max: f64,
    /// Share of the teacher's states in what the student leaves, the others are dataset samples; default 0.25,
    /// below 1.
    pub teacher_fraction: f64,
    /// Updates from one measurement to the next; default 200.
    pub interval: u64,
    /// Progress up to which there are dataset samples only; default 0.05.
    pub warm_up: f64,
    /// Of the shift: most states kept of the student at each grid index, the newest, and twice as many noised dataset
    /// samples; default 128. They are measured from 16 on.
    pub states: usize,
    /// Of the shift: most bytes that those states take; default 256 MiB.
    pub byte_budget: u64,
    /// Of the loss ratio: weight of the earlier intervals' mean against the newest's, in 0..1; default 0.5.
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

/// Fewest states that say anything about their law.
const FEWEST_STATES: usize = 16;

/// Directions of the sliced distance.
const PROJECTIONS: i64 = 64;

impl AdaptivePriors {
    /// Checks the settings, once, before any step.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] that names the setting.
    pub fn ensure(&self) -> Result<()> {
        let Self { min, max, teacher_fraction, interval, warm_up, states, decay, .. } = *self;
        // Written so that a NaN is refused.
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

    /// The priors where the signal is this.
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

/// Measures what adaptive priors follow.
#[derive(Debug)]
pub(crate) struct Adaptation {
    config: AdaptivePriors,
    followed: Followed,
    memory: Memory,
}

/// What was measured last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Followed {
    /// One a grid index; none where there was too little.
    signal: Vec<Option<f64>>,
    /// The update at which that was.
    measured_at: u64,
}

#[derive(Debug)]
enum Memory {
    Shift(Box<Stores>),
    LossRatio { losses: LossMeter, means: Vec<Means> },
}

/// The newest states of either side.
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

/// What an [`Adaptation`] is saved as, beside its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    followed: Followed,
    /// Of the shift: both stores.
    #[serde(default)]
    stores: Vec<serde_json::Value>,
    /// Of the loss ratio.
    #[serde(default)]
    means: Vec<Means>,
}

const WHAT: &str = "adaptive priors";
/// Names of both stores in what is saved.
const STORES: [&str; 2] = ["forward", "student"];
const LOSSES: &str = "losses";

/// Trajectories that the student walked on, alone or in turn with the teacher.
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

    /// Measures anew if it is time.
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

    /// Keeps some of the states of a batch, if they are what is measured.
    pub(crate) fn see_states(&mut self, step: u64, states: &States) -> Result<()> {
        let Memory::Shift(stores) = &mut self.memory else { return Ok(()) };
        keep(&mut stores.forward, 2 * FEWEST_STATES, step, states, &[Source::Forward])?;
        keep(&mut stores.student, FEWEST_STATES, step, states, &OF_STUDENT)
    }

    /// Takes the losses of a batch in, if they are what is measured.
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
                SavedState::new(WHAT, tensors.collect(), &metadata)
            }
            Memory::LossRatio { losses, means } => {
                let tensors = losses.tensor().map(|sums| (LOSSES.to_owned(), sums));
                let metadata = Metadata { followed, stores: vec![], means: means.clone() };
                SavedState::new(WHAT, tensors.into_iter().collect(), &metadata)
            }
        }
    }

    pub(crate) fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let Metadata { followed, stores, means: saved_means } = saved.metadata(WHAT)?;
        let refuse =
            |problem: &str| Err(Error::Restore { what: WHAT, problem: problem.to_owned() });
        if followed.signal.len() != self.followed.signal.len() {
            return refuse("they are of a grid of another length");
        }
        match &mut self.memory {
            Memory::Shift(here) => {
                let [forward, student] = &stores[..] else {
                    return refuse("they did not follow the shift");
                };
                here.forward.restore(&saved.part(STORES[0], forward))?;
                here.student.restore(&saved.part(STORES[1], student))?;
            }
            Memory::LossRatio { losses, means } => {
                if saved_means.len() != means.len() {
                    return refuse("they did not follow the loss ratio");
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

/// Puts the states of these sources into a store, but for those that are noise whoever made them.
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
    // What counts is when the student was shown them, and what was said plays no part.
    store.insert(&States {
        births: vec![step; rows.len()],
        conditioning: Conditioning::none(),
        ..kept
    })?;
    match store.ring_len().filter(|len| *len < fewest) {
        Some(len) => Err(Error::Invalid(Invalid::new(
            "priors.byte_budget",
            format!("room for {len} states a grid index"),
            format!("room for at least {fewest}"),
        ))),
        None => Ok(()),
    }
}

impl Stores {
    /// `1 - D_null / D` at a grid index; none where there are too few states of either side.
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
        // Of two sets that are the same point, or of states that are not numbers, nothing can be said.
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
        "loss_ratio, but the mixer saw no losses",
        "`shift`, or `Mixer::see_losses` to be called after each loss",
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

    /// The student's part of both losses together.
    fn ratio(self) -> Option<f64> {
        let (forward, student) = (self.forward?, self.student?);
        let ratio = student / (student + forward);
        // Both may be 0.
        ratio.is_finite().then_some(ratio)
    }
}
