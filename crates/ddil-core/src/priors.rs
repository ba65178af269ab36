//! How often states come from each source, and how that changes over a run.

mod adaptive;

pub(crate) use adaptive::Adaptation;
pub use adaptive::{AdaptivePriors, AdaptiveSignal};

use ddil_files::Invalid;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::states::Source;

/// How far a sum may be from 1 and still be a rounding of it.
const SUM_TOLERANCE: f64 = 1e-6;

/// The share of training states that come from each source; at least 0 each, 1 together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawPriors", into = "RawPriors")]
pub struct Priors {
    forward: f64,
    student: f64,
    teacher: f64,
}

/// [`Priors`] as they are written, not yet checked.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPriors {
    #[serde(default)]
    forward: f64,
    #[serde(default)]
    student: f64,
    #[serde(default)]
    teacher: f64,
}

impl From<Priors> for RawPriors {
    fn from(Priors { forward, student, teacher }: Priors) -> Self {
        Self { forward, student, teacher }
    }
}

impl TryFrom<RawPriors> for Priors {
    type Error = Error;

    fn try_from(RawPriors { forward, student, teacher }: RawPriors) -> Result<Self> {
        Self::new(forward, student, teacher)
    }
}

impl Priors {
    /// Dataset samples only: the base method without imitation learning.
    pub const FORWARD_ONLY: Self = Self { forward: 1.0, student: 0.0, teacher: 0.0 };

    /// # Errors
    ///
    /// [`Error::Invalid`] unless each is at least 0 and they sum to 1.
    pub fn new(forward: f64, student: f64, teacher: f64) -> Result<Self> {
        let sum = forward + student + teacher;
        // Written so that a NaN is refused.
        let possible = [forward, student, teacher].iter().all(|p| *p >= 0.0);
        if possible && (sum - 1.0).abs() <= SUM_TOLERANCE {
            return Ok(Self { forward, student, teacher });
        }
        Err(Error::Invalid(Invalid::new(
            "priors.forward, priors.student, priors.teacher",
            format!("{forward}, {student}, {teacher}"),
            "at least 0 each and 1 together",
        )))
    }

    /// Share of dataset samples, noised.
    pub fn forward(self) -> f64 {
        self.forward
    }

    /// Share of states of the student's own trajectories.
    pub fn student(self) -> f64 {
        self.student
    }

    /// Share of states of the teacher's trajectories.
    pub fn teacher(self) -> f64 {
        self.teacher
    }

    /// A source for each sample of a batch, in random order.
    ///
    /// Stratified: each count is the expected one, rounded down or up at random so that its mean is exact; a source
    /// with a prior of 0 is never drawn.
    pub fn assign(self, batch: usize, rng: &mut impl Rng) -> Vec<Source> {
        self.assign_beside(&[], batch, rng)
    }

    /// As [`assign`](Self::assign), where the sources in `added` have shares of their own and the priors share what is
    /// left.
    pub(crate) fn assign_beside(
        self,
        added: &[(Source, f64)],
        batch: usize,
        rng: &mut impl Rng,
    ) -> Vec<Source> {
        let left = left_by(added);
        let by_prior = [
            (Source::Student, left * self.student),
            (Source::Teacher, left * self.teacher),
            (Source::Forward, left * self.forward),
        ];
        let shares = added.iter().copied().chain(by_prior);
        let drawn: Vec<_> = shares.filter(|(_, share)| *share > 0.0).collect();
        // Systematic sampling: evenly spaced points on a line that the sources share by their priors. One draw moves
        // them all, so that counts cannot pass the batch, as they could if each were rounded by itself.
        let offset: f64 = rng.random();
        let (mut end, mut at) = (0.0, 0);
        let mut sources = Vec::with_capacity(batch);
        for (i, (source, share)) in drawn.iter().enumerate() {
            end += share * batch as f64;
            let last = i + 1 == drawn.len();
            while at < batch && (last || at as f64 + offset < end) {
                sources.push(*source);
                at += 1;
            }
        }
        sources.shuffle(rng);
        sources
    }

    /// A source for each sample by priors of its own: the `i`-th by `priors[i]`, at grid index `grid_indices[i]`.
    ///
    /// Stratified over the batch and, as far as their numbers allow, at each grid index; every sample gets each source
    /// with exactly its probability.
    pub(crate) fn assign_each(
        priors: &[Self],
        added: &[(Source, f64)],
        grid_indices: &[usize],
        rng: &mut impl Rng,
    ) -> Vec<Source> {
        let mut order: Vec<usize> = (0..priors.len()).collect();
        order.shuffle(rng);
        order.sort_by_key(|&i| grid_indices[i]);
        let mut sources = vec![Source::Forward; priors.len()];
        let mut taken = 0.0;
        for &(source, share) in added {
            let (rows, others) = systematic(&order, |_| share / (1.0 - taken), rng);
            for row in rows {
                sources[row] = source;
            }
            (order, taken) = (others, taken + share);
        }
        let (students, others) = systematic(&order, |i| priors[i].student, rng);
        // Of those that are not the student's, the teacher's part of what is left.
        let of_rest = |i: usize| priors[i].teacher / (1.0 - priors[i].student);
        let (teachers, _) = systematic(&others, of_rest, rng);
        for (source, rows) in [(Source::Student, students), (Source::Teacher, teachers)] {
            for row in rows {
                sources[row] = source;
            }
        }
        sources
    }

