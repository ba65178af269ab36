//! UniPC, the unified predictor and corrector.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::dpm_solver::{ensure_order, step_size};
use crate::error::Result;
use crate::noise_level::{NoiseLevels, lambda};
use crate::noise_schedule::Scale;
use crate::solver::{Solver, SolverCoefficients};

/// The settings of [`UniPc`]; the defaults are those of diffusers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UniPcConfig {
    /// The order of the predictor, 1 to 3; the corrector is of one order more. Default 2.
    pub solver_order: u32,
    /// The function `B(h)`; default bh2.
    pub solver_type: UniPcType,
    /// Whether the order falls to 1 over the last steps; default true.
    pub lower_order_final: bool,
    /// The steps, counted from 0, whose result is not corrected; default none. For large guidance scales, the first few.
    pub disable_corrector: BTreeSet<usize>,
}

/// The function `B(h)` of [`UniPc`]; spelt as in published scheduler configs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniPcType {
    /// `B(h) = h`.
    Bh1,
    /// `B(h) = exp(h) - 1`.
    Bh2,
}

impl Default for UniPcConfig {
    fn default() -> Self {
        Self {
            solver_order: 2,
            solver_type: UniPcType::Bh2,
            lower_order_final: true,
            disable_corrector: BTreeSet::new(),
        }
    }
}

/// UniPC of orders 1 to 3 for the clean data: one network call per step.
///
/// Equations 3 and 9 of [Zhao et al. 2023](https://arxiv.org/abs/2302.04867). With `h = lambda_prev - lambda_t` and
/// `lambda = ln(alpha / sigma)`, the predictor is
///
/// `x_prev = (sigma_prev / sigma_t) x_t - alpha_prev (exp(-h) - 1) x0 - alpha_prev B(-h) Σ rho_k (x0_k - x0) / r_k`
///
/// with earlier predictions `x0_k`, their distances `r_k = (lambda_k - lambda_t) / h`, and `rho` from a small system of
/// equations. When the network has been evaluated at `x_prev`, the corrector repeats the step with that prediction as one
/// more point.
///
/// Both are the same function of the state before the step. The correction is therefore a sum of predictions, and
/// [`coefficients`](Solver::coefficients) adds it to the next step: a corrected step is one weighted sum, and no state
/// is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UniPc {
    config: UniPcConfig,
}

impl UniPc {
    /// The solver with these settings.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) unless the order is 1, 2 or 3.
    pub fn new(config: UniPcConfig) -> Result<Self> {
        ensure_order(config.solver_order)?;
        Ok(Self { config })
    }

    fn order(&self, levels: &NoiseLevels, step: usize) -> usize {
        let order = (self.config.solver_order as usize).min(step.saturating_add(1));
        if self.config.lower_order_final {
            order.min(levels.len().saturating_sub(step))
        } else {
            order
        }
    }

    /// The parts of a step; `None` if it is of first order with nothing to correct: a step to clean data, which is
    /// infinite, and one between equal levels.
    fn parts(&self, levels: &NoiseLevels, step: usize) -> Option<Parts> {
        let (now, prev) = levels.pair(step);
        let h = step_size(now, prev);
        if h.is_infinite() || now == prev {
            return None;
        }
        let order = self.order(levels, step);
        let distance = |age| (lambda(levels.scale(step - age)) - lambda(now)) / h;
        let b = match self.config.solver_type {
            UniPcType::Bh1 => -h,
            UniPcType::Bh2 => (-h).exp_m1(),
        };
        // From noise without signal, the distance is infinite.
        let distances = (1..order).map(distance).take_while(|r: &f64| r.is_finite()).collect();
        Some(Parts { h, b, distances, prev })
    }
}

/// What predictor and corrector of a step have in common.
struct Parts {
    h: f64,
    /// `B(-h)`.
    b: f64,
    /// `r_k` of the earlier predictions, the newest first.
    distances: Vec<f64>,
    prev: Scale,
}

impl Parts {
    /// `rho` for points at these distances.
    fn rho(&self, distances: &[f64]) -> Vec<f64> {
        // phi_1(-h), phi_2(-h), .. times factorials, divided by B(-h): the moments that the points must reproduce.
        let hh = -self.h;
        let (mut phi, mut factorial) = (hh.exp_m1() / hh - 1.0, 1.0);
        let mut rows = Vec::new();
        for power in 0..distances.len() {
            let powers = distances.iter().map(|r| r.powi(power as i32));
            rows.push(powers.chain([phi * factorial / self.b]).collect());
            factorial *= (power + 2) as f64;
            phi = phi / hh - 1.0 / factorial;
        }
        solved(rows)
    }

    /// The weights of `x0, x0_1, ..` that the predictor adds to the step of first order.
    fn predicted(&self) -> Vec<f64> {
        let rho = match self.distances.len() {
            // Order 2 has a simpler coefficient, section 3.4 of the paper.
            1 => vec![0.5],
            _ => self.rho(&self.distances),
        };
        self.differences(&rho)
    }

    /// The weights of `x0_new, x0, x0_1, ..` that turn the predictor's result into the corrector's.
    fn correction(&self) -> Vec<f64> {
        let mut rho = match self.distances.len() {
            0 => vec![0.5],
            _ => self.rho(&[&self.distances[..], &[1.0]].concat()),
        };
        let newest = -self.prev.alpha * self.b * rho.pop().unwrap_or_default();
        let mut weights = vec![newest];
        let both = self.differences(&rho).into_iter().zip(self.predicted());
        weights.extend(both.map(|(corrected, predicted)| corrected - predicted));
        weights[1] -= newest;
        weights
    }

    /// `-alpha_prev B(-h) Σ rho_k (x0_k - x0) / r_k` as weights of `x0, x0_1, ..`.
    fn differences(&self, rho: &[f64]) -> Vec<f64> {
        let scale = -self.prev.alpha * self.b;
        let earlier = rho.iter().zip(&self.distances).map(|(rho, r)| scale * rho / r);
        let mut weights = vec![0.0];
        weights.extend(earlier);
        weights[0] = -weights.iter().sum::<f64>();
        weights
    }
}

impl Solver for UniPc {
    fn history(&self) -> usize {
        self.config.solver_order as usize
    }

    fn coefficients(&self, levels: &NoiseLevels, step: usize) -> SolverCoefficients {
        let (now, prev) = levels.pair(step);
        let mut coefficients = SolverCoefficients::first_order(now, prev);
        if let Some(parts) = self.parts(levels, step) {
            coefficients.add(&parts.predicted());
        }
        let corrects = step > 0 && !self.config.disable_corrector.contains(&(step - 1));
        let last = if corrects { self.parts(levels, step - 1) } else { None };
        if let Some(last) = last {
            let x_t = coefficients.x_t;
            let correction: Vec<f64> = last.correction().iter().map(|w| x_t * w).collect();
            coefficients.add(&correction);
        }
        coefficients
    }
}

/// The solution of a small system of equations, by elimination; the last entry of each row is its right-hand side.
fn solved(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let n = rows.len();
    for column in 0..n {
        let size = |row: &usize| rows[*row][column].abs();
        let pivot = (column..n).max_by(|a, b| size(a).total_cmp(&size(b))).unwrap_or(column);
        rows.swap(column, pivot);
        let pivot = rows[column].clone();
        for row in (0..n).filter(|row| *row != column) {
            let factor = rows[row][column] / pivot[column];
            for (entry, above) in rows[row].iter_mut().zip(&pivot) {
                *entry -= factor * above;
            }
        }
    }
    rows.iter().enumerate().map(|(i, row)| row[n] / row[i]).collect()
}
