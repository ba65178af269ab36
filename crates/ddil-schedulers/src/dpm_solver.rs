//! DPM-Solver++, the multistep solver for the clean data.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::noise_level::{NoiseLevels, lambda};
use crate::noise_schedule::Scale;
use crate::solver::{Solver, SolverCoefficients};

/// Below this number of steps, `lower_order_final` lowers the order of the last steps; diffusers' limit.
const FEW_STEPS: usize = 15;

/// The settings of [`DpmSolver`]; the defaults are those of diffusers, DPM-Solver++ (2M).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DpmSolverConfig {
    /// The number of predictions that a step uses, 1 to 3. Default 2; 1 is DDIM.
    pub solver_order: u32,
    /// How a step of second order uses the difference of two predictions; default midpoint.
    pub solver_type: DpmSolverType,
    /// Whether the last two steps of a run of fewer than 15 are at most of first and second order; default true.
    pub lower_order_final: bool,
    /// Whether the last step is of first order whatever the number of steps; default false. A step to clean data always
    /// is.
    pub euler_at_final: bool,
}

/// The variant of a second-order step of [`DpmSolver`]; spelt as in published scheduler configs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DpmSolverType {
    /// The prediction at the middle of the step, by extrapolation.
    Midpoint,
    /// The integral of the line through both predictions.
    Heun,
}

impl Default for DpmSolverConfig {
    fn default() -> Self {
        Self {
            solver_order: 2,
            solver_type: DpmSolverType::Midpoint,
            lower_order_final: true,
            euler_at_final: false,
        }
    }
}

/// DPM-Solver++ of orders 1 to 3, multistep: one network call per step.
///
/// With `lambda = ln(alpha / sigma)` and `h = lambda_prev - lambda_t`, the exact step is
/// `x_prev = (sigma_prev / sigma_t) x_t + sigma_prev ∫ exp(lambda) x0(lambda) dlambda` over the step. The solver replaces
/// `x0(lambda)` by a polynomial through the last predictions. Second order, algorithm 2 of [Lu et al.
/// 2022](https://arxiv.org/abs/2211.01095) with `r = h_last / h`:
///
/// `x_prev = (sigma_prev / sigma_t) x_t - alpha_prev (exp(-h) - 1) (x0 + (x0 - x0_last) / (2 r))`
///
/// [`Heun`](DpmSolverType::Heun) has `alpha_prev ((exp(-h) - 1) / h + 1)` as the weight of `(x0 - x0_last) / r` instead.
/// The first step, with one prediction, is of first order, which is [`Ddim`](crate::Ddim).
///
/// Third order adds the second difference, with half of its weight in a Taylor expansion: as in the authors' and in
/// diffusers' programs, whose samples it reproduces. Its error is smaller than that of second order, but falls with the
/// second power of the step size too. [`UniPc`](crate::UniPc) reaches third and fourth order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DpmSolver {
    config: DpmSolverConfig,
}

impl DpmSolver {
    /// The solver with these settings.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless the order is 1, 2 or 3.
    pub fn new(config: DpmSolverConfig) -> Result<Self> {
        ensure_order(config.solver_order)?;
        Ok(Self { config })
    }

    /// The order of a step: as many predictions as there are, and fewer at the end if so configured.
    fn order(&self, levels: &NoiseLevels, step: usize) -> usize {
        let DpmSolverConfig { lower_order_final, euler_at_final, .. } = self.config;
        let order = (self.config.solver_order as usize).min(step.saturating_add(1));
        let is_short = lower_order_final && levels.len() < FEW_STEPS;
        match levels.len().saturating_sub(step) {
            1 if euler_at_final || is_short => 1,
            2 if is_short => order.min(2),
            _ => order,
        }
    }
}

/// Checks the order of a solver.
pub(crate) fn ensure_order(order: u32) -> Result<()> {
    if (1..=3).contains(&order) {
        return Ok(());
    }
    Err(Error::Invalid(Invalid::new("solver_order", order, "1, 2 or 3")))
}

/// `h` of a step.
pub(crate) fn step_size(now: Scale, prev: Scale) -> f64 {
    lambda(prev) - lambda(now)
}

impl Solver for DpmSolver {
    fn history(&self) -> usize {
        self.config.solver_order as usize - 1
    }

    fn coefficients(&self, levels: &NoiseLevels, step: usize) -> SolverCoefficients {
        let (now, prev) = levels.pair(step);
        let mut coefficients = SolverCoefficients::first_order(now, prev);
        let (order, h) = (self.order(levels, step), step_size(now, prev));
        // A step to clean data is infinite, one between equal levels is no step: of first order both.
        if order == 1 || h.is_infinite() || now == prev {
            return coefficients;
        }
        let decay = (-h).exp_m1();
        let slope = prev.alpha * (decay / h + 1.0);
        let size = |age: usize| step_size(levels.scale(step - age), levels.scale(step - age + 1));
        let u = h / size(1);
        if order == 2 {
            let weight = match self.config.solver_type {
                DpmSolverType::Midpoint => -0.5 * prev.alpha * decay,
                DpmSolverType::Heun => slope,
            };
            coefficients.add(&[weight * u, -weight * u]);
            return coefficients;
        }
        // Divided differences of the last three predictions, in units of `h`: `u (x0 - x0_1)` and `v (x0_1 - x0_2)`.
        let v = h / size(2);
        let total = h / (size(1) + size(2));
        let share = size(1) / (size(1) + size(2));
        let curvature = -prev.alpha * ((decay + h) / h.powi(2) - 0.5);
        let first = slope * (1.0 + share) + curvature * total;
        let second = slope * share + curvature * total;
        coefficients.add(&[first * u, -first * u - second * v, second * v]);
        coefficients
    }
}

impl SolverCoefficients {
    /// Adds to the weights of predictions.
    pub(crate) fn add(&mut self, weights: &[f64]) {
        self.x0.resize(self.x0.len().max(weights.len()), 0.0);
        for (x0, weight) in self.x0.iter_mut().zip(weights) {
            *x0 += weight;
        }
    }
}
