//! Latent consistency distillation: the same prediction along the whole trajectory of the teacher.

use ddil_core::{Consistent, Denoiser, States};
use ddil_files::Invalid;
use ddil_schedulers::{ConsistencyBoundary, Ddim, NoiseSchedule, Sampler, Timesteps};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::device_table::DeviceTable;
use crate::distance::{ensure_huber_c, pseudo_huber, squared_error};
use crate::error::{Error, Result};
use crate::grid_rows::{GridRows, per_sample};
use crate::objective::{
    LossRequest, LossTerms, Networks, Objective, Requirements, ensure_one_schedule,
};
use crate::phase::Phase;

const METHOD: &str = "latent consistency distillation";

/// The network whose predicted clean data the solver steps with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Solver {
    /// The teacher.
    #[default]
    Teacher,
    /// The moving average of the student, without its boundary condition: self-distillation without a teacher.
    Target,
}

/// The distance between the student's estimate and the target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ConsistencyDistance {
    /// [`pseudo_huber`], element by element.
    Huber {
        /// The difference, in data scale, at which it turns from quadratic to linear; default 0.001.
        #[serde(default = "default_huber_c")]
        c: f64,
    },
    // Braces: for a unit variant, serde would ignore unknown keys.
    /// [`squared_error`].
    L2 {},
}

fn default_huber_c() -> f64 {
    1e-3
}

impl Default for ConsistencyDistance {
    fn default() -> Self {
        Self::Huber { c: default_huber_c() }
    }
}

impl ConsistencyDistance {
    fn between(self, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        match self {
            Self::Huber { c } => pseudo_huber(prediction, target, c),
            Self::L2 {} => squared_error(prediction, target),
        }
    }
}

/// The settings of [`LatentConsistency`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LatentConsistencyConfig {
    /// Number of timesteps of the solver, at which the student is trained; default 50.
    pub num_ddim_timesteps: u32,
    /// The network of the solver's step; default the teacher.
    pub solver: Solver,
    /// The distance to the target; default pseudo-Huber with `c = 0.001`.
    pub loss: ConsistencyDistance,
    /// Decay of the moving average that computes the target; default 0.95.
    pub ema_decay: f64,
    /// Factor of the timestep in the boundary condition; default 10.
    pub timestep_scaling: f64,
    /// Assumed standard deviation of the data in the boundary condition; default 0.5.
    pub sigma_data: f64,
}

impl Default for LatentConsistencyConfig {
    fn default() -> Self {
        let ConsistencyBoundary { sigma_data, timestep_scaling } = ConsistencyBoundary::default();
        Self {
            num_ddim_timesteps: 50,
            solver: Solver::default(),
            loss: ConsistencyDistance::default(),
            ema_decay: 0.95,
            timestep_scaling,
            sigma_data,
        }
    }
}

impl LatentConsistencyConfig {
    /// The same settings with a change: `LatentConsistencyConfig::default().with(|config| config.ema_decay = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The boundary condition around the student.
    pub fn boundary(&self) -> ConsistencyBoundary {
        ConsistencyBoundary { sigma_data: self.sigma_data, timestep_scaling: self.timestep_scaling }
    }

    /// Every n-th of the solver's timesteps.
    pub(crate) fn grid(&self, schedule: &NoiseSchedule, steps: u32) -> Result<Timesteps> {
        let total = schedule.num_train_timesteps() as u32;
        if !(1..=total).contains(&self.num_ddim_timesteps) {
            return Err(Error::Invalid(Invalid::new(
                "num_ddim_timesteps",
                self.num_ddim_timesteps,
                format!("in 1..={total}"),
            )));
        }
        Ok(Timesteps::lcm(total, self.num_ddim_timesteps, steps)?)
    }

    fn ensure(&self) -> Result<()> {
        if let ConsistencyDistance::Huber { c } = self.loss {
            ensure_huber_c("loss.c", c)?;
        }
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let checks = [
            (
                "ema_decay",
                self.ema_decay,
                (0.0..1.0).contains(&self.ema_decay),
                "at least 0 and below 1",
            ),
            (
                "timestep_scaling",
                self.timestep_scaling,
                positive(self.timestep_scaling),
                "positive and finite",
            ),
            ("sigma_data", self.sigma_data, positive(self.sigma_data), "positive and finite"),
        ];
        match checks.into_iter().find(|check| !check.2) {
            Some((field, value, _, expected)) => {
                Err(Error::Invalid(Invalid::new(field, value, expected)))
            }
            None => Ok(()),
        }
    }
}

