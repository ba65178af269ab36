//! Settings of solvers: the method, and the noise levels of a run.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config_file::CommonConfig;
use crate::dpm_solver::{DpmSolver, DpmSolverConfig};
use crate::error::{Error, Result};
use crate::noise_level::{NoiseLevel, NoiseLevels, lambda, with_signal};
use crate::noise_schedule::{BetaSchedule, NoiseSchedule, NoiseScheduleConfig, Scale, VpConfig};
use crate::solver::{Euler, Solver};
use crate::timesteps::{TimestepSpacing, Timesteps, divide_half_even};
use crate::uni_pc::{UniPc, UniPcConfig};

/// The settings of a solver for teachers: its method and its noise levels.
///
/// Defaults, timesteps and noise levels are those of diffusers' `EulerDiscreteScheduler`, `DPMSolverMultistepScheduler`
/// and `UniPCMultistepScheduler`; the same noise gives the same samples.
///
/// # Example
///
/// ```
/// use ddil_schedulers::{NoiseScheduleConfig, SolverConfig};
///
/// let text = r#"{"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": true}"#;
/// let config = SolverConfig::from_json(text)?.ok_or("a solver of this crate")?;
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let (solver, levels) = (config.build()?, config.levels(&schedule, 8)?);
/// assert_eq!((solver.history(), levels.len()), (2, 8));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SolverConfig {
    /// The method.
    pub method: SolverMethod,
    /// Where the network is evaluated.
    #[serde(default)]
    pub levels: LevelsConfig,
}

/// The method of a solver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SolverMethod {
    /// [`Euler`].
    Euler,
    /// [`DpmSolver`].
    DpmSolver(DpmSolverConfig),
    /// [`UniPc`].
    UniPc(UniPcConfig),
}

/// Where a solver evaluates the network; the defaults are those of diffusers' solvers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LevelsConfig {
    /// How the timesteps are spread over the training grid; default linspace.
    ///
    /// [`Euler`] spreads them as [`Timesteps`] does, with fractions of timesteps for linspace. The other methods omit
    /// the last of one timestep more for linspace and leading, as if the end of the run were one of them.
    pub timestep_spacing: TimestepSpacing,
    /// Added to the timesteps of leading spacing; default 0.
    pub steps_offset: u32,
    /// Whether noise levels are spaced evenly in the 7th root of `sigma / alpha`, equation 5 of [Karras et al.
    /// 2022](https://arxiv.org/abs/2206.00364), between the largest and the smallest of the schedule; default false. For
    /// variance-preserving schedules.
    pub use_karras_sigmas: bool,
    /// The noise at the end of a run; default zero.
    pub final_sigmas_type: FinalSigma,
    /// The smallest `ln(alpha / sigma)` of a run of [`DpmSolver`]: timesteps are spread over those above; default none.
    pub lambda_min_clipped: Option<f64>,
}

/// The noise at the end of a run; spelt as in published scheduler configs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigma {
    /// None: the run ends on clean data.
    Zero,
    /// That of timestep 0.
    SigmaMin,
}

impl Default for LevelsConfig {
    fn default() -> Self {
        Self {
            timestep_spacing: TimestepSpacing::Linspace,
            steps_offset: 0,
            use_karras_sigmas: false,
            final_sigmas_type: FinalSigma::Zero,
            lambda_min_clipped: None,
        }
    }
}

impl SolverConfig {
    /// Euler with diffusers' defaults.
    pub fn euler() -> Self {
        Self { method: SolverMethod::Euler, levels: LevelsConfig::default() }
    }

    /// DPM-Solver++ (2M) with diffusers' defaults.
    pub fn dpm_solver() -> Self {
        let method = SolverMethod::DpmSolver(DpmSolverConfig::default());
        Self { method, levels: LevelsConfig::default() }
    }

    /// UniPC of second order with diffusers' defaults.
    pub fn uni_pc() -> Self {
        let method = SolverMethod::UniPc(UniPcConfig::default());
        Self { method, levels: LevelsConfig::default() }
    }

    /// The same with the spacing and offset of another scheduler's file, which diffusers' `from_config` also takes over.
    #[must_use]
    pub fn spaced_as(mut self, common: &CommonConfig) -> Self {
        self.levels.timestep_spacing = common.timestep_spacing;
        self.levels.steps_offset = common.steps_offset;
        self
    }

    /// The same on Karras' noise levels.
    #[must_use]
    pub fn with_karras_sigmas(mut self) -> Self {
        self.levels.use_karras_sigmas = true;
        self
    }

