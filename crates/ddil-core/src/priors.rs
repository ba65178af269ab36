//! The share of training states from each source, and its schedule over a run.

mod adaptive;

pub(crate) use adaptive::Adaptation;
pub use adaptive::{AdaptivePriors, AdaptiveSignal};

use ddil_files::Invalid;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::states::Source;
use crate::stratified::draw_stratified;

/// Maximum distance of a sum from 1 that counts as rounding error.
const SUM_TOLERANCE: f64 = 1e-6;

/// The share of training states from each source; each at least 0, their sum 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawPriors", into = "RawPriors")]
pub struct Priors {
    forward: f64,
    student: f64,
    teacher: f64,
}

/// Deserialized [`Priors`], not yet checked.
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
        // Written so that NaN is rejected.
        let possible = [forward, student, teacher].iter().all(|p| *p >= 0.0);
        if possible && (sum - 1.0).abs() <= SUM_TOLERANCE {
            return Ok(Self { forward, student, teacher });
        }
        Err(Error::Invalid(Invalid::new(
            "priors.forward, priors.student, priors.teacher",
            format!("{forward}, {student}, {teacher}"),
            "at least 0 each, with sum 1",
        )))
    }

    /// Share of noised dataset samples.
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
    /// Stratified: each count is the expected count, rounded down or up at random so that its mean is exact; a source
    /// with a prior of 0 is never drawn.
    pub fn assign(self, batch: usize, rng: &mut impl Rng) -> Vec<Source> {
        self.assign_with_added(&[], batch, rng)
    }

    /// As [`assign`](Self::assign), where the sources in `added` have fixed shares and the priors divide the rest.
    pub(crate) fn assign_with_added(
        self,
        added: &[(Source, f64)],
        batch: usize,
        rng: &mut impl Rng,
    ) -> Vec<Source> {
        let left = remainder(added);
        let by_prior = [
            (Source::Student, left * self.student),
            (Source::Teacher, left * self.teacher),
            (Source::Forward, left * self.forward),
        ];
        let all: Vec<(Source, f64)> = added.iter().copied().chain(by_prior).collect();
        let shares: Vec<f64> = all.iter().map(|(_, share)| *share).collect();
        draw_stratified(&shares, batch, rng).into_iter().map(|index| all[index].0).collect()
    }

    /// A source for each sample by its own priors: the `i`-th by `priors[i]`, at grid index `grid_indices[i]`.
    ///
    /// Stratified over the batch and, as far as their numbers allow, at each grid index; every sample is assigned each
    /// source with exactly its probability.
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
        // Of the samples that are not the student's: the teacher's share of the rest.
        let of_rest = |i: usize| priors[i].teacher / (1.0 - priors[i].student);
        let (teachers, _) = systematic(&others, of_rest, rng);
        for (source, rows) in [(Source::Student, students), (Source::Teacher, teachers)] {
            for row in rows {
                sources[row] = source;
            }
        }
        sources
    }

    /// The mean of several priors; dataset samples only if there are none.
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

/// The priors over a run, by progress: 0 at the first step, 1 after the last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum PriorSchedule {
    /// Constant.
    Constant {
        /// The priors.
        priors: Priors,
    },
    /// Linear.
    Linear {
        /// Priors up to `start`.
        from: Priors,
        /// Priors from `end` on.
        to: Priors,
        /// Progress at which the change begins.
        start: f64,
        /// Progress at which the change ends.
        end: f64,
    },
    /// Half a cosine: slow at both ends.
    Cosine {
        /// Priors up to `start`.
        from: Priors,
        /// Priors from `end` on.
        to: Priors,
        /// Progress at which the change begins.
        start: f64,
        /// Progress at which the change ends.
        end: f64,
    },
    /// Piecewise constant.
    Steps {
        /// Priors and the progress from which each applies; increasing, the first from 0.
        steps: Vec<PriorStep>,
    },
    /// Separate for each grid index, from measurements during the run.
    Adaptive(AdaptivePriors),
}

/// One entry of [`PriorSchedule::Steps`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriorStep {
    /// Progress from which the priors apply.
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
    /// For progressive distillation: dataset samples only for the first 5 %, then linear up to 25 %, where one half are
    /// dataset samples and a quarter each come from student and teacher.
    ///
    /// The warm-up is needed because a fresh student is a copy of a network that was trained for shorter steps; its own
    /// trajectories are meaningless at first.
    pub fn default_for_pd() -> Self {
        Self::warm_up(Priors { forward: 0.5, student: 0.25, teacher: 0.25 })
    }

    /// For latent consistency models: the same warm-up, then half dataset samples, half the student's own states.
    ///
    /// There are no teacher states: they lie on its ODE, which a sampler that adds noise again at each step never
    /// visits, and in two dimensions they doubled the distance to the teacher (`docs/RESULTS.md`).
    pub fn default_for_lcm() -> Self {
        Self::warm_up(Priors { forward: 0.5, student: 0.5, teacher: 0.0 })
    }

    /// For DMD2, which has the same sampler: as [`default_for_lcm`](Self::default_for_lcm).
    pub fn default_for_dmd2() -> Self {
        Self::default_for_lcm()
    }

    /// Constant priors.
    pub fn constant(priors: Priors) -> Self {
        Self::Constant { priors }
    }

    fn warm_up(to: Priors) -> Self {
        Self::Linear { from: Priors::FORWARD_ONLY, to, start: 0.05, end: 0.25 }
    }

    /// Checks the settings; call it once, before training.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `0 <= start <= end <= 1`, or unless steps increase from 0 and stay in 0..=1; as
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

    /// The priors at `progress`, clamped to 0..=1. For adaptive priors, those before the first measurement.
    pub fn at(&self, progress: f64) -> Priors {
        let progress = progress.clamp(0.0, 1.0);
        let passed = |start: f64, end: f64| {
            // A jump if start and end coincide.
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

/// Chooses each of `rows` with its probability; returns the chosen rows first, the others second.
///
/// Points at a distance of 1 on a line that is divided among the rows by their probabilities; one draw shifts all
/// points.
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

/// The share of all states that sources with fixed shares leave.
fn remainder(added: &[(Source, f64)]) -> f64 {
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

    /// 40 samples at 4 grid indices, each with its own priors.
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
