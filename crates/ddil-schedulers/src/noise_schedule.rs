//! Noise schedules: the amounts of signal and noise at each timestep.

use std::sync::{Arc, Mutex};

use ddil_files::Invalid;
use ddil_libtorch::{ensure_dense, ensure_same_shape, ensure_timesteps};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// How the betas of a variance-preserving schedule grow; spelt as in published scheduler configs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Evenly spaced from `beta_start` to `beta_end`; [Ho et al. 2020](https://arxiv.org/abs/2006.11239).
    Linear,
    /// Evenly spaced square roots, squared; Stable Diffusion's.
    ScaledLinear,
    /// `alpha_cumprod` follows a squared cosine, each beta at most 0.999;
    /// [Nichol and Dhariwal 2021](https://arxiv.org/abs/2102.09672). Ignores `beta_start` and `beta_end`.
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredcosCapV2,
}

/// The value of `alpha_cumprod` at the clean end, timestep -1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalAlphaCumprod {
    /// 1: the last step ends on clean data (`set_alpha_to_one` in published configs).
    One,
    /// That of timestep 0, as in Stable Diffusion's published config.
    First,
}

/// A variance-preserving schedule on discrete timesteps; the defaults are Stable Diffusion 1.5.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VpConfig {
    /// Number of timesteps the teacher was trained with, at most [`MAX_TRAIN_TIMESTEPS`]; default 1000.
    pub num_train_timesteps: u32,
    /// How the betas grow; default `scaled_linear`.
    pub beta_schedule: BetaSchedule,
    /// The first beta; default 0.00085.
    pub beta_start: f64,
    /// The last beta; default 0.012.
    pub beta_end: f64,
    /// An explicit list of betas instead of the three settings above; default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_betas: Option<Vec<f64>>,
    /// Whether the last timestep is rescaled to contain no signal; default false. Algorithm 1 of [Lin et al.
    /// 2023](https://arxiv.org/abs/2305.08891).
    pub rescale_betas_zero_snr: bool,
    /// The value of `alpha_cumprod` at the clean end; default one.
    pub final_alpha_cumprod: FinalAlphaCumprod,
}

impl Default for VpConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_schedule: BetaSchedule::ScaledLinear,
            beta_start: 0.000_85,
            beta_end: 0.012,
            trained_betas: None,
            rescale_betas_zero_snr: false,
            final_alpha_cumprod: FinalAlphaCumprod::One,
        }
    }
}

/// Flow matching: `alpha = 1 - u`, `sigma = u`, with `u` evenly spaced in (0, 1] and then shifted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlowConfig {
    /// Number of timesteps; timestep `t` is `u = (t + 1) / num_train_timesteps`. Default 1000.
    pub num_train_timesteps: u32,
    /// Resolution shift `s`: `u` becomes `s u / (1 + (s - 1) u)`; 1, the default, is none.
    pub shift: f64,
}

impl Default for FlowConfig {
    fn default() -> Self {
        Self { num_train_timesteps: 1000, shift: 1.0 }
    }
}

/// EDM's variance-exploding schedule: `alpha = 1`, `sigma` on the Karras grid.
///
/// Equation 5 of [Karras et al. 2022](https://arxiv.org/abs/2206.00364), in ascending order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdmConfig {
    /// Number of timesteps; default 1000.
    pub num_train_timesteps: u32,
    /// Sigma of timestep 0; default 0.002.
    pub sigma_min: f64,
    /// Sigma of the last timestep; default 80.
    pub sigma_max: f64,
    /// Exponent of the grid; larger values are denser at low noise. Default 7.
    pub rho: f64,
}

impl Default for EdmConfig {
    fn default() -> Self {
        Self { num_train_timesteps: 1000, sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }
    }
}

/// The `schedule` part of a config file, by family; the default is Stable Diffusion 1.5's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "snake_case")]
pub enum NoiseScheduleConfig {
    /// Variance preserving: `alpha² + sigma² = 1`.
    Vp(VpConfig),
    /// Flow matching, also called rectified flow: `alpha + sigma = 1`.
    Flow(FlowConfig),
    /// Variance exploding, as in EDM: `alpha = 1`.
    Edm(EdmConfig),
}