    /// The mean of some priors; of none, dataset samples only.
    pub(crate) fn mean(priors: &[Self]) -> Self {
        let Some((first, rest)) = priors.split_first() else { return Self::FORWARD_ONLY };
        rest.iter()
            .enumerate()
            .fold(*first, |mean, (i, priors)| mean.lerp(*priors, 1.0 / (i + 2) as f64))
    }

    fn lerp(self, to: Self, weight: f64) -> Self {
        let mix = |a: f64, b: f64| (1.0 - weight) * a + weight * b;
        Self {
            forward: mix(self.forward, to.forward),
            student: mix(self.student, to.student),
            teacher: mix(self.teacher, to.teacher),
        }
    }
}

/// The priors over a run, by progress: 0 at its first step, 1 past its last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum PriorSchedule {
    /// The same throughout.
    Constant {
        /// The priors.
        priors: Priors,
    },
    /// Along a straight line.
    Linear {
        /// Priors up to `start`.
        from: Priors,
        /// Priors from `end` on.
        to: Priors,
        /// Progress at which they begin to change.
        start: f64,
        /// Progress at which they are changed.
        end: f64,
    },
    /// Along half a cosine: slowly at both ends.
    Cosine {
        /// Priors up to `start`.
        from: Priors,
        /// Priors from `end` on.
        to: Priors,
        /// Progress at which they begin to change.
        start: f64,
        /// Progress at which they are changed.
        end: f64,
    },
    /// From one to the next at once.
    Steps {
        /// Priors and the progress from which they hold; rising, the first from 0.
        steps: Vec<PriorStep>,
    },
    /// Each grid index by itself, by what is measured there during the run.
    Adaptive(AdaptivePriors),
}

/// One entry of [`PriorSchedule::Steps`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriorStep {
    /// Progress from which the priors hold.
    pub from: f64,
    /// The priors.
    pub priors: Priors,
}

impl Default for PriorSchedule {
    /// [`default_for_pd`](Self::default_for_pd).
    fn default() -> Self {
        Self::default_for_pd()
    }
}

impl PriorSchedule {
    /// For progressive distillation: dataset samples only for the first 5 %, then on a line that reaches a half of
    /// them and a quarter each from student and teacher at 25 %.
    ///
    /// The warm-up is there because a fresh student is a copy of a network that was taught to take shorter steps; its
    /// own trajectories mean nothing at first.
    pub fn default_for_pd() -> Self {
        Self::warm_up(Priors { forward: 0.5, student: 0.25, teacher: 0.25 })
    }

    /// For latent consistency models: the same warm-up, then half dataset samples, half the student's own states.
    ///
    /// None of the teacher's: they are of its ODE, which a sampler that noises again at each step never meets, and in
    /// two dimensions they doubled the distance to the teacher (`docs/RESULTS.md`).
    pub fn default_for_lcm() -> Self {
        Self::warm_up(Priors { forward: 0.5, student: 0.5, teacher: 0.0 })
    }

    /// For DMD2, whose sampler is the same: as [`default_for_lcm`](Self::default_for_lcm).
    pub fn default_for_dmd2() -> Self {
        Self::default_for_lcm()
    }

    /// The same priors throughout.
    pub fn constant(priors: Priors) -> Self {
        Self::Constant { priors }
    }

    fn warm_up(to: Priors) -> Self {
        Self::Linear { from: Priors::FORWARD_ONLY, to, start: 0.05, end: 0.25 }
    }

    /// Checks the settings, once, before any step.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `0 <= start <= end <= 1`, or unless steps rise from 0 and stay in 0..=1; as
    /// [`AdaptivePriors::ensure`].
    pub fn ensure(&self) -> Result<()> {
        match self {
            Self::Constant { .. } => Ok(()),
            Self::Linear { start, end, .. } | Self::Cosine { start, end, .. } => {
                if 0.0 <= *start && start <= end && *end <= 1.0 {
                    return Ok(());
                }
                Err(Error::Invalid(Invalid::new(
                    "priors.start, priors.end",
                    format!("{start}, {end}"),
                    "in order and in 0..=1",
                )))
            }
            Self::Steps { steps } => ensure_steps(steps),
            Self::Adaptive(adaptive) => adaptive.ensure(),
        }
    }

