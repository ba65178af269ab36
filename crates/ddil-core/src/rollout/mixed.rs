//! Trajectories on which student and teacher take turns.

use ddil_files::Invalid;
use ddil_libtorch::Generator;
use ddil_schedulers::{Sampler, Timesteps};
use rand::Rng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::first_state;
use super::legs::{Leg, ensure_part_of, ensure_ready, ensure_targets, for_unfinished, run_steps};
use super::step::step;
use crate::conditioning::Conditioning;
use crate::denoiser::{Denoiser, repeated_timestep};
use crate::error::{Error, Result};
use crate::random::Draws;
use crate::rows::{index, inverse};

/// When the teacher acts instead of the student, per interval of the student's grid.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum MixedVariant {
    /// In each interval with probability `kappa`: DAgger's mixture policy
    /// ([Ross et al. 2011](https://arxiv.org/abs/1011.0686)).
    Bernoulli {
        /// In 0..=1; 0 is the student alone, 1 the teacher alone.
        kappa: f64,
    },
    /// In the first `switch` intervals.
    TeacherThenStudent {
        /// The first interval of the student.
        switch: usize,
    },
    /// From interval `switch` on.
    StudentThenTeacher {
        /// The first interval of the teacher.
        switch: usize,
    },
    /// From the first interval in which the two disagree: mean of `|x0_student - x0_teacher|` above `threshold`.
    ///
    /// Costs a call of both networks in each interval, and waits for the device to find out which one acts.
    Conditional {
        /// Data scale, at least 0.
        threshold: f64,
    },
}

impl MixedVariant {
    /// Checks the settings; call it once, before training.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `kappa` is in 0..=1 and `threshold` at least 0.
    pub fn ensure(&self) -> Result<()> {
        let (field, value, expected) = match *self {
            Self::Bernoulli { kappa } if !(0.0..=1.0).contains(&kappa) => {
                ("mixed.kappa", kappa, "in 0..=1")
            }
            // Written so that NaN is rejected.
            Self::Conditional { threshold } if !matches!(threshold, 0.0..) => {
                ("mixed.threshold", threshold, "at least 0")
            }
            _ => return Ok(()),
        };
        Err(Error::Invalid(Invalid::new(field, value, expected)))
    }

    /// Whether the teacher acts in interval `level`, if that is known without calling the networks.
    pub(crate) fn teacher_acts(&self, level: usize, rng: &mut StdRng) -> Option<bool> {
        match *self {
            Self::Bernoulli { kappa } => Some(rng.random::<f64>() < kappa),
            Self::TeacherThenStudent { switch } => Some(level < switch),
            Self::StudentThenTeacher { switch } => Some(level >= switch),
            Self::Conditional { .. } => None,
        }
    }
}

/// A trajectory shared by student and teacher.
///
/// The teacher may take finer steps than the student, several per interval of the student's grid.
#[derive(Clone, Copy)]
pub struct MixedRollout<'a> {
    student: Actor<'a>,
    teacher: Actor<'a>,
    variant: Option<MixedVariant>,
}

/// A network, its sampler and its grid.
type Actor<'a> = (&'a dyn Denoiser, &'a dyn Sampler, &'a Timesteps);

/// States visited by a batch of trajectories, one per row.
#[derive(Debug)]
#[non_exhaustive]
pub struct Visited {
    /// The states, `[visited, ..]`.
    pub x_t: Tensor,
    /// The trajectory of each state.
    pub rows: Vec<usize>,
    /// The timestep of each state.
    pub timesteps: Vec<i64>,
    /// Whether the teacher acted in any interval before it.
    pub teacher_acted: Vec<bool>,
}

impl std::fmt::Debug for MixedRollout<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MixedRollout")
            .field("timesteps", self.student.2)
            .field("teacher_timesteps", self.teacher.2)
            .field("variant", &self.variant)
            .finish_non_exhaustive()
    }
}

