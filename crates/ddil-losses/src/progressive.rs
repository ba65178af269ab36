//! Progressive distillation: one step of the student replaces several of the teacher.

use ddil_core::{Denoiser, States};
use ddil_files::Invalid;
use ddil_libtorch::{ArgumentError, ensure_real, ensure_same_shape};
use ddil_schedulers::{Ddim, NoiseSchedule, Sampler, Timesteps};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::device_table::DeviceTable;
use crate::distance::squared_error;
use crate::error::{Error, Result};
use crate::grid_rows::{GridRows, per_sample};
use crate::objective::{LossRequest, LossTerms, Objective, ensure_one_schedule};
use crate::phase::Phase;
use crate::weighting::{TimestepWeights, Weighting};

/// The weights of the teacher's predictions in the student's target.
///
/// The teacher steps from `timesteps[0]` to the last timestep with deterministic DDIM and predicts `x0` at all but the
/// last. The `x0` with which a single DDIM step reaches the same state is the mean of these predictions with the
/// weights `(h[k+1] - h[k]) / (h[K] - h[0])`, where `h = alpha / sigma`. For two steps this is the target of
/// [Salimans and Ho 2022](https://arxiv.org/abs/2202.00512) (appendix G), without its subtraction of nearly equal
/// numbers. The weights are positive and sum to 1: if the teacher's predictions are in the data's range, so is the
/// target. Valid on every schedule `x_t = alpha x0 + sigma epsilon`.
///
/// # Shapes and units
///
/// - `timesteps`: two or more, decreasing, in training timesteps; the last may be -1, the clean end
/// - returns: one weight less than there are timesteps
///
/// # Errors
///
/// [`Error::Invalid`] if there are fewer than two timesteps or the signal does not grow over an interval (as between
/// timestep 0 and the clean end if their `alpha_cumprod` is equal); [`Error::Scheduler`] if a timestep is off the
/// training grid.
///
/// # Example
///
/// ```
/// use ddil_losses::convex_weights;
/// use ddil_schedulers::NoiseScheduleConfig;
///
/// # fn main() -> ddil_losses::Result<()> {
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let weights = convex_weights(&schedule, &[999, 874, 749])?;
/// assert!((weights[1] - 0.611_420).abs() < 1e-6);
/// // For clean data only the last prediction counts.
/// assert_eq!(convex_weights(&schedule, &[249, 124, -1])?, [0.0, 1.0]);
/// # Ok(())
/// # }
/// ```
pub fn convex_weights(schedule: &NoiseSchedule, timesteps: &[i64]) -> Result<Vec<f64>> {
    let invalid = |expected: &str| {
        Error::Invalid(Invalid::new("timesteps", format!("{timesteps:?}"), expected))
    };
    let root_snrs = timesteps
        .iter()
        .map(|&t| Ok(schedule.scale_at(t)?.root_snr()))
        .collect::<Result<Vec<f64>>>()?;
    let (Some(first), Some(last)) = (root_snrs.first(), root_snrs.last()) else {
        return Err(invalid("at least two"));
    };
    if root_snrs.len() < 2 {
        return Err(invalid("at least two"));
    }
    let steps = root_snrs.windows(2);
    if !steps.clone().all(|step| step[0] < step[1]) {
        return Err(invalid("each less noisy than the one before"));
    }
    if last.is_infinite() {
        // The limit of the formula: only the last interval is infinite in `h`.
        let mut weights = vec![0.0; root_snrs.len() - 1];
        weights[root_snrs.len() - 2] = 1.0;
        return Ok(weights);
    }
    Ok(steps.map(|step| (step[1] - step[0]) / (last - first)).collect())
}

/// The student's target: the weighted mean of the teacher's predictions on its steps.
///
/// # Shapes and units
///
/// - `teacher_x0`: one per teacher step, each `[batch, ..]`
/// - `weights`: `[batch, teacher steps]`, rows of [`convex_weights`]
/// - returns: the shape and kind of the predictions
///
/// # Errors
///
/// [`Error::Argument`] if `weights` does not match the predictions or these differ in shape.
pub fn progressive_target(teacher_x0: &[Tensor], weights: &Tensor) -> Result<Tensor> {
    const OP: &str = "progressive_target";
    teacher_x0.iter().try_for_each(|x0| ensure_real(OP, "teacher_x0", x0))?;
    ensure_real(OP, "weights", weights)?;
    let (batch, steps) = match teacher_x0.first() {
        Some(x0) if x0.dim() > 0 => (x0.size()[0], teacher_x0.len() as i64),
        _ => (0, 0),
    };
    if steps == 0 || weights.size() != [batch, steps] {
        return Err(Error::Argument(ArgumentError::Shape {
            op: OP,
            name: "weights",
            shape: weights.size(),
            expected: format!("[{batch}, {steps}], for {steps} predictions of {batch} samples"),
        }));
    }
    let first = &teacher_x0[0];
    let mut target = per_sample(&weights.select(1, 0), first) * first;
    for (k, x0) in (0..).zip(teacher_x0).skip(1) {
        ensure_same_shape(OP, ("teacher_x0[0]", first), ("teacher_x0[k]", x0))?;
        target += per_sample(&weights.select(1, k), x0) * x0;
    }
    Ok(target)
}