    /// The priors at `progress`; below 0 counts as 0, above 1 as 1. Adaptive ones as long as nothing is measured.
    pub fn at(&self, progress: f64) -> Priors {
        let progress = progress.clamp(0.0, 1.0);
        let passed = |start: f64, end: f64| {
            // A jump where start and end coincide.
            if progress >= end { 1.0 } else { ((progress - start) / (end - start)).max(0.0) }
        };
        match self {
            Self::Constant { priors } => *priors,
            Self::Linear { from, to, start, end } => from.lerp(*to, passed(*start, *end)),
            Self::Cosine { from, to, start, end } => {
                let angle = std::f64::consts::PI * passed(*start, *end);
                from.lerp(*to, f64::midpoint(1.0, -angle.cos()))
            }
            Self::Steps { steps } => steps
                .iter()
                .take_while(|step| step.from <= progress)
                .last()
                .map_or(Priors::FORWARD_ONLY, |step| step.priors),
            Self::Adaptive(adaptive) => adaptive.at(progress, None),
        }
    }
}

/// Chooses each of `rows` with its probability, those chosen first, the others second.
///
/// Points a length of 1 apart on a line that the rows share by their probabilities; one draw moves them all.
fn systematic(
    rows: &[usize],
    probability: impl Fn(usize) -> f64,
    rng: &mut impl Rng,
) -> (Vec<usize>, Vec<usize>) {
    let mut passed: f64 = rng.random();
    rows.iter().partition(|&&row| {
        let before = passed.floor();
        passed += probability(row);
        passed.floor() > before
    })
}

/// The share of all states that sources with shares of their own leave.
fn left_by(added: &[(Source, f64)]) -> f64 {
    (1.0 - added.iter().map(|(_, share)| share).sum::<f64>()).max(0.0)
}

fn ensure_steps(steps: &[PriorStep]) -> Result<()> {
    let from: Vec<f64> = steps.iter().map(|step| step.from).collect();
    let rises = from.windows(2).all(|pair| pair[0] < pair[1]);
    let in_range = from.iter().all(|from| (0.0..=1.0).contains(from));
    if rises && in_range && from.first() == Some(&0.0) {
        return Ok(());
    }
    Err(Error::Invalid(Invalid::new(
        "priors.steps.from",
        format!("{from:?}"),
        "rising from 0 and in 0..=1",
    )))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn count(sources: &[Source], rows: impl Iterator<Item = usize>, source: Source) -> usize {
        rows.filter(|&row| sources[row] == source).count()
    }

    /// 40 samples at 4 grid indices, each with priors of its own.
    fn batch() -> (Vec<Priors>, Vec<usize>) {
        let by_index = [(0.9, 0.1, 0.0), (0.5, 0.25, 0.25), (0.0, 0.65, 0.35), (0.0, 1.0, 0.0)];
        let by_index = by_index.map(|(f, s, t)| Priors::new(f, s, t).expect("they sum to 1"));
        let grid_indices: Vec<usize> = (0..40).map(|row| (row * 7) % 4).collect();
        (grid_indices.iter().map(|&index| by_index[index]).collect(), grid_indices)
    }

    #[test]
    fn each_sample_follows_its_own_priors() {
        let (priors, grid_indices) = batch();
        let mut rng = StdRng::seed_from_u64(0);
        let rounds = 4000;
        let mut drawn = vec![[0_u32; 2]; 40];
        for _ in 0..rounds {
            let sources = Priors::assign_each(&priors, &[], &grid_indices, &mut rng);
            for (drawn, source) in drawn.iter_mut().zip(&sources) {
                drawn[0] += u32::from(*source == Source::Student);
                drawn[1] += u32::from(*source == Source::Teacher);
            }
            let total: f64 = priors.iter().map(|p| p.student).sum();
            let found = count(&sources, 0..40, Source::Student) as f64;
            assert!((found - total).abs() < 1.0, "{found} for {total}");
            for index in 0..4 {
                let rows = || (0..40).filter(|&row| grid_indices[row] == index);
                let expected: f64 = rows().map(|row| priors[row].student).sum();
                let found = count(&sources, rows(), Source::Student) as f64;
                assert!((found - expected).abs() < 1.0 + 1e-9, "{found} for {expected}");
            }
        }
        let n = f64::from(rounds);
        for (priors, drawn) in priors.iter().zip(drawn) {
            for (share, drawn) in [priors.student, priors.teacher].into_iter().zip(drawn) {
                let deviation = (share * (1.0 - share) / n).sqrt();
                let found = f64::from(drawn) / n;
                assert!((found - share).abs() <= 4.0 * deviation, "{found} for {share}");
            }
        }
    }

    #[test]
    fn means_stay_on_the_simplex() {
        let (priors, _) = batch();
        let mean = Priors::mean(&priors[..4]);
        assert!((mean.forward - 0.35).abs() < 1e-12);
        assert!((mean.student - 0.5).abs() < 1e-12);
        assert!((mean.teacher - 0.15).abs() < 1e-12);
        assert_eq!(Priors::mean(&[]), Priors::FORWARD_ONLY);
    }
}