impl<'a> MixedRollout<'a> {
    /// The student acts where `variant` does not hand over to the teacher; `None` is the student alone.
    ///
    /// Each is a network with its sampler and grid. The teacher's grid contains every timestep of the student's.
    pub fn new(
        student: (&'a dyn Denoiser, &'a dyn Sampler, &'a Timesteps),
        teacher: (&'a dyn Denoiser, &'a dyn Sampler, &'a Timesteps),
        variant: impl Into<Option<MixedVariant>>,
    ) -> Self {
        Self { student, teacher, variant: variant.into() }
    }

    /// Runs each sample of a batch from noise to its target and keeps the states on the way: all except the first, the
    /// target last.
    ///
    /// # Shapes and units
    ///
    /// - `noise`: `[batch, ..]`, unit normal
    /// - `targets`: one timestep per sample, less noisy than the first
    ///
    /// # Errors
    ///
    /// As [`Rollout::run`](super::Rollout::run), and [`Error::Invalid`] for the variant, for a target noisier than the
    /// first timestep, and if the teacher's grid misses a timestep of the student's.
    pub fn visit(
        &self,
        noise: &Tensor,
        conditioning: &Conditioning,
        targets: &[i64],
        draws: &mut Draws,
    ) -> Result<Visited> {
        let (student, _, timesteps) = self.student;
        let x_t = first_state(student.schedule(), timesteps.as_slice()[0], noise)?;
        self.visit_from(0, &x_t, conditioning, targets, draws)
    }

    /// As [`visit`](Self::visit), from states that are already at index `start` of the student's grid.
    ///
    /// # Errors
    ///
    /// As [`visit`](Self::visit), and [`Error::Invalid`] if `start` is beyond the grid.
    pub fn visit_from(
        &self,
        start: usize,
        x_t: &Tensor,
        conditioning: &Conditioning,
        targets: &[i64],
        draws: &mut Draws,
    ) -> Result<Visited> {
        const OP: &str = "MixedRollout::visit";
        let _no_grad = tch::no_grad_guard();
        let path = self.ensure(OP, start, x_t, conditioning, targets)?;
        let mut statuses = vec![TrajectoryStatus::default(); targets.len()];
        let mut visited = Visited::empty();
        let mut states = Vec::new();
        let _ = for_unfinished(path, x_t, conditioning, targets, |leg| {
            let stepped = self.advance(start, leg, &mut statuses, draws)?;
            states.push(stepped.shallow_clone());
            visited.rows.extend(leg.rows);
            visited.timesteps.extend(leg.next);
            visited.teacher_acted.extend(leg.rows.iter().map(|&row| statuses[row].teacher_acted));
            Ok(stepped)
        })?;
        if states.is_empty() {
            visited.x_t = x_t.narrow(0, 0, 0);
        } else {
            visited.x_t = Tensor::f_cat(&states, 0).map_err(Error::torch(OP))?;
        }
        Ok(visited)
    }

    fn ensure(
        &self,
        op: &'static str,
        start: usize,
        x_t: &Tensor,
        conditioning: &Conditioning,
        targets: &[i64],
    ) -> Result<&[i64]> {
        ddil_libtorch::ensure_real(op, "x_t", x_t)?;
        let (_, sampler, timesteps) = self.student;
        ensure_ready(op, sampler, x_t, conditioning, true)?;
        if let Some(variant) = self.variant {
            variant.ensure()?;
            ensure_part_of("timesteps", timesteps, self.teacher.2)?;
        }
        let path = timesteps.as_slice();
        let Some(path) = path.get(start..).filter(|path| !path.is_empty()) else {
            return Err(Error::Invalid(Invalid::new(
                "start",
                start,
                format!("an index of {path:?}"),
            )));
        };
        ensure_targets(op, x_t, path[0], targets)?;
        Ok(path)
    }

    /// One interval of the student's grid.
    fn advance(
        &self,
        start: usize,
        leg: &Leg<'_>,
        statuses: &mut [TrajectoryStatus],
        draws: &mut Draws,
    ) -> Result<Tensor> {
        let level = start + leg.level;
        let acts = self.teacher_acts_in(level, leg, statuses, &mut draws.rng)?;
        let split = |teacher: bool| -> Vec<usize> {
            (0..acts.len()).filter(|&i| acts[i] == teacher).collect()
        };
        let (student_rows, teacher_rows) = (split(false), split(true));
        for &i in &teacher_rows {
            statuses[leg.rows[i]].teacher_acted = true;
        }
        match (student_rows.is_empty(), teacher_rows.is_empty()) {
            (_, true) => self.student_step(level, &Part::all(leg), &mut draws.generator),
            (true, false) => self.teacher_steps(level, &Part::all(leg), &mut draws.generator),
            (false, false) => {
                let student = Part::of(leg, &student_rows)?;
                let teacher = Part::of(leg, &teacher_rows)?;
                let student = self.student_step(level, &student, &mut draws.generator)?;
                let teacher = self.teacher_steps(level, &teacher, &mut draws.generator)?;
                let back = inverse(&[student_rows, teacher_rows].concat());
                Tensor::f_cat(&[student, teacher], 0)
                    .and_then(|both| both.f_index_select(0, &index(&back, leg.x_t.device())))
                    .map_err(Error::torch("MixedRollout::visit"))
            }
        }
    }

    /// Whether the teacher acts in this interval, per sample of the leg.
    fn teacher_acts_in(
        &self,
        level: usize,
        leg: &Leg<'_>,
        statuses: &mut [TrajectoryStatus],
        rng: &mut StdRng,
    ) -> Result<Vec<bool>> {
        let Some(variant) = self.variant else { return Ok(vec![false; leg.rows.len()]) };
        if let MixedVariant::Conditional { threshold } = variant {
            let distances = self.disagreement(level, leg)?;
            for (&row, distance) in leg.rows.iter().zip(distances) {
                statuses[row].switched |= distance > threshold;
            }
        }
        let decide = |&row: &usize| {
            variant.teacher_acts(level, rng).unwrap_or_else(|| statuses[row].switched)
        };
        Ok(leg.rows.iter().map(decide).collect())
    }

    /// Mean of `|x0_student - x0_teacher|` per sample.
    fn disagreement(&self, level: usize, leg: &Leg<'_>) -> Result<Vec<f64>> {
        const OP: &str = "MixedRollout::visit";
        let timestep = self.student.2.as_slice()[level];
        let timesteps = repeated_timestep(timestep, leg.x_t)?;
        let [student, teacher] = [self.student.0, self.teacher.0]
            .map(|denoiser| denoiser.predict(leg.x_t, &timesteps, leg.conditioning));
        let distances =
            (student?.x0 - teacher?.x0).abs().flatten(1, -1).mean_dim(1, false, Kind::Double);
        Vec::try_from(&distances).map_err(Error::torch(OP))
    }

    fn student_step(&self, level: usize, part: &Part, generator: &mut Generator) -> Result<Tensor> {
        let (student, sampler, timesteps) = self.student;
        let timestep = timesteps.as_slice()[level];
        step(
            (student, sampler),
            &part.x_t,
            timestep,
            &part.next,
            &part.conditioning,
            Some(generator),
        )
    }

    /// One interval in the finer steps of the teacher.
    fn teacher_steps(
        &self,
        level: usize,
        part: &Part,
        generator: &mut Generator,
    ) -> Result<Tensor> {
        let grid = self.student.2.as_slice();
        let (from, to) = (grid[level], grid.get(level + 1).copied().unwrap_or(-1));
        let (teacher, sampler, timesteps) = self.teacher;
        let fine = timesteps.as_slice().iter().copied();
        let path: Vec<i64> = fine.filter(|t| to < *t && *t <= from).collect();
        let actor = (teacher, sampler);
        run_steps(actor, &path, &part.x_t, &part.conditioning, &part.next, Some(generator))
    }
}

impl Visited {
    fn empty() -> Self {
        let x_t = Tensor::empty([0], tch::kind::FLOAT_CPU);
        Self { x_t, rows: vec![], timesteps: vec![], teacher_acted: vec![] }
    }

    /// The same with rows of a larger batch: trajectory `i` becomes `rows[i]`.
    pub(crate) fn renumbered(mut self, rows: &[usize]) -> Self {
        self.rows.iter_mut().for_each(|row| *row = rows[*row]);
        self
    }

    /// Concatenates visited states.
    pub(crate) fn cat(parts: Vec<Self>) -> Result<Self> {
        let mut all = Self::empty();
        let mut states = Vec::with_capacity(parts.len());
        for part in parts {
            states.push(part.x_t);
            all.rows.extend(part.rows);
            all.timesteps.extend(part.timesteps);
            all.teacher_acted.extend(part.teacher_acted);
        }
        if !states.is_empty() {
            all.x_t = Tensor::f_cat(&states, 0).map_err(Error::torch("Visited::cat"))?;
        }
        Ok(all)
    }

    /// Index of the state of a trajectory at a timestep among the visited states.
    pub fn position(&self, row: usize, timestep: i64) -> Option<usize> {
        (0..self.rows.len()).find(|&i| self.rows[i] == row && self.timesteps[i] == timestep)
    }
}

/// Status of a trajectory.
#[derive(Clone, Copy, Default)]
struct TrajectoryStatus {
    /// Whether the teacher acted in any interval.
    teacher_acted: bool,
    /// Whether the teacher acts from here on.
    switched: bool,
}

/// Some of the samples of a leg.
struct Part {
    x_t: Tensor,
    conditioning: Conditioning,
    next: Vec<i64>,
}

impl Part {
    fn all(leg: &Leg<'_>) -> Self {
        let conditioning = leg.conditioning.shallow_clone();
        Self { x_t: leg.x_t.shallow_clone(), conditioning, next: leg.next.to_vec() }
    }

    fn of(leg: &Leg<'_>, rows: &[usize]) -> Result<Self> {
        let order = index(rows, leg.x_t.device());
        Ok(Self {
            x_t: leg.x_t.index_select(0, &order),
            conditioning: leg.conditioning.index_select(&order)?,
            next: rows.iter().map(|&i| leg.next[i]).collect(),
        })
    }
}
