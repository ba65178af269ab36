//! From noise to samples with a multistep solver.

use ddil_libtorch::{ArgumentError, ensure_real};
use ddil_schedulers::{NoiseLevels, Solver, SolverRun};
use tch::Tensor;

use crate::conditioning::Conditioning;
use crate::denoiser::Denoiser;
use crate::error::Result;

/// Runs a denoiser and a multistep solver from noise to a sample, without gradients: for teachers.
///
/// The counterpart of [`Rollout`](crate::Rollout) for a [`Solver`], whose steps also use earlier predictions. The sources
/// of training states use one-step samplers, because a state that is resumed has no history.
///
/// # Example
///
/// ```
/// use ddil_core::{FnDenoiser, SolverRollout};
/// use ddil_schedulers::{NoiseScheduleConfig, PredictionType, SolverConfig};
/// use tch::{Tensor, kind};
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let config = SolverConfig::dpm_solver().with_karras_sigmas();
/// let (solver, levels) = (config.build()?, config.levels(&schedule, 10)?);
/// // A network that estimates all data as 0.
/// let teacher = FnDenoiser::new(schedule, PredictionType::Sample, |x_t, _timesteps, _conditioning| Ok(x_t.zeros_like()));
///
/// let noise = Tensor::ones([2, 3], kind::FLOAT_CPU);
/// let sample = SolverRollout::new(&teacher, &*solver, &levels).sample(noise)?;
/// assert_eq!(sample.abs().max().double_value(&[]), 0.0);
/// # Ok::<(), ddil_core::Error>(())
/// ```
pub struct SolverRollout<'a> {
    denoiser: &'a dyn Denoiser,
    solver: &'a dyn Solver,
    levels: &'a NoiseLevels,
    conditioning: Option<&'a Conditioning>,
}

impl<'a> SolverRollout<'a> {
    /// A rollout along `levels`, noisiest first, without conditioning.
    pub fn new(
        denoiser: &'a dyn Denoiser,
        solver: &'a dyn Solver,
        levels: &'a NoiseLevels,
    ) -> Self {
        Self { denoiser, solver, levels, conditioning: None }
    }

    /// Passes `conditioning` to the denoiser, parts of `batch` rows each.
    #[must_use]
    pub fn conditioning(self, conditioning: &'a Conditioning) -> Self {
        Self { conditioning: Some(conditioning), ..self }
    }

    /// Runs from noise to a sample.
    ///
    /// # Shapes and units
    ///
    /// - `noise`: `[batch, ..]`, unit normal; becomes the first state, see [`NoiseLevels::first_state`]
    /// - returns: `[batch, ..]`, data scale
    ///
    /// # Errors
    ///
    /// [`Error::Argument`](crate::Error::Argument) or [`Error::Conditioning`](crate::Error::Conditioning) if the
    /// arguments do not fit each other; the errors of the denoiser, such as
    /// [`Error::Scheduler`](crate::Error::Scheduler) for levels at which it is not defined.
    pub fn sample(self, noise: Tensor) -> Result<Tensor> {
        const OP: &str = "SolverRollout";
        let _no_grad = tch::no_grad_guard();
        ensure_real(OP, "noise", &noise)?;
        let Some(&batch) = noise.size().first() else {
            let (shape, expected) = (vec![], "[batch, ..]".to_owned());
            return Err(ArgumentError::Shape { op: OP, name: "noise", shape, expected }.into());
        };
        let none = Conditioning::none();
        let conditioning = self.conditioning.unwrap_or(&none);
        conditioning.ensure_batch(OP, batch)?;
        let mut x_t = self.levels.first_state(&noise)?;
        // So that the first step may reuse its memory, if nothing else refers to it.
        drop(noise);
        let mut run = SolverRun::new(self.solver, self.levels);
        while let Some(level) = run.level() {
            let estimate = self.denoiser.estimate(&x_t, level, conditioning)?;
            x_t = run.step(x_t, &estimate)?;
        }
        Ok(x_t)
    }
}

impl std::fmt::Debug for SolverRollout<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SolverRollout")
            .field("solver", &self.solver)
            .field("levels", self.levels)
            .finish_non_exhaustive()
    }
}
