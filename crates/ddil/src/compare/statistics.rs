//! Means over seeds and differences between arms, with their standard errors.

use serde::{Deserialize, Serialize};

/// A mean and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The number of values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// `s / sqrt(n)`, with `s` the standard deviation of the values (`n - 1` degrees of freedom); none for one value,
    /// whose spread is unknown.
    pub standard_error: Option<f64>,
}

impl Estimate {
    /// The mean of some values; none for an empty slice.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil::compare::statistics::Estimate;
    ///
    /// let estimate = Estimate::of(&[1.0, 2.0, 6.0]).ok_or("there are values")?;
    /// assert_eq!(estimate.mean, 3.0);
    /// assert_eq!(estimate.standard_error, Some((7.0_f64 / 3.0).sqrt()));
    /// assert_eq!(Estimate::of(&[5.0]).and_then(|one| one.standard_error), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let standard_error = (n > 1).then(|| (squares / (n as f64 - 1.0) / n as f64).sqrt());
        Some(Self { n, mean, standard_error })
    }

    /// The mean of `value - baseline` over pairs `(value, baseline)` that differ in nothing else.
    ///
    /// What both values of a pair have in common, such as the effect of the seed, cancels: the standard error is that
    /// of the differences, not that of two independent means.
    pub fn of_differences(pairs: &[(f64, f64)]) -> Option<Self> {
        let differences: Vec<f64> = pairs.iter().map(|(value, base)| value - base).collect();
        Self::of(&differences)
    }

    /// The distance of the mean from 0 in standard errors; none if the error is unknown, or 0 up to rounding.
    pub fn standard_errors(&self) -> Option<f64> {
        /// Values that agree to this many digits are equal.
        const ROUNDING: f64 = 1e-9;
        let least = ROUNDING * self.mean.abs();
        self.standard_error.filter(|error| *error > least).map(|error| self.mean / error)
    }

    /// As `9.33 ± 0.12`, or `9.33` without an error.
    pub fn shown(&self, decimals: usize) -> String {
        let Self { mean, standard_error, .. } = self;
        match standard_error {
            Some(error) => format!("{mean:.decimals$} ± {error:.decimals$}"),
            None => format!("{mean:.decimals$}"),
        }
    }
}