/// The number of student steps in each stage of halving, from half of `start` down to `end`.
///
/// The teacher of the first stage takes `start` steps; each student is the next stage's teacher.
///
/// # Errors
///
/// [`Error::Invalid`] unless `start` is `end` times 2, 4, 8, ..
///
/// # Example
///
/// ```
/// # fn main() -> ddil_losses::Result<()> {
/// assert_eq!(ddil_losses::halving_stages(32, 4)?, [16, 8, 4]);
/// assert!(ddil_losses::halving_stages(30, 4).is_err());
/// # Ok(())
/// # }
/// ```
pub fn halving_stages(start: u32, end: u32) -> Result<Vec<u32>> {
    let is_power = end > 0 && start.is_multiple_of(end) && (start / end).is_power_of_two();
    if !is_power || start == end {
        let nearest = (1..31).map(|k| u64::from(end.max(1)) << k);
        let nearest = nearest.min_by_key(|n| n.abs_diff(u64::from(start))).unwrap_or(2);
        return Err(Error::Invalid(Invalid::new(
            "start_steps, end_steps",
            format!("{start}, {end}"),
            format!(
                "start_steps to be end_steps times a power of 2, because each stage halves it, such as {nearest} and {}",
                end.max(1)
            ),
        )));
    }
    let halves = std::iter::successors(Some(start / 2), |n| Some(n / 2));
    Ok(halves.take_while(|n| *n >= end).collect())
}

/// The settings of [`Progressive`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ProgressiveConfig {
    /// Number of teacher steps per student step; default 2.
    pub substeps: u32,
    /// The weight of the error at each noise level; default `truncated_snr`.
    pub weighting: Weighting,
    /// Upper bound of the weights; default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_cap: Option<f64>,
    /// Until this step the weight is 1 at all timesteps; default 0.
    pub snr_loss_start_step: u64,
}

impl Default for ProgressiveConfig {
    fn default() -> Self {
        Self {
            substeps: 2,
            weighting: Weighting::TruncatedSnr,
            weight_cap: None,
            snr_loss_start_step: 0,
        }
    }
}

impl ProgressiveConfig {
    /// The same settings with a change: `ProgressiveConfig::default().with(|config| config.weight_cap = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

/// Progressive distillation of [Salimans and Ho 2022](https://arxiv.org/abs/2202.00512), with any number of teacher
/// steps per student step.
///
/// The teacher is evaluated at each of its steps. Its prediction (guided and thresholded by the denoisers that wrap it)
/// enters both its next state and the target. Its noise estimate is not used: a step is `x_s = r x_t + c x0`, with the
/// weights of [`Ddim`] [without epsilon](ddil_schedulers::StepCoefficients::without_epsilon), so that the identity of
/// [`convex_weights`] holds for a modified `x0` as well.
#[derive(Debug)]
pub struct Progressive {
    config: ProgressiveConfig,
    schedule: NoiseSchedule,
    weights: TimestepWeights,
    tables: Tables,
}

impl Progressive {
    /// The method for a student that visits `grid`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if `weight_cap` is not positive, `substeps` is 0 or an interval of the grid has fewer
    /// timesteps than that; [`Error::Scheduler`] if the grid is outside of the schedule.
    pub fn new(
        config: ProgressiveConfig,
        schedule: NoiseSchedule,
        grid: Timesteps,
    ) -> Result<Self> {
        let weights = TimestepWeights::new(config.weighting, config.weight_cap, &schedule)?;
        let tables = Tables::new(&schedule, grid, config.substeps)?;
        Ok(Self { config, schedule, weights, tables })
    }

    /// The settings.
    pub fn config(&self) -> &ProgressiveConfig {
        &self.config
    }

    /// The timesteps of the student.
    pub fn grid(&self) -> &Timesteps {
        self.tables.entries.grid()
    }

