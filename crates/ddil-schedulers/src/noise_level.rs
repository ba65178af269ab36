//! Noise levels: where a network is evaluated in a run.

use ddil_libtorch::ensure_real;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::noise_schedule::{NoiseSchedule, NoiseScheduleConfig, Scale};
use crate::timesteps::Timesteps;

/// The `alpha` of a run where a variance-preserving schedule has 0, `sqrt(2^-24)` as in diffusers: without signal,
/// `ln(alpha / sigma)` is infinite and a multistep solver has no step size.
pub(crate) const MIN_ALPHA: f64 = 0.000_244_140_625;

/// One noise level: the factors of signal and noise, and the timestep that the network receives.
///
/// A level of the training grid comes from [`NoiseSchedule::level_at`]. A level of a sampler may lie between two
/// training timesteps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseLevel {
    /// The timestep that the network receives, in training timesteps; a fraction between two of them.
    pub timestep: f64,
    /// Factors of the clean data and of the noise.
    pub scale: Scale,
}

impl NoiseLevel {
    /// The timestep, if it is a whole number.
    pub fn whole_timestep(self) -> Option<i64> {
        let nearest = self.nearest_timestep();
        (nearest as f64 == self.timestep).then_some(nearest)
    }

    /// The nearest training timestep.
    pub fn nearest_timestep(self) -> i64 {
        self.timestep.round() as i64
    }
}

impl NoiseSchedule {
    /// The level of a training timestep; -1 is the clean end.
    ///
    /// # Errors
    ///
    /// As [`scale_at`](Self::scale_at).
    pub fn level_at(&self, timestep: i64) -> Result<NoiseLevel> {
        Ok(NoiseLevel { timestep: timestep as f64, scale: self.scale_at(timestep)? })
    }

    /// The training timestep of a level, for denoisers that are defined on the training grid only.
    ///
    /// # Errors
    ///
    /// [`Error::BetweenTimesteps`] for a level between two timesteps, [`Error::TimestepOutOfRange`] beyond the grid.
    pub fn timestep_of(&self, level: NoiseLevel) -> Result<i64> {
        let between = || Error::BetweenTimesteps { timestep: level.timestep };
        let timestep = level.whole_timestep().ok_or_else(between)?;
        let scale = self.scale_at(timestep)?;
        // A run replaces an `alpha` of 0.
        let is_floor = scale.alpha == 0.0 && level.scale == with_signal(scale);
        if scale == level.scale || is_floor { Ok(timestep) } else { Err(between()) }
    }
}

/// A scale of a variance-preserving schedule, with [`MIN_ALPHA`] instead of 0.
pub(crate) fn with_signal(scale: Scale) -> Scale {
    if scale.alpha > 0.0 {
        return scale;
    }
    Scale { alpha: MIN_ALPHA, sigma: (1.0 - MIN_ALPHA.powi(2)).sqrt() }
}

/// The noise levels of a run, noisiest first, and the noise at its end.
///
/// [`SolverConfig::levels`](crate::SolverConfig::levels) returns those of diffusers' schedulers.
///
/// # Example
///
/// ```
/// use ddil_schedulers::{NoiseLevels, NoiseScheduleConfig, Scale, TimestepSpacing, Timesteps};
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// let levels = NoiseLevels::of_timesteps(&schedule, &timesteps)?;
/// assert_eq!(levels.as_slice()[1].timestep, 749.0);
/// assert_eq!(levels.scale(4), Scale::CLEAN);
/// # Ok::<(), ddil_schedulers::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseLevels {
    levels: Vec<NoiseLevel>,
    end: Scale,
    initial: f64,
}

impl NoiseLevels {
    /// Levels that a run may have: at least one, and noise that falls strictly, except in a last step that stays.
    pub(crate) fn new(levels: Vec<NoiseLevel>, end: Scale, initial: f64) -> Self {
        Self { levels, end, initial }
    }

    /// The levels of training timesteps; the end is that of the schedule.
    ///
    /// # Errors
    ///
    /// [`Error::TimestepOutOfRange`] if the timesteps are those of a longer schedule.
    pub fn of_timesteps(schedule: &NoiseSchedule, timesteps: &Timesteps) -> Result<Self> {
        let is_vp = matches!(schedule.config(), NoiseScheduleConfig::Vp(_));
        let level = |timestep: &i64| {
            let level = schedule.level_at(*timestep)?;
            let scale = if is_vp { with_signal(level.scale) } else { level.scale };
            Ok(NoiseLevel { scale, ..level })
        };
        let levels = timesteps.as_slice().iter().map(level).collect::<Result<Vec<_>>>()?;
        let initial = if is_vp { 1.0 } else { levels[0].scale.sigma };
        Ok(Self::new(levels, schedule.end(), initial))
    }

    /// The levels, noisiest first: one call of the network each.
    pub fn as_slice(&self) -> &[NoiseLevel] {
        &self.levels
    }

    /// Number of network calls per sample.
    pub fn len(&self) -> usize {
        self.levels.len()
    }

    /// Never true: a run has at least one level.
    pub fn is_empty(&self) -> bool {
        self.levels.is_empty()
    }

    /// The factors at level `index`; beyond the last level, those at the end of the run.
    pub fn scale(&self, index: usize) -> Scale {
        self.levels.get(index).map_or(self.end, |level| level.scale)
    }

    /// The factors before and after a step.
    pub(crate) fn pair(&self, step: usize) -> (Scale, Scale) {
        (self.scale(step), self.scale(step.saturating_add(1)))
    }

    /// The state in which a run starts, from unit noise of the same shape.
    ///
    /// Unit noise on a variance-preserving schedule, `sigma noise` on others. diffusers' Euler scheduler also starts
    /// from `sigma noise`, except with leading spacing.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if `noise` is not of floating point.
    pub fn first_state(&self, noise: &Tensor) -> Result<Tensor> {
        ensure_real("NoiseLevels::first_state", "noise", noise)?;
        Ok(if self.initial == 1.0 { noise.shallow_clone() } else { noise * self.initial })
    }
}

/// `ln(alpha / sigma)`, half of the log signal-to-noise ratio; infinite for clean data.
pub(crate) fn lambda(scale: Scale) -> f64 {
    scale.root_snr().ln()
}
