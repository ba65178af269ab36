//! Measurements of samples.

use std::cell::Cell as Count;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

use ddil_core::{
    Conditioning, Data, Denoiser, GaussianMixture, ShiftConfig, ShiftRequest, Stream, Thresholded,
    measure_shift,
};
use ddil_examples::{Result, Training};
use ddil_models::Model;
use ddil_schedulers::{Ddim, Thresholding};
use tch::{Kind, Tensor};

use crate::cell::{Arm, Budget, Cell, Modes, Record, Setting};
use crate::distil::{Distillation, STUDENT_STEPS, Student, deployed, sampled_with};
use crate::lab::{Lab, trailing};

/// Numbers of steps at which the students are sampled.
pub(crate) const SAMPLED_STEPS: [u32; 3] = [1, 2, 4];
/// Numbers of steps at which the teacher is compared: those of the student, and those that a student of progressive
/// distillation learns from.
pub(crate) const TEACHER_STEPS: [u32; 2] = [4, 16];
/// Samples for computing the shift, half of them on each side.
const NUM_SHIFT_SAMPLES: i64 = 2048;
/// Samples of each kind that are plotted.
const NUM_POINTS: i64 = 1000;

/// Samples and their classes, for plots.
pub(crate) type Points = Vec<(f64, f64, i64)>;

/// Initial networks of students, by mixture, seed and updates.
#[derive(Default)]
pub(crate) struct Starts(HashMap<(bool, u64, u64), Rc<Model>>);

impl Starts {
    fn get(&mut self, lab: &Lab, budget: &Budget) -> Result<&Model> {
        let key = (lab.setting == Setting::Grid, lab.streams.seed, budget.start_updates);
        Ok(match self.0.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let training = Training {
                    updates: budget.start_updates,
                    learning_rate: budget.start_learning_rate,
                    ema_decay: budget.ema_decay,
                };
                entry.insert(lab.start(training, budget.batch_size)?)
            }
        })
    }
}

/// The reference that samples are compared with.
struct Reference {
    data: Data,
    /// Mean distance between two of them.
    within: f64,
}

impl Reference {
    fn new(data: Data) -> Self {
        Self { within: mean_distance(&data.x0, &data.x0, true), data }
    }

    /// The unbiased energy distance, as in `ddil_metrics`; there, the mean within the reference, which is the
    /// largest of the three sets of pairs, would be recomputed for each set of samples.
    fn distance(&self, x0: &Tensor) -> f64 {
        2.0 * mean_distance(x0, &self.data.x0, false) - mean_distance(x0, x0, true) - self.within
    }
}

/// Mean distance between points `[n, 2]` of two sets; between different points if both are the same set.
fn mean_distance(a: &Tensor, b: &Tensor, is_same: bool) -> f64 {
    /// Rows of `a`, so that a block stays in the processor's cache.
    const BLOCK: i64 = 8;
    let columns = |points: &Tensor| [0, 1].map(|d| points.select(1, d).contiguous());
    let ([a_x, a_y], [b_x, b_y]) = (columns(a), columns(b));
    let (n, m) = (a.size()[0], b.size()[0]);
    let mut sum = 0.0;
    for start in (0..n).step_by(BLOCK as usize) {
        let rows = |of: &Tensor| of.narrow(0, start, BLOCK.min(n - start)).unsqueeze(1);
        let mut squares = (rows(&a_x) - &b_x).square_();
        squares += (rows(&a_y) - &b_y).square_();
        sum += squares.sqrt_().sum(Kind::Double).double_value(&[]);
    }
    sum / (n as f64 * (m - i64::from(is_same)) as f64)
}

/// The parts shared by cells that differ only in their states.
pub(crate) struct Bench {
    lab: Lab,
    thresholding: Thresholding,
    reference: Reference,
    teacher_distances: [f64; 2],
    teacher_modes: Modes,
}

impl Bench {
    pub(crate) fn new(cell: Cell, budget: &Budget) -> Result<Self> {
        let Cell { setting, thresholded, seed, .. } = cell;
        let lab = Lab::new(setting, seed)?;
        let thresholding = if thresholded { setting.thresholding() } else { Thresholding::None };
        let count = Count::new(0);
        let teacher = lab.teacher(thresholding.clone(), &count)?;
        let reference = Reference::new(lab.reference(&teacher, 3 * budget.num_samples)?);
        let ddim = Ddim::new(lab.schedule.clone());
        let distance = |steps| {
            let samples = lab.samples(&teacher, &ddim, &trailing(steps)?, 1, budget.num_samples)?;
            Result::Ok(reference.distance(&samples.x0))
        };
        let teacher_distances = [distance(TEACHER_STEPS[0])?, distance(TEACHER_STEPS[1])?];
        let teacher_modes = modes(lab.mixture(), setting, &reference.data.x0)?;
        drop(teacher);
        Ok(Self { lab, thresholding, reference, teacher_distances, teacher_modes })
    }

    /// Samples of the reference, for plots.
    pub(crate) fn reference_points(&self) -> Points {
        points(&self.reference.data)
    }

