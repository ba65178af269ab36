//! Runs a denoiser from noise to samples, with the states on the way.

mod legs;
mod mixed;
mod solver;
mod step;

pub(crate) use legs::ensure_part_of;
pub use mixed::{MixedRollout, MixedVariant, Visited};
pub use solver::SolverRollout;
pub(crate) use step::sampler_step;

use ddil_libtorch::{Generator, ensure_real};
use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Sampler, Timesteps};
use tch::Tensor;

use self::legs::ensure_ready;
use self::step::{Fresh, step_at};
use crate::conditioning::Conditioning;
use crate::denoiser::Denoiser;
use crate::error::Result;

/// The states that a denoiser visits from noise to a sample.
#[derive(Debug)]
#[non_exhaustive]
pub struct Trajectory {
    /// The state at each of `timesteps`, `[batch, ..]`, noisiest first.
    pub states: Vec<Tensor>,
    /// The timesteps of the states.
    pub timesteps: Timesteps,
    /// The sample at the end, `[batch, ..]`.
    pub x0: Tensor,
    /// The conditioning of every call.
    pub conditioning: Conditioning,
}

/// The state that a trajectory starts in: unit noise on a variance-preserving schedule, `sigma noise` on others.
///
/// Unit noise even if the schedule's last `sigma` is below 1, as samplers use it at inference.
///
/// # Errors
///
/// [`Error::Scheduler`](crate::Error::Scheduler) if `timestep` is off the grid,
/// [`Error::Argument`](crate::Error::Argument) if `noise` is not of floating point.
pub fn first_state(schedule: &NoiseSchedule, timestep: i64, noise: &Tensor) -> Result<Tensor> {
    ensure_real("first_state", "noise", noise)?;
    match schedule.config() {
        NoiseScheduleConfig::Vp(_) => Ok(noise.shallow_clone()),
        _ => Ok(noise * schedule.scale_at(timestep)?.sigma),
    }
}

/// Runs a denoiser and a sampler from noise to a sample, without gradients.
///
/// [`sample`](Self::sample) returns the sample alone, [`run`](Self::run) the states on the way as well. For DPM-Solver++
/// and UniPC, see [`SolverRollout`].
///
/// # Example
///
/// ```
/// use ddil_core::{FnDenoiser, Rollout};
/// use ddil_schedulers::{Ddim, NoiseScheduleConfig, PredictionType, TimestepSpacing, Timesteps};
/// use tch::{Tensor, kind};
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let sampler = Ddim::new(schedule.clone());
/// let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// // A network that estimates all data as 0.
/// let teacher = FnDenoiser::new(schedule, PredictionType::Sample, |x_t, _timesteps, _conditioning| Ok(x_t.zeros_like()));
///
/// let noise = Tensor::ones([2, 3], kind::FLOAT_CPU);
/// let sample = Rollout::new(&teacher, &sampler, &timesteps).sample(noise.shallow_clone())?;
/// assert_eq!(sample.abs().max().double_value(&[]), 0.0);
///
/// // The states at two of the four timesteps.
/// let kept = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 2, 0)?;
/// let trajectory = Rollout::new(&teacher, &sampler, &timesteps).keep(&kept).run(noise)?;
/// assert_eq!(trajectory.states.len(), 2);
/// # Ok::<(), ddil_core::Error>(())
/// ```
pub struct Rollout<'a> {
    denoiser: &'a dyn Denoiser,
    sampler: &'a dyn Sampler,
    timesteps: &'a Timesteps,
    conditioning: Option<&'a Conditioning>,
    fresh: Fresh<'a>,
    kept: Option<&'a Timesteps>,
}

impl<'a> Rollout<'a> {
    /// A rollout along `timesteps`, noisiest first, without conditioning and without a generator.
    pub fn new(
        denoiser: &'a dyn Denoiser,
        sampler: &'a dyn Sampler,
        timesteps: &'a Timesteps,
    ) -> Self {
        let (conditioning, fresh, kept) = (None, Fresh::OfBatch(None), None);
        Self { denoiser, sampler, timesteps, conditioning, fresh, kept }
    }

    /// Passes `conditioning` to the denoiser, parts of `batch` rows each.
    #[must_use]
    pub fn conditioning(self, conditioning: &'a Conditioning) -> Self {
        Self { conditioning: Some(conditioning), ..self }
    }

    /// Draws the noise that the sampler adds from one generator; required by samplers that add noise. `None`
    /// means no generator.
    #[must_use]
    pub fn generator(self, generator: impl Into<Option<&'a mut Generator>>) -> Self {
        Self { fresh: Fresh::OfBatch(generator.into()), ..self }
    }

