//! Solvers: samplers whose steps also use earlier predictions.

use std::collections::VecDeque;

use ddil_libtorch::{ArgumentError, ensure_same_shape};
use tch::Tensor;

use crate::ddim;
use crate::error::Result;
use crate::estimate::Estimate;
use crate::noise_level::{NoiseLevel, NoiseLevels};
use crate::noise_schedule::Scale;

/// A step as a weighted sum: `x_prev = x_t · x_t + x0[0] · x0 + x0[1] · earlier x0 + ..`.
#[derive(Clone, Debug, PartialEq)]
pub struct SolverCoefficients {
    /// Weight of the state before the step.
    pub x_t: f64,
    /// Weights of predicted clean data: of this step's, then of the step before, and so on.
    pub x0: Vec<f64>,
}

impl SolverCoefficients {
    /// The weight of the clean data predicted `age` steps ago; 0 beyond the list.
    pub fn weight(&self, age: usize) -> f64 {
        self.x0.get(age).copied().unwrap_or(0.0)
    }

    /// The step of first order from `now` to `prev`, exact if the clean data do not change: that of deterministic DDIM.
    pub(crate) fn first_order(now: Scale, prev: Scale) -> Self {
        if now == prev {
            return Self { x_t: 1.0, x0: vec![0.0] };
        }
        let step = ddim::deterministic(prev).without_epsilon(now);
        Self { x_t: step.x_t, x0: vec![step.x0] }
    }
}

/// A deterministic sampler that solves the probability flow ODE with the help of earlier predictions.
///
/// For teachers, which are accurate at every noise level: more accurate than [`Ddim`](crate::Ddim) with the same number
/// of network calls. A [`Sampler`](crate::Sampler) needs no history and serves students and distillation.
///
/// A solver is the weights of its steps, computed in `f64` from the noise levels alone. [`SolverRun`] keeps the
/// predictions and makes the steps.
///
/// # Example
///
/// A custom solver: the second-order Adams-Bashforth method in `ln(alpha / sigma)`, for the clean data.
///
/// ```
/// use ddil_schedulers::{Euler, NoiseLevels, Solver, SolverCoefficients};
///
/// #[derive(Debug)]
/// struct AdamsBashforth;
///
/// impl Solver for AdamsBashforth {
///     fn history(&self) -> usize {
///         1
///     }
///
///     fn coefficients(&self, levels: &NoiseLevels, step: usize) -> SolverCoefficients {
///         let SolverCoefficients { x_t, x0 } = Euler.coefficients(levels, step);
///         let has_history = step > 0 && step + 1 < levels.len();
///         let more = if has_history { 0.5 * x0[0] } else { 0.0 };
///         SolverCoefficients { x_t, x0: vec![x0[0] + more, -more] }
///     }
/// }
/// # use ddil_schedulers::{NoiseScheduleConfig, TimestepSpacing, Timesteps};
/// # let schedule = NoiseScheduleConfig::default().build()?;
/// # let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// # let levels = NoiseLevels::of_timesteps(&schedule, &timesteps)?;
/// # assert_eq!(AdamsBashforth.coefficients(&levels, 3).x0, [1.0, 0.0]);
/// # Ok::<(), ddil_schedulers::Error>(())
/// ```
pub trait Solver: std::fmt::Debug + Send + Sync {
    /// The largest number of earlier predictions that a step uses.
    fn history(&self) -> usize;

    /// The weights of the step from level `step` to the next one, or to the end of the run.
    ///
    /// `step` is the number of earlier steps, and thus of earlier predictions that exist.
    fn coefficients(&self, levels: &NoiseLevels, step: usize) -> SolverCoefficients;
}

/// Euler's method for the probability flow ODE in `sigma / alpha`, which is deterministic DDIM.
///
/// With `y = x / alpha` and `s = sigma / alpha`, Euler's step of [Karras et al.
/// 2022](https://arxiv.org/abs/2206.00364), `y_prev = y + (s_prev - s) (y - x0) / s`, is `x_prev = (sigma_prev / sigma)
/// x_t + (alpha_prev - alpha sigma_prev / sigma) x0`: the step of [`Ddim`](crate::Ddim) with `eta = 0`. diffusers'
/// `EulerDiscreteScheduler` differs from its `DDIMScheduler` in noise levels alone:
/// [`SolverConfig::levels`](crate::SolverConfig::levels).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Euler;

impl Solver for Euler {
    fn history(&self) -> usize {
        0
    }

    fn coefficients(&self, levels: &NoiseLevels, step: usize) -> SolverCoefficients {
        let (now, prev) = levels.pair(step);
        SolverCoefficients::first_order(now, prev)
    }
}