impl Default for NoiseScheduleConfig {
    fn default() -> Self {
        Self::Vp(VpConfig::default())
    }
}

impl NoiseScheduleConfig {
    /// Checks the settings and builds the schedule.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the name of the first invalid setting and its allowed values.
    pub fn build(&self) -> Result<NoiseSchedule> {
        match self {
            Self::Vp(config) => config.build(),
            Self::Flow(config) => config.build(),
            Self::Edm(config) => config.build(),
        }
    }

    /// Number of timesteps of the training grid.
    pub fn num_train_timesteps(&self) -> u32 {
        match self {
            Self::Vp(VpConfig { num_train_timesteps, .. })
            | Self::Flow(FlowConfig { num_train_timesteps, .. })
            | Self::Edm(EdmConfig { num_train_timesteps, .. }) => *num_train_timesteps,
        }
    }
}

impl VpConfig {
    fn build(&self) -> Result<NoiseSchedule> {
        let betas = self.betas()?;
        let mut alphas_cumprod: Vec<f64> = betas
            .iter()
            .scan(1.0, |product, beta| {
                *product *= 1.0 - beta;
                Some(*product)
            })
            .collect();
        if self.rescale_betas_zero_snr {
            rescale_to_zero_snr(&mut alphas_cumprod)?;
        }
        let clean = match self.final_alpha_cumprod {
            FinalAlphaCumprod::One => 1.0,
            FinalAlphaCumprod::First => alphas_cumprod[0],
        };
        let scales = std::iter::once(clean).chain(alphas_cumprod).map(|alpha_cumprod| Scale {
            alpha: alpha_cumprod.sqrt(),
            sigma: (1.0 - alpha_cumprod).max(0.0).sqrt(),
        });
        Ok(NoiseSchedule::new(NoiseScheduleConfig::Vp(self.clone()), scales.collect()))
    }

    fn betas(&self) -> Result<Vec<f64>> {
        let n = ensure_num_train_timesteps(self.num_train_timesteps)?;
        if let Some(betas) = &self.trained_betas {
            return self.checked_trained_betas(betas);
        }
        let Self { beta_start, beta_end, .. } = *self;
        match self.beta_schedule {
            BetaSchedule::SquaredcosCapV2 => Ok(squared_cosine_betas(n)),
            BetaSchedule::Linear => {
                self.ensure_beta_range()?;
                Ok(linspace(beta_start, beta_end, n))
            }
            BetaSchedule::ScaledLinear => {
                self.ensure_beta_range()?;
                let roots = linspace(beta_start.sqrt(), beta_end.sqrt(), n);
                Ok(roots.into_iter().map(|root| root * root).collect())
            }
        }
    }

    fn ensure_beta_range(&self) -> Result<()> {
        let Self { beta_start, beta_end, .. } = *self;
        if 0.0 < beta_start && beta_start <= beta_end && beta_end < 1.0 {
            return Ok(());
        }
        Err(Error::Invalid(Invalid::new(
            "schedule.beta_start, schedule.beta_end",
            format!("{beta_start}, {beta_end}"),
            "in order and strictly between 0 and 1",
        )))
    }

    fn checked_trained_betas(&self, betas: &[f64]) -> Result<Vec<f64>> {
        let invalid = |value: String, expected: &str| {
            Error::Invalid(Invalid::new("schedule.trained_betas", value, expected))
        };
        if betas.len() != self.num_train_timesteps as usize {
            return Err(invalid(
                format!("a list of {}", betas.len()),
                &format!("a list of num_train_timesteps = {}", self.num_train_timesteps),
            ));
        }
        let last = betas.len() - 1;
        let possible =
            |i: usize, beta: f64| 0.0 < beta && (beta < 1.0 || (i == last && beta <= 1.0));
        match betas.iter().enumerate().find(|(i, beta)| !possible(*i, **beta)) {
            Some((i, beta)) => Err(invalid(
                format!("{beta} at index {i}"),
                "strictly between 0 and 1; the last may be 1, which leaves no signal",
            )),
            None => Ok(betas.to_vec()),
        }
    }
}