    /// Draws the noise of each sample from a separate generator, on any device: a sample then does not depend on the
    /// other samples of its batch, except for rounding.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_core::{FnDenoiser, RandomStreams, Result, Rollout, Stream};
    /// use ddil_schedulers::{Lcm, NoiseScheduleConfig, PredictionType, Timesteps};
    /// use tch::{Device, Tensor, kind};
    ///
    /// let schedule = NoiseScheduleConfig::default().build()?;
    /// let timesteps = Timesteps::lcm(1000, 50, 2)?;
    /// let sampler = Lcm::new(schedule.clone());
    /// let model = FnDenoiser::new(schedule, PredictionType::Sample, |x_t, _timesteps, _conditioning| Ok(x_t.shallow_clone()));
    ///
    /// let streams = RandomStreams::new(0, 0);
    /// let run = |rows: std::ops::Range<u64>| {
    ///     let noise = Tensor::zeros([rows.end as i64 - rows.start as i64, 3], kind::FLOAT_CPU);
    ///     let generators = rows.map(|row| streams.generator(row, Stream::Sample, Device::Cpu));
    ///     let mut generators = generators.collect::<Result<Vec<_>>>()?;
    ///     Rollout::new(&model, &sampler, &timesteps).generators(&mut generators).sample(noise)
    /// };
    /// assert_eq!(run(0..3)?.get(2), run(2..3)?.get(0));
    /// # Ok::<(), ddil_core::Error>(())
    /// ```
    #[must_use]
    pub fn generators(self, generators: &'a mut [Generator]) -> Self {
        Self { fresh: Fresh::OfEach(generators), ..self }
    }

    /// Keeps the states at `kept` instead of all: for a teacher that takes finer steps than its student, those on the
    /// student's grid.
    #[must_use]
    pub fn keep(self, kept: &'a Timesteps) -> Self {
        Self { kept: Some(kept), ..self }
    }

    /// Runs from noise to a sample and keeps the states on the way.
    ///
    /// # Shapes and units
    ///
    /// - `noise`: `[batch, ..]`, unit normal; becomes the first state, see [`first_state`]
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`](crate::Error::Scheduler) if the sampler requires noise and there is no generator;
    /// [`Error::Argument`](crate::Error::Argument) or [`Error::Conditioning`](crate::Error::Conditioning) if the
    /// arguments do not fit each other; [`Error::Invalid`](crate::Error::Invalid) if a timestep to [`keep`](Self::keep)
    /// is not visited; the errors of the denoiser.
    pub fn run(self, noise: Tensor) -> Result<Trajectory> {
        let kept = self.kept.unwrap_or(self.timesteps).clone();
        ensure_part_of("timesteps", &kept, self.timesteps)?;
        let conditioning = self.conditioning.map(Conditioning::shallow_clone).unwrap_or_default();
        let mut states = Vec::with_capacity(kept.len());
        let x0 = self.run_steps(noise, |timestep, x_t| {
            if kept.as_slice().contains(&timestep) {
                states.push(x_t.shallow_clone());
            }
        })?;
        Ok(Trajectory { states, timesteps: kept, x0, conditioning })
    }

    /// Runs from noise to a sample and returns only the sample.
    ///
    /// # Shapes and units
    ///
    /// - `noise`: as for [`run`](Self::run)
    /// - returns: `[batch, ..]`, data scale
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn sample(self, noise: Tensor) -> Result<Tensor> {
        self.run_steps(noise, |_, _| {})
    }

    /// Runs over the whole grid and passes every state to `visit`.
    fn run_steps(mut self, noise: Tensor, mut visit: impl FnMut(i64, &Tensor)) -> Result<Tensor> {
        const OP: &str = "Rollout";
        let _no_grad = tch::no_grad_guard();
        let none = Conditioning::none();
        let conditioning = self.conditioning.unwrap_or(&none);
        ensure_ready(OP, self.sampler, &noise, conditioning, self.fresh.can_draw())?;
        self.fresh.ensure_batch(OP, self.sampler, &noise)?;
        let mut x_t = first_state(self.denoiser.schedule(), self.timesteps.as_slice()[0], &noise)?;
        // So that the first step may reuse its memory, if nothing else refers to it.
        drop(noise);
        for (timestep, prev) in self.timesteps.pairs() {
            visit(timestep, &x_t);
            let actor = (self.denoiser, self.sampler);
            x_t = step_at(actor, x_t, (timestep, prev), conditioning, &mut self.fresh)?;
        }
        Ok(x_t)
    }
}

impl std::fmt::Debug for Rollout<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rollout")
            .field("sampler", &self.sampler)
            .field("timesteps", self.timesteps)
            .field("kept", &self.kept)
            .finish_non_exhaustive()
    }
}