    /// The teacher's steps from `states` to the student's next timestep: its predictions and its final states.
    fn teacher_steps(
        &self,
        states: &States,
        teacher: &dyn Denoiser,
        rows: &Rows,
    ) -> Result<(Vec<Tensor>, Tensor)> {
        let _no_grad = tch::no_grad_guard();
        let mut x = states.x_t.shallow_clone();
        let mut predictions = Vec::with_capacity(self.config.substeps as usize);
        for k in 0..self.config.substeps as usize {
            let column = |table: &Tensor| table.select(1, k as i64);
            let timesteps = column(&rows.timesteps).contiguous();
            let x0 = teacher.predict(&x, &timesteps, &states.conditioning)?.x0;
            x = per_sample(&column(&rows.keep), &x) * &x
                + per_sample(&column(&rows.gain), &x0) * &x0;
            predictions.push(x0);
        }
        Ok((predictions, x))
    }
}

impl Objective for Progressive {
    fn phases(&self, _step: u64) -> &'static [Phase] {
        &[Phase::Student]
    }

    fn loss(&self, request: &LossRequest<'_>) -> Result<LossTerms> {
        let LossRequest { step, phase, states, networks, .. } = *request;
        if phase != Phase::Student {
            return Err(Error::Phase { method: "progressive distillation", phase });
        }
        states.ensure("Progressive::loss")?;
        let evaluated = [("student", networks.student), ("teacher", networks.teacher)];
        ensure_one_schedule(&self.schedule, evaluated)?;
        let rows = self.tables.select(states)?;
        // The teacher first: its memory is released before the student's graph is built.
        let (teacher_x0, teacher_next) = self.teacher_steps(states, networks.teacher, &rows)?;
        let target = progressive_target(&teacher_x0, &rows.weights)?;
        drop(teacher_x0);

        let student =
            networks.student.predict(&states.x_t, &states.timesteps, &states.conditioning)?;
        let mut per_sample = squared_error(&student.x0, &target)?;
        if step >= self.config.snr_loss_start_step {
            per_sample = &per_sample * self.weights.gather(&states.timesteps, per_sample.kind())?;
        }
        Ok(LossTerms {
            per_sample,
            student_x0: student.x0.detach(),
            teacher_next: Some(teacher_next),
            target,
            parts: Vec::new(),
        })
    }
}

/// The constants of the teacher's steps at each entry of the student's grid, computed once in `f64`.
#[derive(Debug)]
struct Tables {
    entries: GridRows,
    /// `[grid, substeps]`, `Int64`: the timesteps at which the teacher is evaluated.
    timesteps: DeviceTable,
    /// `[3, grid, substeps]`, `Double`: convex weights, `r` and `c` of the teacher's steps.
    coefficients: DeviceTable,
}

/// The same constants for the samples of a batch, each `[batch, substeps]`.
struct Rows {
    timesteps: Tensor,
    weights: Tensor,
    keep: Tensor,
    gain: Tensor,
}

impl Tables {
    fn new(schedule: &NoiseSchedule, grid: Timesteps, substeps: u32) -> Result<Self> {
        let total = schedule.num_train_timesteps();
        let fine = grid.refined(substeps, total as u32)?;
        let pairs: Vec<(i64, i64)> = fine.pairs().collect();
        let solver = Ddim::new(schedule.clone());
        let (mut weights, mut keep, mut gain) = (Vec::new(), Vec::new(), Vec::new());
        for teacher_steps in pairs.chunks(substeps as usize) {
            let arrival = teacher_steps.last().map(|(_, prev)| *prev);
            let stops: Vec<i64> = teacher_steps.iter().map(|(t, _)| *t).chain(arrival).collect();
            weights.extend(convex_weights(schedule, &stops)?);
            for &(t, prev) in teacher_steps {
                let step = solver.coefficients_at(t, prev)?;
                let step = step.without_epsilon(schedule.scale_at(t)?);
                keep.push(step.x_t);
                gain.push(step.x0);
            }
        }
        let shape = [grid.len() as i64, i64::from(substeps)];
        let table = |values: &[f64]| Tensor::from_slice(values).view(shape);
        Ok(Self {
            entries: GridRows::new(grid, total),
            timesteps: DeviceTable::new(Tensor::from_slice(fine.as_slice()).view(shape)),
            coefficients: DeviceTable::new(Tensor::stack(
                &[table(&weights), table(&keep), table(&gain)],
                0,
            )),
        })
    }

    fn select(&self, states: &States) -> Result<Rows> {
        const OP: &str = "Progressive::loss";
        let rows = self.entries.of(OP, states)?;
        let timesteps = self.entries.look_up(OP, &self.timesteps, 0, &rows)?;
        let coefficients = self.entries.look_up(OP, &self.coefficients, 1, &rows)?;
        let [weights, keep, gain] = [0, 1, 2].map(|i| coefficients.select(0, i));
        Ok(Rows { timesteps, weights, keep, gain })
    }
}