impl FlowConfig {
    fn build(&self) -> Result<NoiseSchedule> {
        let n = ensure_num_train_timesteps(self.num_train_timesteps)?;
        ensure_positive("schedule.shift", self.shift)?;
        let scales = (1..=n).map(|i| {
            let u = i as f64 / n as f64;
            let sigma = self.shift * u / (1.0 + (self.shift - 1.0) * u);
            Scale { alpha: 1.0 - sigma, sigma }
        });
        let scales = [Scale::CLEAN].into_iter().chain(scales).collect();
        Ok(NoiseSchedule::new(NoiseScheduleConfig::Flow(self.clone()), scales))
    }
}

impl EdmConfig {
    fn build(&self) -> Result<NoiseSchedule> {
        let n = ensure_num_train_timesteps(self.num_train_timesteps)?;
        let Self { sigma_min, sigma_max, rho, .. } = *self;
        ensure_positive("schedule.rho", rho)?;
        if !(0.0 < sigma_min && sigma_min < sigma_max && sigma_max.is_finite()) {
            return Err(Error::Invalid(Invalid::new(
                "schedule.sigma_min, schedule.sigma_max",
                format!("{sigma_min}, {sigma_max}"),
                "positive, finite and in order",
            )));
        }
        let roots = linspace(sigma_min.powf(rho.recip()), sigma_max.powf(rho.recip()), n);
        let scales = roots.into_iter().map(|root| Scale { alpha: 1.0, sigma: root.powf(rho) });
        let scales = [Scale::CLEAN].into_iter().chain(scales).collect();
        Ok(NoiseSchedule::new(NoiseScheduleConfig::Edm(self.clone()), scales))
    }
}

/// `alpha` and `sigma` of one timestep, as `f64`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Factor of the clean data.
    pub alpha: f64,
    /// Standard deviation of the noise.
    pub sigma: f64,
}

impl Scale {
    /// Clean data: all signal, no noise.
    pub const CLEAN: Self = Self { alpha: 1.0, sigma: 0.0 };

    /// Signal-to-noise ratio `alpha² / sigma²`; infinite for clean data.
    pub fn snr(self) -> f64 {
        self.root_snr().powi(2)
    }

    /// `alpha / sigma`; infinite for clean data.
    pub fn root_snr(self) -> f64 {
        self.alpha / self.sigma
    }

    /// `ln(alpha² / sigma²)`.
    pub fn log_snr(self) -> f64 {
        2.0 * self.root_snr().ln()
    }
}

/// `alpha` and `sigma` of a batch, shaped to broadcast against it.
#[derive(Debug)]
pub struct Scales {
    /// Factor of the clean data, `[batch, 1, ..]`.
    pub alpha: Tensor,
    /// Standard deviation of the noise, `[batch, 1, ..]`.
    pub sigma: Tensor,
}

/// The table of `alpha` and `sigma` over the training timesteps, and of the clean end, timestep -1.
///
/// Computed once in `f64`; a clone shares the table. All families (variance preserving, flow matching, EDM) have the
/// same two columns, so downstream code does not depend on the family.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: NoiseScheduleConfig,
    /// The clean end, then one entry per timestep; there are no entries beyond the grid.
    scales: Vec<Scale>,
    /// `[num_train_timesteps + 1, 2]` in `Double`, one per used device.
    tables: Mutex<Vec<(Device, Tensor)>>,
}

impl NoiseSchedule {
    fn new(config: NoiseScheduleConfig, scales: Vec<Scale>) -> Self {
        Self { inner: Arc::new(Inner { config, scales, tables: Mutex::default() }) }
    }