/// Latent consistency distillation of [Luo et al. 2023](https://arxiv.org/abs/2310.04378): the student learns the same
/// prediction along the whole trajectory of the teacher.
///
/// From a state `x_t` of the grid the solver takes one deterministic step with the teacher's prediction `x0` to the
/// next timestep `s` of the grid:
///
/// ```text
/// x_s       = r x_t + c x0                 a step of DDIM without its epsilon
/// estimate  = c_out(t) student(x_t, t) + c_skip(t) x_t
/// target    = c_out(s) average(x_s, s) + c_skip(s) x_s
/// loss      = distance(estimate, target)
/// ```
///
/// `average` is the moving average of the student, [`Networks::target`]; the scalings are those of
/// [`ConsistencyBoundary`]. The teacher's noise estimate is not used, so the step remains valid if `x0` is thresholded.
/// Guidance is part of the networks and the states: a teacher guided at one scale
/// ([`Cfg`](crate::TeacherGuidance::Cfg)), or with the weight in each state's conditioning, which the student takes as
/// an input ([`CfgRange`](crate::TeacherGuidance::CfgRange)). Student, teacher and average receive the same weight.
///
/// The last step of the solver ends at timestep 0 and not at clean data, as in the published training code. There
/// `c_skip` is 1 and `c_out` 0, so that the target is the solver's state itself, independent of the average. This
/// anchors the student's prediction to the trajectory.
///
/// [`LossTerms::student_x0`] is the estimate with the boundary condition applied, to which the student's sampler adds
/// noise again. [`LossTerms::teacher_next`] is the teacher's `x_s`, its state at the next timestep of the *training*
/// grid; for the last entry, after which no trajectory continues, at timestep 0. A student that samples on a coarser
/// grid takes longer steps than these and cannot mix them into its trajectories. Without a teacher
/// ([`Solver::Target`]) it is `None`.
///
/// # Example
///
/// ```
/// use ddil_losses::{LatentConsistencyConfig, ObjectiveConfig};
/// use ddil_schedulers::NoiseScheduleConfig;
///
/// # fn main() -> ddil_losses::Result<()> {
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let method = ObjectiveConfig::Lcm(LatentConsistencyConfig::default());
/// // Trained at 50 timesteps, sampled at 4 of them.
/// let training = method.training_grid(&schedule, 4)?;
/// assert_eq!((training.len(), training.as_slice()[49]), (50, 19));
/// assert_eq!(method.sampling_grid(&schedule, 4)?.as_slice(), [999, 759, 499, 259]);
/// let objective = method.build(&schedule, &training)?;
/// assert_eq!(objective.requirements().target_decay, Some(0.95));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LatentConsistency {
    config: LatentConsistencyConfig,
    schedule: NoiseSchedule,
    entries: GridRows,
    /// `[grid]`, `Int64`: the timestep at which the solver's step ends.
    ends: DeviceTable,
    /// `[grid, 2]`, `Double`: `r` and `c` of the solver's step.
    coefficients: DeviceTable,
}

impl LatentConsistency {
    /// The method for a student that is trained on `grid`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the name of the setting, or if the grid contains timestep 0, where the boundary
    /// condition is the identity; [`Error::Scheduler`] if the grid is outside of the schedule.
    pub fn new(
        config: LatentConsistencyConfig,
        schedule: NoiseSchedule,
        grid: Timesteps,
    ) -> Result<Self> {
        config.ensure()?;
        if grid.as_slice().last() == Some(&0) {
            return Err(Error::Invalid(Invalid::new(
                "timesteps",
                format!("{:?}", grid.as_slice()),
                "a grid whose last timestep is above 0, where the solver's last step ends",
            )));
        }
        let ends: Vec<i64> = grid.as_slice().iter().skip(1).copied().chain([0]).collect();
        let solver = Ddim::new(schedule.clone());
        let mut coefficients = Vec::with_capacity(2 * ends.len());
        for (&t, &end) in grid.as_slice().iter().zip(&ends) {
            let step = solver.coefficients_at(t, end)?.without_epsilon(schedule.scale_at(t)?);
            coefficients.extend([step.x_t, step.x0]);
        }
        let coefficients = Tensor::from_slice(&coefficients).view([-1, 2]);
        let entries = GridRows::new(grid, schedule.num_train_timesteps());
        Ok(Self {
            config,
            schedule,
            entries,
            ends: DeviceTable::new(Tensor::from_slice(&ends)),
            coefficients: DeviceTable::new(coefficients),
        })
    }

