//! The learning rate as a function of the step.

use std::f64::consts::PI;

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The learning rate of every step: a linear warm-up to a peak, then a decay over the rest of the run.
///
/// # Example
///
/// ```
/// use ddil_trainer::{Decay, LrSchedule};
///
/// let schedule = LrSchedule::default().with(|config| {
///     config.peak = 1e-4;
///     config.warmup_steps = 100;
///     config.decay = Decay::Linear;
///     config.end = 0.0;
/// });
/// assert_eq!(schedule.lr_at(49, 1100), 0.5e-4);
/// assert_eq!(schedule.lr_at(100, 1100), 1e-4);
/// assert_eq!(schedule.lr_at(600, 1100), 0.5e-4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LrSchedule {
    /// The highest learning rate; 1e-4 by default.
    pub peak: f64,
    /// Number of warm-up steps; 0 by default.
    pub warmup_steps: u64,
    /// The decay after the warm-up; constant by default.
    pub decay: Decay,
    /// The learning rate at the end of the decay, one step after the last; 0 by default.
    pub end: f64,
}

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// No decay.
    #[default]
    Constant,
    /// Linear.
    Linear,
    /// Half a period of a cosine.
    Cosine,
}

impl Default for LrSchedule {
    fn default() -> Self {
        Self { peak: 1e-4, warmup_steps: 0, decay: Decay::Constant, end: 0.0 }
    }
}

impl LrSchedule {
    /// The same settings with a change: `LrSchedule::default().with(|config| config.peak = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `0 <= end <= peak`, all finite.
    pub fn ensure_valid(&self) -> Result<()> {
        let Self { peak, end, .. } = *self;
        if 0.0 <= end && end <= peak && peak.is_finite() {
            return Ok(());
        }
        Err(Error::Invalid(Invalid::new(
            "peak, end",
            format!("{peak}, {end}"),
            "finite, not negative, and the end not above the peak",
        )))
    }

    /// The learning rate of a step, counted from 0, in a run of `num_steps`.
    ///
    /// With `w` warm-up steps it is `peak (step + 1) / w` before step `w`, so that no step has a learning rate of 0.
    /// From there, with `p = (step - w) / (num_steps - w)`, it is `peak`, `peak + (end - peak) p` or
    /// `end + (peak - end) (1 + cos(pi p)) / 2`. Past the last step it stays at `end`.
    pub fn lr_at(&self, step: u64, num_steps: u64) -> f64 {
        let Self { peak, warmup_steps, decay, end } = *self;
        if step < warmup_steps {
            return peak * (step + 1) as f64 / warmup_steps as f64;
        }
        let rest = num_steps.saturating_sub(warmup_steps).max(1);
        let progress = ((step - warmup_steps) as f64 / rest as f64).min(1.0);
        match decay {
            Decay::Constant => peak,
            Decay::Linear => peak + (end - peak) * progress,
            Decay::Cosine => end + (peak - end) * 0.5 * (1.0 + (PI * progress).cos()),
        }
    }
}