    /// The settings of this schedule.
    pub fn config(&self) -> &NoiseScheduleConfig {
        &self.inner.config
    }

    /// Number of timesteps of the training grid; the noisiest is one less.
    pub fn num_train_timesteps(&self) -> i64 {
        self.inner.scales.len() as i64 - 1
    }

    /// The noisiest timestep, where sampling starts.
    pub fn last_timestep(&self) -> i64 {
        self.num_train_timesteps() - 1
    }

    /// `alpha` and `sigma` at the clean end, timestep -1.
    pub fn end(&self) -> Scale {
        self.inner.scales[0]
    }

    /// `alpha` and `sigma` at one timestep; -1 is the clean end.
    ///
    /// # Errors
    ///
    /// [`Error::TimestepOutOfRange`] if `timestep` is below -1 or beyond the grid.
    pub fn scale_at(&self, timestep: i64) -> Result<Scale> {
        let n = self.num_train_timesteps();
        match timestep {
            t if (-1..n).contains(&t) => Ok(self.inner.scales[(t + 1) as usize]),
            timestep => Err(Error::TimestepOutOfRange {
                op: "NoiseSchedule::scale_at",
                timestep,
                lowest: -1,
                highest: n - 1,
            }),
        }
    }

    /// `alpha` and `sigma` of every training timestep.
    pub(crate) fn scales(&self) -> &[Scale] {
        &self.inner.scales[1..]
    }

    /// `alpha_cumprod`, the remaining fraction of signal power: `alpha²`.
    ///
    /// # Errors
    ///
    /// As [`scale_at`](Self::scale_at).
    pub fn alpha_cumprod_at(&self, timestep: i64) -> Result<f64> {
        Ok(self.scale_at(timestep)?.alpha.powi(2))
    }

    /// Looks up `alpha` and `sigma` of a batch, in the kind and on the device of `like`.
    ///
    /// # Shapes and units
    ///
    /// - `timesteps`: `[batch]`, `Int64`, in training timesteps; -1 is clean data
    /// - `like`: `[batch, ..]`, any rank from 1
    /// - returns: two tensors `[batch, 1, ..]` of the rank of `like`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) or
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind) if `timesteps` is not one `Int64` per sample;
    /// [`Error::Torch`] if one is off the grid (found by libtorch's index check; on a GPU at the next synchronisation).
    pub fn scales_at(&self, timesteps: &Tensor, like: &Tensor) -> Result<Scales> {
        const OP: &str = "NoiseSchedule::scales_at";
        ensure_timesteps(OP, "timesteps", timesteps, like)?;
        let table = self.table(like.device())?;
        // The clean end, -1, is row 0: an index of -1 would mean the noisiest timestep in Python.
        let rows = timesteps.f_to_device(like.device()).map_err(Error::torch(OP))? + 1;
        let scales = table.f_index_select(0, &rows).map_err(Error::torch(OP))?;
        let mut shape = vec![1; like.dim()];
        shape[0] = timesteps.size()[0];
        let column = |i| scales.select(1, i).to_kind(like.kind()).view(shape.as_slice());
        Ok(Scales { alpha: column(0), sigma: column(1) })
    }

    /// Adds noise to clean data: `alpha_t x0 + sigma_t noise`.
    ///
    /// # Shapes and units
    ///
    /// - `x0`, `noise`: `[batch, ..]`, data scale and unit normal
    /// - `timesteps`: `[batch]`, `Int64`; -1 returns the data at the clean end
    /// - returns: shape and kind of `x0`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::ShapeMismatch`](ddil_libtorch::ArgumentError::ShapeMismatch) if `x0` and `noise` differ;
    /// otherwise as [`scales_at`](Self::scales_at).
    pub fn add_noise(&self, x0: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Result<Tensor> {
        ensure_same_shape("NoiseSchedule::add_noise", ("x0", x0), ("noise", noise))?;
        let Scales { alpha, sigma } = self.scales_at(timesteps, x0)?;
        Ok(alpha * x0 + sigma * noise)
    }

    /// The time input of a network, one `Float` per sample.
    ///
    /// The timestep itself for VP, `1000 sigma` for flow matching, `ln(sigma) / 4` for EDM: the conventions of
    /// published networks of each family.
    ///
    /// # Errors
    ///
    /// As [`scales_at`](Self::scales_at).
    pub fn time_inputs_at(&self, timesteps: &Tensor) -> Result<Tensor> {
        ensure_dense("NoiseSchedule::time_inputs_at", "timesteps", timesteps)?;
        match self.inner.config {
            NoiseScheduleConfig::Vp(_) => Ok(timesteps.to_kind(Kind::Float)),
            NoiseScheduleConfig::Flow(_) => {
                Ok(self.scales_at(timesteps, &timesteps.to_kind(Kind::Float))?.sigma * 1000.0)
            }
            NoiseScheduleConfig::Edm(_) => {
                Ok(self.scales_at(timesteps, &timesteps.to_kind(Kind::Float))?.sigma.log() / 4.0)
            }
        }
    }

    /// The whole table on `device`: rows are the clean end and the timesteps, columns `alpha` and `sigma`.
    fn table(&self, device: Device) -> Result<Tensor> {
        const OP: &str = "NoiseSchedule::table";
        // After a panic with the lock held, at worst one cached table is missing.
        let mut tables =
            self.inner.tables.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, table)) = tables.iter().find(|(on, _)| *on == device) {
            return Ok(table.shallow_clone());
        }
        let flat: Vec<f64> = self.inner.scales.iter().flat_map(|s| [s.alpha, s.sigma]).collect();
        let table = Tensor::from_slice(&flat)
            .view([-1, 2])
            .f_to_device(device)
            .map_err(Error::torch(OP))?;
        tables.push((device, table.shallow_clone()));
        Ok(table)
    }
}