    /// Builds the solver.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an order that is not 1, 2 or 3.
    pub fn build(&self) -> Result<Box<dyn Solver>> {
        Ok(match &self.method {
            SolverMethod::Euler => Box::new(Euler),
            SolverMethod::DpmSolver(config) => Box::new(DpmSolver::new(config.clone())?),
            SolverMethod::UniPc(config) => Box::new(UniPc::new(config.clone())?),
        })
    }

    /// The noise levels of a run of `steps` steps.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a number of steps or an offset that leaves the training grid, and for Karras' levels on a
    /// schedule that is not variance preserving.
    pub fn levels(&self, schedule: &NoiseSchedule, steps: u32) -> Result<NoiseLevels> {
        let grid = Grid::new(schedule);
        let timesteps = self.timesteps(&grid, steps)?;
        let mut levels: Vec<NoiseLevel> =
            timesteps.iter().map(|t| NoiseLevel { timestep: *t, scale: grid.scale(*t) }).collect();
        if self.levels.use_karras_sigmas {
            levels = self.karras_levels(&grid, &levels)?;
        }
        let end = match self.levels.final_sigmas_type {
            FinalSigma::Zero => Scale::CLEAN,
            FinalSigma::SigmaMin => grid.scale(0.0),
        };
        let last = levels[levels.len() - 1].scale;
        // Equal up to rounding: a step that stays.
        let stays = (lambda(last) - lambda(end)).abs() < 1e-9;
        let initial = self.initial(&grid, levels[0].scale);
        Ok(NoiseLevels::new(levels, if stays { last } else { end }, initial))
    }

    /// The factor of unit noise in the first state.
    fn initial(&self, grid: &Grid<'_>, first: Scale) -> f64 {
        let leads = self.levels.timestep_spacing == TimestepSpacing::Leading;
        match self.method {
            SolverMethod::Euler if !leads => first.sigma,
            _ if grid.is_vp() => 1.0,
            _ => first.sigma,
        }
    }

    /// The timesteps of a run, noisiest first; fractions for Euler with linspace.
    fn timesteps(&self, grid: &Grid<'_>, steps: u32) -> Result<Vec<f64>> {
        let LevelsConfig { timestep_spacing: spacing, steps_offset, .. } = self.levels;
        let total = grid.schedule.num_train_timesteps() as u32;
        let is_euler = self.method == SolverMethod::Euler;
        if is_euler && spacing == TimestepSpacing::Linspace && steps > 1 && grid.is_vp() {
            Timesteps::spaced(spacing, total, steps, 0)?;
            let stride = f64::from(total - 1) / f64::from(steps - 1);
            return Ok((0..steps).rev().map(|i| f64::from(i) * stride).collect());
        }
        let timesteps = match spacing {
            _ if is_euler => Timesteps::spaced(spacing, total, steps, steps_offset)?,
            TimestepSpacing::Trailing if grid.clipped(self.lambda_min()) == 0 => {
                Timesteps::spaced(spacing, total, steps, 0)?
            }
            _ => Timesteps::explicit(self.with_end_omitted(grid, steps)?, total)?,
        };
        Ok(timesteps.as_slice().iter().map(|t| *t as f64).collect())
    }

    /// The timesteps of DPM-Solver and UniPC, from the noisiest above the smallest `lambda` on.
    fn with_end_omitted(&self, grid: &Grid<'_>, steps: u32) -> Result<Vec<i64>> {
        let total = grid.schedule.num_train_timesteps();
        let last = total - grid.clipped(self.lambda_min());
        let (most, n) = ((last - 1).max(0), i64::from(steps));
        if !(1..=most).contains(&n) {
            let expected = format!("in 1..={most}");
            return Err(Error::Invalid(Invalid::new("num_inference_steps", steps, expected)));
        }
        Ok(match self.levels.timestep_spacing {
            TimestepSpacing::Linspace => {
                (1..=n).rev().map(|i| divide_half_even((last - 1) * i, n)).collect()
            }
            TimestepSpacing::Leading => {
                let stride = last / (n + 1);
                (1..=n).rev().map(|i| i * stride + i64::from(self.levels.steps_offset)).collect()
            }
            TimestepSpacing::Trailing => {
                // From `last` down by `total / n`: fewer steps than asked for if levels are clipped.
                (0..n)
                    .map(|i| divide_half_even(last * n - i * total, n) - 1)
                    .take_while(|t| *t >= 0)
                    .collect()
            }
        })
    }

    /// The smallest `lambda`; DPM-Solver's alone.
    fn lambda_min(&self) -> f64 {
        let is_dpm = matches!(self.method, SolverMethod::DpmSolver(_));
        self.levels.lambda_min_clipped.filter(|_| is_dpm).unwrap_or(f64::NEG_INFINITY)
    }

