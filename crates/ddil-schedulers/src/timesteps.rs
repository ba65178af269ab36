//! The timesteps of a run of `n` steps.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::noise_schedule::MAX_TRAIN_TIMESTEPS;

/// How `n` timesteps are spread over the training grid; spelt as in published scheduler configs.
///
/// Table 2 of [Lin et al. 2023](https://arxiv.org/abs/2305.08891).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// Multiples of `num_train_timesteps / n`, plus an offset; never reaches the noisiest timestep.
    Leading,
    /// Evenly from the noisiest timestep to 0, both included.
    Linspace,
    /// From the noisiest timestep down in even steps; recommended for few steps.
    Trailing,
}

/// The timestep at the end of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreviousTimestep {
    /// The next entry of the grid, and clean data after the last.
    #[default]
    NextInGrid,
    /// `num_train_timesteps / n` less (integer division), clean data where that is negative: diffusers' rule.
    /// It leaves the grid for `linspace`, and wherever `n` does not divide `num_train_timesteps`.
    Stride,
}

/// The timesteps of a run, strictly decreasing from the noisiest, and the end of each step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timesteps {
    timesteps: Vec<i64>,
    prev: Vec<i64>,
}

impl Timesteps {
    /// `n` timesteps spread over `num_train_timesteps`; `steps_offset` applies only to leading spacing.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `1 <= n <= num_train_timesteps`, or if the offset leaves the grid.
    pub fn spaced(
        spacing: TimestepSpacing,
        num_train_timesteps: u32,
        n: u32,
        steps_offset: u32,
    ) -> Result<Self> {
        ensure_num_inference_steps(n, num_train_timesteps)?;
        let (total, n) = (i64::from(num_train_timesteps), i64::from(n));
        let list = match spacing {
            TimestepSpacing::Leading => {
                let stride = total / n;
                (0..n).rev().map(|j| stride * j + i64::from(steps_offset)).collect()
            }
            TimestepSpacing::Linspace => linspace(total, n),
            TimestepSpacing::Trailing => {
                (1..=n).rev().map(|i| divide_half_even(total * i, n) - 1).collect()
            }
        };
        Self::explicit(list, num_train_timesteps)
    }

    /// The timesteps of diffusers' `DDIMScheduler`: its list, and its rule for the end of each step
    /// ([`PreviousTimestep::Stride`]).
    ///
    /// The lists differ from [`spaced`](Self::spaced) where diffusers computes timesteps in floating point: entries at
    /// one half are rounded to either side (linspace from `n` = 27, trailing from 48), and some trailing lists (61 is
    /// the first) have one more entry, timestep -1, which is omitted here. A single linspace timestep is 0 in
    /// diffusers, where there is almost no noise to remove.
    ///
    /// # Errors
    ///
    /// As [`spaced`](Self::spaced).
    pub fn diffusers(
        spacing: TimestepSpacing,
        num_train_timesteps: u32,
        n: u32,
        steps_offset: u32,
    ) -> Result<Self> {
        let exact = Self::spaced(spacing, num_train_timesteps, n, steps_offset)?;
        let total = f64::from(num_train_timesteps);
        let round = |t: f64| t.round_ties_even() as i64;
        let list = match spacing {
            TimestepSpacing::Leading => exact.timesteps,
            TimestepSpacing::Linspace if n == 1 => vec![0],
            TimestepSpacing::Linspace => {
                let stride = (total - 1.0) / f64::from(n - 1);
                (0..n).rev().map(|i| round(f64::from(i) * stride)).collect()
            }
            TimestepSpacing::Trailing => {
                // `numpy.arange` adds multiples of the rounded difference of its first two values.
                let stride = (total - total / f64::from(n)) - total;
                (0..n).map(|i| round(total + f64::from(i) * stride) - 1).collect()
            }
        };
        let grid = Self::explicit(list, num_train_timesteps)?;
        Ok(grid.with_previous(PreviousTimestep::Stride, num_train_timesteps))
    }

    /// The grid of latent consistency models: every n-th of the teacher's `original_steps`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `1 <= n <= original_steps <= num_train_timesteps`.
    pub fn lcm(num_train_timesteps: u32, original_steps: u32, n: u32) -> Result<Self> {
        ensure_num_inference_steps(original_steps, num_train_timesteps)?;
        ensure_num_inference_steps(n, original_steps)?;
        let stride = i64::from(num_train_timesteps / original_steps);
        let original: Vec<i64> =
            (1..=i64::from(original_steps)).rev().map(|j| j * stride - 1).collect();
        let list = (0..n as usize).map(|j| original[j * original.len() / n as usize]).collect();
        Self::explicit(list, num_train_timesteps)
    }