/// `n` evenly spaced values from `start` to `end`, both included; one value is `start`.
fn linspace(start: f64, end: f64, n: usize) -> Vec<f64> {
    let intervals = (n - 1).max(1) as f64;
    (0..n).map(|i| start + (end - start) * (i as f64 / intervals)).collect()
}

fn squared_cosine_betas(n: usize) -> Vec<f64> {
    let signal = |u: f64| ((u + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    (0..n)
        .map(|i| {
            let (u, next) = (i as f64 / n as f64, (i + 1) as f64 / n as f64);
            (1.0 - signal(next) / signal(u)).min(0.999)
        })
        .collect()
}

/// Shifts and scales the square roots so that the first stays and the last is zero.
///
/// Works on the roots: converting to betas and multiplying again, as the reference does, divides by a number close to
/// zero.
fn rescale_to_zero_snr(alphas_cumprod: &mut [f64]) -> Result<()> {
    let roots: Vec<f64> = alphas_cumprod.iter().map(|a| a.sqrt()).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    if first <= last {
        return Err(Error::Invalid(Invalid::new(
            "schedule.rescale_betas_zero_snr",
            "true",
            "false for a single timestep, which would have no signal",
        )));
    }
    for (alpha_cumprod, root) in alphas_cumprod.iter_mut().zip(roots) {
        *alpha_cumprod = ((root - last) * first / (first - last)).powi(2);
    }
    Ok(())
}

/// The limit of training timesteps of a schedule or a grid: a thousand times that of published models.
pub const MAX_TRAIN_TIMESTEPS: u32 = 1_000_000;

fn ensure_num_train_timesteps(n: u32) -> Result<usize> {
    if (1..=MAX_TRAIN_TIMESTEPS).contains(&n) {
        return Ok(n as usize);
    }
    Err(Error::Invalid(Invalid::new(
        "schedule.num_train_timesteps",
        n,
        format!("in 1..={MAX_TRAIN_TIMESTEPS}"),
    )))
}

fn ensure_positive(field: &'static str, value: f64) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::Invalid(Invalid::new(field, value, "positive and finite")))
}