/// The run of a solver over the levels of one batch: the number of steps made, and the predictions to keep.
///
/// # Example
///
/// Ten steps of DPM-Solver++ (2M), with a network that predicts 0 for all data:
///
/// ```
/// use ddil_schedulers::{Estimate, NoiseScheduleConfig, PredictionType, SolverConfig, SolverRun};
/// use tch::{Tensor, kind};
///
/// # fn main() -> ddil_schedulers::Result<()> {
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let config = SolverConfig::dpm_solver();
/// let (solver, levels) = (config.build()?, config.levels(&schedule, 10)?);
///
/// let mut x = levels.first_state(&Tensor::randn([2, 4, 8, 8], kind::FLOAT_CPU))?;
/// let mut run = SolverRun::new(&*solver, &levels);
/// while let Some(level) = run.level() {
///     let model_output = x.zeros_like();
///     let estimate = Estimate::at_level(&schedule, PredictionType::Sample, model_output, level)?;
///     x = run.step(x, &estimate)?;
/// }
/// assert_eq!(x.abs().max().double_value(&[]), 0.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SolverRun<'a> {
    solver: &'a dyn Solver,
    levels: &'a NoiseLevels,
    step: usize,
    /// The clean data that earlier steps predicted, the newest first; `None` if no step uses them.
    earlier: VecDeque<Option<Tensor>>,
}

impl<'a> SolverRun<'a> {
    /// A run before its first step.
    pub fn new(solver: &'a dyn Solver, levels: &'a NoiseLevels) -> Self {
        Self { solver, levels, step: 0, earlier: VecDeque::new() }
    }

    /// The level at which the next step needs an estimate; `None` after the last step.
    pub fn level(&self) -> Option<NoiseLevel> {
        self.levels.as_slice().get(self.step).copied()
    }

    /// The state after the next step.
    ///
    /// One pass over memory for up to three earlier predictions, after one for the clean data if later steps use them.
    /// The memory of `x_t` is reused if it is not shared and no gradients are recorded.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, ..]`, the state of the estimate, in every step of a run the same shape
    /// - returns: the same shape, `Float` or `Double`
    ///
    /// # Errors
    ///
    /// [`Error::Argument`](crate::Error::Argument) after the last step, for an estimate at another
    /// [`level`](Self::level), and if tensors differ in shape; as
    /// [`Thresholding::apply`](crate::Thresholding::apply).
    pub fn step(&mut self, x_t: Tensor, estimate: &Estimate) -> Result<Tensor> {
        const OP: &str = "SolverRun::step";
        self.ensure_next(OP, estimate)?;
        let coefficients = self.solver.coefficients(self.levels, self.step);
        let earlier = self.weighted(OP, &x_t, &coefficients)?;
        let weights = (coefficients.x_t, coefficients.weight(0));
        let (x_prev, x0) = estimate.solver_step(x_t, weights, &earlier, self.is_used_later())?;
        self.earlier.push_front(x0);
        self.earlier.truncate(self.solver.history());
        self.step += 1;
        Ok(x_prev)
    }

    /// The earlier predictions with their weights.
    fn weighted(
        &self,
        op: &'static str,
        x_t: &Tensor,
        coefficients: &SolverCoefficients,
    ) -> Result<Vec<(f64, &Tensor)>> {
        let used = coefficients.x0.iter().enumerate().skip(1).filter(|(_, weight)| **weight != 0.0);
        let term = |(age, weight): (usize, &f64)| {
            let Some(Some(x0)) = self.earlier.get(age - 1) else {
                let value = format!("{weight} for the prediction of {age} steps ago");
                let expected = format!("0: step {} has no such prediction", self.step);
                return Err(ArgumentError::Value { op, name: "coefficients", value, expected });
            };
            ensure_same_shape(op, ("x_t", x_t), ("an earlier prediction", x0))?;
            Ok((*weight, x0))
        };
        Ok(used.map(term).collect::<std::result::Result<_, _>>()?)
    }

    /// Whether a later step uses the prediction of this one.
    fn is_used_later(&self) -> bool {
        (1..=self.solver.history()).any(|age| {
            let step = self.step + age;
            step < self.levels.len()
                && self.solver.coefficients(self.levels, step).weight(age) != 0.0
        })
    }

    fn ensure_next(&self, op: &'static str, estimate: &Estimate) -> Result<()> {
        let (found, expected) = match self.level() {
            None => {
                (format!("one after {} steps", self.step), "none: the run has ended".to_owned())
            }
            Some(level) if !estimate.is_at(level) => {
                (format!("at {:?}", estimate.level()), format!("at {level:?}"))
            }
            Some(_) => return Ok(()),
        };
        Err(ArgumentError::Value { op, name: "estimate", value: found, expected }.into())
    }
}