    /// An explicit list, noisiest first.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless the list is not empty, strictly decreasing and on the grid.
    pub fn explicit(timesteps: Vec<i64>, num_train_timesteps: u32) -> Result<Self> {
        let falls = timesteps.windows(2).all(|pair| pair[0] > pair[1]);
        let num_train_timesteps = num_train_timesteps.min(MAX_TRAIN_TIMESTEPS);
        let on_grid = |t: &i64| (0..i64::from(num_train_timesteps)).contains(t);
        if timesteps.is_empty() || !falls || !timesteps.iter().all(on_grid) {
            return Err(Error::Invalid(Invalid::new(
                "timesteps",
                shown(&timesteps),
                format!("at least one, strictly falling, each in 0..{num_train_timesteps}"),
            )));
        }
        let prev = timesteps.iter().skip(1).copied().chain([-1]).collect();
        Ok(Self { timesteps, prev })
    }

    /// The same timesteps with another rule for the end of each step.
    #[must_use]
    pub fn with_previous(mut self, rule: PreviousTimestep, num_train_timesteps: u32) -> Self {
        let stride = i64::from(num_train_timesteps) / self.timesteps.len() as i64;
        self.prev = match rule {
            PreviousTimestep::NextInGrid => {
                self.timesteps.iter().skip(1).copied().chain([-1]).collect()
            }
            PreviousTimestep::Stride => {
                self.timesteps.iter().map(|t| (t - stride).max(-1)).collect()
            }
        };
        self
    }

    /// The timesteps, noisiest first.
    pub fn as_slice(&self) -> &[i64] {
        &self.timesteps
    }

    /// Number of network calls per sample.
    pub fn len(&self) -> usize {
        self.timesteps.len()
    }

    /// Never true: a grid has at least one timestep.
    pub fn is_empty(&self) -> bool {
        self.timesteps.is_empty()
    }

    /// Each timestep with the timestep at the end of its step; -1 is clean data.
    pub fn pairs(&self) -> impl ExactSizeIterator<Item = (i64, i64)> + '_ {
        self.timesteps.iter().copied().zip(self.prev.iter().copied())
    }

    /// Divides each interval of the grid into `substeps` even parts, for a teacher with finer steps; the timesteps of
    /// this grid are kept.
    ///
    /// A trailing grid of `n` timesteps becomes the trailing grid of `n substeps`; any other is divided between
    /// neighbours, with halves rounded to even.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if `substeps` is 0 or an interval has fewer timesteps than parts.
    pub fn refined(&self, substeps: u32, num_train_timesteps: u32) -> Result<Self> {
        let too_many = || {
            Error::Invalid(Invalid::new(
                "substeps",
                substeps,
                format!(
                    "at least 1 and at most the number of timesteps between neighbours of the grid {}",
                    shown(&self.timesteps)
                ),
            ))
        };
        let trailing = |n| Self::spaced(TimestepSpacing::Trailing, num_train_timesteps, n, 0);
        // More substeps than timesteps cannot be strictly decreasing; checked first to save memory.
        if self.timesteps.len() as u64 * u64::from(substeps) > num_train_timesteps.into() {
            return Err(too_many());
        }
        let n = self.timesteps.len() as u32;
        if trailing(n).is_ok_and(|grid| grid.timesteps == self.timesteps) {
            return n
                .checked_mul(substeps)
                .map_or_else(|| Err(too_many()), trailing)
                .map_err(|_| too_many());
        }
        let parts = i64::from(substeps);
        let list = self.timesteps.iter().zip(self.timesteps.iter().skip(1).chain([&-1]));
        // Counted from 1, as in the rounding of trailing grids.
        let cut = |(from, to): (&i64, &i64)| {
            let (from, to) = (from + 1, to + 1);
            (0..parts).map(move |k| divide_half_even(from * parts - (from - to) * k, parts) - 1)
        };
        Self::explicit(list.flat_map(cut).collect(), num_train_timesteps).map_err(|_| too_many())
    }
}

/// A list, or the start of a long one.
fn shown(timesteps: &[i64]) -> String {
    const SHOWN: usize = 16;
    match timesteps.split_at_checked(SHOWN) {
        Some((first, rest)) if !rest.is_empty() => format!("{first:?} and {} more", rest.len()),
        _ => format!("{timesteps:?}"),
    }
}

fn ensure_num_inference_steps(n: u32, most: u32) -> Result<()> {
    let most = most.min(MAX_TRAIN_TIMESTEPS);
    if (1..=most).contains(&n) {
        return Ok(());
    }
    Err(Error::Invalid(Invalid::new("num_inference_steps", n, format!("in 1..={most}"))))
}

fn linspace(total: i64, n: i64) -> Vec<i64> {
    if n == 1 {
        // numpy's linspace of one value is its start; only the noisiest timestep is sensible.
        return vec![total - 1];
    }
    (0..n).rev().map(|i| divide_half_even((total - 1) * i, n - 1)).collect()
}

/// `round(numerator / denominator)` in integers, with halves to even as in numpy: a floating-point grid loses or gains
/// an entry for some `n`.
pub(crate) fn divide_half_even(numerator: i64, denominator: i64) -> i64 {
    let (quotient, rest) = (numerator.div_euclid(denominator), numerator.rem_euclid(denominator));
    match (2 * rest).cmp(&denominator) {
        std::cmp::Ordering::Less => quotient,
        std::cmp::Ordering::Greater => quotient + 1,
        std::cmp::Ordering::Equal => quotient + quotient.rem_euclid(2),
    }
}