    /// As many levels as `levels`, spaced by equation 5 of Karras et al. with `rho = 7`.
    fn karras_levels(&self, grid: &Grid<'_>, levels: &[NoiseLevel]) -> Result<Vec<NoiseLevel>> {
        const RHO: f64 = 7.0;
        if !grid.is_vp() {
            let expected = "false: the schedule is not variance preserving";
            return Err(Error::Invalid(Invalid::new("use_karras_sigmas", true, expected)));
        }
        let sigma = |scale: Scale| scale.sigma / scale.alpha;
        // Euler's are between the levels of the run, the others' between those of the schedule.
        let [largest, smallest] = match self.method {
            SolverMethod::Euler => [levels[0].scale, levels[levels.len() - 1].scale],
            _ => [grid.scale(grid.last()), grid.scale(0.0)],
        }
        .map(|scale| sigma(scale).powf(RHO.recip()));
        let intervals = (levels.len() - 1).max(1) as f64;
        let level = |i: usize| {
            let root = largest + (smallest - largest) * (i as f64 / intervals);
            let sigma = root.powf(RHO);
            let timestep = self.rounded(grid, grid.timestep_of_sigma(sigma));
            NoiseLevel { timestep, scale: vp_scale(sigma) }
        };
        Ok((0..levels.len()).map(level).collect())
    }

    /// The timestep that the network receives for a level between two.
    fn rounded(&self, grid: &Grid<'_>, timestep: f64) -> f64 {
        match self.method {
            SolverMethod::Euler => timestep,
            // As in diffusers, which rounds down for DPM-Solver on the cosine schedule.
            SolverMethod::DpmSolver(_) if grid.is_cosine() => timestep.floor(),
            _ => timestep.round_ties_even(),
        }
    }
}

/// `alpha` and `sigma` of a variance-preserving schedule from their quotient.
fn vp_scale(karras_sigma: f64) -> Scale {
    let alpha = (1.0 + karras_sigma.powi(2)).sqrt().recip();
    Scale { alpha, sigma: karras_sigma * alpha }
}

/// A schedule between its timesteps.
struct Grid<'a> {
    schedule: &'a NoiseSchedule,
    scales: Vec<Scale>,
}

impl<'a> Grid<'a> {
    fn new(schedule: &'a NoiseSchedule) -> Self {
        let is_vp = matches!(schedule.config(), NoiseScheduleConfig::Vp(_));
        let scale = |scale: &Scale| if is_vp { with_signal(*scale) } else { *scale };
        Self { schedule, scales: schedule.scales().iter().map(scale).collect() }
    }

    fn is_vp(&self) -> bool {
        matches!(self.schedule.config(), NoiseScheduleConfig::Vp(_))
    }

    fn is_cosine(&self) -> bool {
        matches!(
            self.schedule.config(),
            NoiseScheduleConfig::Vp(VpConfig {
                beta_schedule: BetaSchedule::SquaredcosCapV2,
                trained_betas: None,
                ..
            })
        )
    }

    /// The noisiest timestep.
    fn last(&self) -> f64 {
        self.schedule.last_timestep() as f64
    }

    /// Number of timesteps, the noisiest, whose `lambda` is below `lambda_min`.
    fn clipped(&self, lambda_min: f64) -> i64 {
        self.scales.iter().filter(|scale| lambda(**scale) < lambda_min).count() as i64
    }

    /// The scale at a timestep; between two, `sigma / alpha` is interpolated, on a variance-preserving schedule.
    fn scale(&self, timestep: f64) -> Scale {
        let below = (timestep.floor().max(0.0) as usize).min(self.scales.len() - 1);
        let share = timestep - below as f64;
        let Some(above) = self.scales.get(below + 1).filter(|_| share > 0.0) else {
            return self.scales[below];
        };
        let sigma = |scale: &Scale| scale.sigma / scale.alpha;
        let (low, high) = (sigma(&self.scales[below]), sigma(above));
        vp_scale(low + (high - low) * share)
    }

    /// The timestep of a noise level: `ln(sigma / alpha)` is interpolated between timesteps.
    fn timestep_of_sigma(&self, karras_sigma: f64) -> f64 {
        let log = karras_sigma.ln();
        let log_at = |i: usize| -lambda(self.scales[i]);
        let Some(most) = self.scales.len().checked_sub(2) else { return 0.0 };
        let above = self.scales.partition_point(|scale| -lambda(*scale) <= log);
        let low = above.saturating_sub(1).min(most);
        let share = (log - log_at(low)) / (log_at(low + 1) - log_at(low));
        low as f64 + share.clamp(0.0, 1.0)
    }
}