    /// The settings.
    pub fn config(&self) -> &LatentConsistencyConfig {
        &self.config
    }

    /// The timesteps at which the student is trained.
    pub fn grid(&self) -> &Timesteps {
        self.entries.grid()
    }

    /// The networks of the solver's step and of the target.
    fn networks<'a>(
        &self,
        phase: Phase,
        networks: &Networks<'a>,
    ) -> Result<(&'a dyn Denoiser, &'a dyn Denoiser)> {
        if phase != Phase::Student {
            return Err(Error::Phase { method: METHOD, phase });
        }
        let what = "a moving average of the student as `target`";
        let target = networks.target.ok_or(Error::Missing { method: METHOD, what })?;
        let (name, solver) = match self.config.solver {
            Solver::Teacher => ("teacher", networks.teacher),
            Solver::Target => ("target", target),
        };
        let evaluated = [("student", networks.student), ("target", target), (name, solver)];
        ensure_one_schedule(&self.schedule, evaluated)?;
        Ok((solver, target))
    }

    /// One step of the solver: the timesteps at which it ends, `[batch]`, and the states there.
    fn solve(&self, states: &States, solver: &dyn Denoiser) -> Result<(Tensor, Tensor)> {
        const OP: &str = "LatentConsistency::loss";
        let rows = self.entries.of(OP, states)?;
        let ends = self.entries.look_up(OP, &self.ends, 0, &rows)?;
        let coefficients = self.entries.look_up(OP, &self.coefficients, 0, &rows)?;
        let x0 = solver.predict(&states.x_t, &states.timesteps, &states.conditioning)?.x0;
        let [keep, gain] = [0, 1].map(|i| per_sample(&coefficients.select(1, i), &x0));
        Ok((ends, keep * &states.x_t + gain * x0))
    }

    /// The student's target, and the state at the end of the solver's step.
    fn target(
        &self,
        states: &States,
        solver: &dyn Denoiser,
        target: &dyn Denoiser,
    ) -> Result<(Tensor, Tensor)> {
        let _no_grad = tch::no_grad_guard();
        let (ends, x_end) = self.solve(states, solver)?;
        let target = Consistent::new(target, self.config.boundary());
        let x0 = target.predict(&x_end, &ends, &states.conditioning)?.x0;
        Ok((x0, x_end))
    }
}

impl Objective for LatentConsistency {
    fn phases(&self, _step: u64) -> &'static [Phase] {
        &[Phase::Student]
    }

    fn requirements(&self) -> Requirements {
        Requirements {
            teacher: self.config.solver == Solver::Teacher,
            target_decay: Some(self.config.ema_decay),
            ..Requirements::default()
        }
    }

    fn loss(&self, request: &LossRequest<'_>) -> Result<LossTerms> {
        let LossRequest { phase, states, networks, .. } = *request;
        states.ensure("LatentConsistency::loss")?;
        let (solver, target) = self.networks(phase, &networks)?;
        // The target first: the memory of its networks is released before the student's graph is built.
        let (target, x_end) = self.target(states, solver, target)?;
        let States { x_t, timesteps, conditioning, .. } = states;
        let student = Consistent::new(networks.student, self.config.boundary());
        let estimate = student.predict(x_t, timesteps, conditioning)?.x0;
        Ok(LossTerms {
            per_sample: self.config.loss.between(&estimate, &target)?,
            student_x0: estimate.detach(),
            teacher_next: (self.config.solver == Solver::Teacher).then_some(x_end),
            target,
            parts: Vec::new(),
        })
    }
}