    pub(crate) fn run(
        &self,
        cell: Cell,
        budget: &Budget,
        starts: &mut Starts,
    ) -> Result<(Record, Points)> {
        let start = starts.get(&self.lab, budget)?;
        let priors = cell.arm.priors()?;
        let distillation = Distillation::new(&self.lab, budget, self.thresholding.clone(), priors)?;
        let student = distillation.run(start)?;
        self.evaluate(cell, budget, &student)
    }

    fn evaluate(&self, cell: Cell, budget: &Budget, student: &Student) -> Result<(Record, Points)> {
        let lab = &self.lab;
        let denoiser = deployed(budget, lab.denoiser(&student.model)?);
        let denoiser = Thresholded::new(denoiser, self.thresholding.clone())?;
        let mut samples = Vec::new();
        for steps in SAMPLED_STEPS {
            let (timesteps, sampler) = sampled_with(lab, budget, steps)?;
            // The distance in few steps is large, and needs fewer samples to be distinguished from others.
            let n = if steps == STUDENT_STEPS { 1 } else { 3 };
            let n = budget.num_samples / n;
            samples.push(lab.samples(&denoiser, &*sampler, &timesteps, 1, n)?);
        }
        let finite = |data: &Data| data.x0.isfinite().all().int64_value(&[]) != 0;
        let diverged = student.diverged || !samples.iter().all(finite);
        let distance = |data: &Data| finite(data).then(|| self.reference.distance(&data.x0));
        let last = samples.last().ok_or("there are samples")?;
        let modes = finite(last).then(|| modes(lab.mixture(), cell.setting, &last.x0));
        let record = Record {
            cell,
            hash: budget.hash()?,
            diverged,
            distances: [0, 1, 2].map(|i| distance(&samples[i])),
            modes: modes.transpose()?,
            shift: if diverged { vec![] } else { self.shift(budget, &denoiser)? },
            evaluations: student.evaluations,
            seconds_per_update: student.seconds_per_update,
            teacher_distances: self.teacher_distances,
            teacher_modes: self.teacher_modes,
        };
        Ok((record, points(last)))
    }

    fn shift(&self, budget: &Budget, student: &dyn Denoiser) -> Result<Vec<f64>> {
        let (timesteps, sampler) = sampled_with(&self.lab, budget, STUDENT_STEPS)?;
        let data = self.lab.data(0, Stream::Sample, NUM_SHIFT_SAMPLES)?;
        let request = ShiftRequest::new(&data, student, &*sampler, &timesteps, self.lab.streams);
        // Only the energy distance is reported, which has no directions.
        let config = ShiftConfig::default().with(|config| config.projections = 1);
        let shift = measure_shift(&request, &config)?.timesteps;
        Ok(shift.iter().map(|at| at.shift.energy - at.null.energy).collect())
    }
}

fn modes(mixture: &GaussianMixture, setting: Setting, x0: &Tensor) -> Result<Modes> {
    let x0 = x0.to_kind(Kind::Double);
    let offsets = x0.unsqueeze(1) - mixture.means();
    let (squared, nearest) =
        offsets.square().sum_dim_intlist(-1, false, Kind::Double).min_dim(1, false);
    let n = x0.size()[0] as f64;
    let num_modes = mixture.num_components();
    let near = squared.le((3.0 * setting.mode_std()).powi(2));
    let shares = |nearest: &Tensor| -> Result<Vec<f64>> {
        let counts = nearest.bincount::<Tensor>(None, num_modes).to_kind(Kind::Double) / n;
        Ok(Vec::try_from(counts)?)
    };
    let even = 1.0 / num_modes as f64;
    let all = shares(&nearest)?;
    let kl = all.iter().filter(|p| **p > 0.0).map(|p| p * (p / even).ln()).sum();
    let within = shares(&nearest.masked_select(&near))?;
    let covered = within.iter().filter(|p| **p >= 0.2 * even).count() as f64;
    let missing = setting.missing();
    let in_missing: f64 = missing.iter().map(|k| within[*k as usize]).sum();
    Ok(Modes {
        kl,
        off: 1.0 - near.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]),
        coverage: covered * even,
        missing: if missing.is_empty() { 1.0 } else { in_missing / (missing.len() as f64 * even) },
    })
}

fn points(samples: &Data) -> Points {
    let labels = samples.conditioning.get(Conditioning::CLASS_LABELS);
    let class = |i| labels.map_or(0, |labels| labels.int64_value(&[i]));
    // Three digits are more than a plot shows.
    let coordinate = |i, d| (samples.x0.double_value(&[i, d]) * 1e3).round() / 1e3;
    let n = NUM_POINTS.min(samples.x0.size()[0]);
    (0..n).map(|i| (coordinate(i, 0), coordinate(i, 1), class(i))).collect()
}

/// The file of the points of a cell, or of its reference.
pub(crate) fn points_name(cell: Cell, is_reference: bool) -> String {
    let Cell { setting, method, thresholded, arm, .. } = cell;
    let threshold = if thresholded { "on" } else { "off" };
    if is_reference {
        format!("{}-reference-{threshold}.json", setting.name())
    } else {
        format!("{}-{}-{threshold}-{}.json", setting.name(), method.name(), Arm::name(arm))
    }
}
