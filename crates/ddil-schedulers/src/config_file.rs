//! `scheduler_config.json` as diffusers reads and writes it.

use std::path::Path;

use ddil_files::{Invalid, JsonSettings, read_text_bounded};
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use crate::boundary::ConsistencyBoundary;
use crate::error::{Error, Result};
use crate::noise_schedule::{
    BetaSchedule, FinalAlphaCumprod, NoiseSchedule, NoiseScheduleConfig, VpConfig,
};
use crate::prediction::PredictionType;
use crate::sampler::Sampler;
use crate::thresholding::{Bound, DataRange, Thresholding};
use crate::timesteps::{TimestepSpacing, Timesteps};

/// Whether to reproduce the samples of diffusers' `DDIMScheduler` where they differ.
///
/// For comparison with samples of diffusers; the default is [`Off`](Self::Off).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compatibility {
    /// A step goes to the next timestep of the grid, and from a thresholded `x0` the noise estimate is recomputed.
    #[default]
    Off,
    /// A step moves down by a fixed stride, which leaves the grid if `n` does not divide `num_train_timesteps` and for
    /// linspace spacing; the noise estimate is not recomputed for a thresholded `x0`
    /// (`use_clipped_model_output=False`); trailing grids are rounded as in diffusers.
    Diffusers,
}

/// A `scheduler_config.json`: the scheduler settings that diffusers saves.
///
/// Settings missing from a file have the defaults of its class in diffusers. In addition to diffusers' keys a file may
/// contain `ddil_timesteps`, the timesteps for which a student was trained. diffusers ignores this key with a warning,
/// and accepts the same list as the `timesteps` of a pipeline call.
///
/// # Example
///
/// ```
/// use ddil_schedulers::{SchedulerConfig, Thresholding};
///
/// # fn main() -> ddil_schedulers::Result<()> {
/// let config = SchedulerConfig::from_json(
///     r#"{"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "ddil_timesteps": [999, 499]}"#,
/// )?;
/// assert_eq!(config.thresholding(), Thresholding::clamp_pixels());
/// assert_eq!(config.timesteps(None)?.as_slice(), [999, 499]);
/// assert_eq!(SchedulerConfig::from_json(&config.to_json())?, config);
///
/// let message = SchedulerConfig::from_json(r#"{"_class_name": "LCMScheduler", "shift": 3}"#)
///     .unwrap_err()
///     .to_string();
/// assert!(message.starts_with("LCMScheduler has no key `shift`"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum SchedulerConfig {
    /// `DDIMScheduler`.
    Ddim(CommonConfig),
    /// `LCMScheduler`.
    Lcm(LcmConfig),
}

/// The common keys of DDIM and LCM; the defaults are those of `DDIMScheduler`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "the keys of another project's file")]
pub struct CommonConfig {
    /// Number of timesteps the network was trained with; default 1000.
    pub num_train_timesteps: u32,
    /// The first beta; default 0.0001, LCM 0.00085.
    pub beta_start: f64,
    /// The last beta; default 0.02, LCM 0.012.
    pub beta_end: f64,
    /// How the betas grow; default linear, LCM scaled linear.
    pub beta_schedule: BetaSchedule,
    /// An explicit list of betas instead of the three settings above; default none.
    #[serde(deserialize_with = "numbers")]
    pub trained_betas: Option<Vec<f64>>,
    /// Whether predicted clean data are clipped; default true, LCM false.
    pub clip_sample: bool,
    /// The largest absolute value of clipped data; default 1.
    pub clip_sample_range: f64,
    /// Whether the last step ends on clean data rather than at the noise of timestep 0; default true.
    pub set_alpha_to_one: bool,
    /// Added to the timesteps of leading spacing; default 0.
    pub steps_offset: u32,
    /// What the network outputs; default epsilon. Not flow, which neither class supports.
    #[serde(deserialize_with = "output_type")]
    pub prediction_type: PredictionType,
    /// Whether predicted clean data are thresholded dynamically, which takes precedence over clipping; default false.
    pub thresholding: bool,
    /// The quantile of the absolute values for the dynamic threshold; default 0.995.
    pub dynamic_thresholding_ratio: f64,
    /// The largest dynamic threshold; default 1.
    pub sample_max_value: f64,
    /// How the timesteps of a run are spread; default leading. LCM ignores it.
    pub timestep_spacing: TimestepSpacing,
    /// Whether the last timestep is rescaled to contain no signal; default false.
    pub rescale_betas_zero_snr: bool,
    /// The timesteps for which a few-step student was trained, noisiest first; default none. Not a key of diffusers.
    #[serde(deserialize_with = "whole_numbers")]
    pub ddil_timesteps: Option<Vec<i64>>,
    /// The version of diffusers that wrote the file, if any.
    #[serde(rename = "_diffusers_version")]
    pub diffusers_version: Option<String>,
}

/// The keys of `LCMScheduler`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LcmConfig {
    /// The keys common with DDIM, with LCM's defaults.
    #[serde(flatten)]
    pub common: CommonConfig,
    /// Number of timesteps of the student's distillation; default 50.
    pub original_inference_steps: u32,
    /// Factor of the timestep in the consistency boundary; default 10.
    pub timestep_scaling: f64,
}

impl Default for CommonConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            trained_betas: None,
            clip_sample: true,
            clip_sample_range: 1.0,
            set_alpha_to_one: true,
            steps_offset: 0,
            prediction_type: PredictionType::Epsilon,
            thresholding: false,
            dynamic_thresholding_ratio: 0.995,
            sample_max_value: 1.0,
            timestep_spacing: TimestepSpacing::Leading,
            rescale_betas_zero_snr: false,
            ddil_timesteps: None,
            diffusers_version: None,
        }
    }
}

impl Default for LcmConfig {
    fn default() -> Self {
        let common = CommonConfig {
            beta_start: 0.000_85,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            clip_sample: false,
            ..CommonConfig::default()
        };
        Self { common, original_inference_steps: 50, timestep_scaling: 10.0 }
    }
}

impl SchedulerConfig {
    /// Writes a file as diffusers does: sorted keys, two spaces, a newline at the end.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let failed = |source| Error::Io { action: "write", path: path.to_owned(), source };
        std::fs::write(path, self.to_json()).map_err(failed)
    }

    /// The text of the file.
    pub fn to_json(&self) -> String {
        self.keys().with_class(self.class()).without_unset(&OPTIONAL_KEYS).to_string()
    }

    /// The name of diffusers' class.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Ddim(_) => "DDIMScheduler",
            Self::Lcm(_) => "LCMScheduler",
        }
    }

    /// The common keys of both classes.
    pub fn common(&self) -> &CommonConfig {
        match self {
            Self::Ddim(common) | Self::Lcm(LcmConfig { common, .. }) => common,
        }
    }

    /// The output type of the network.
    pub fn prediction_type(&self) -> PredictionType {
        self.common().prediction_type
    }

    /// Builds the schedule.
    ///
    /// # Errors
    ///
    /// As [`NoiseScheduleConfig::build`].
    pub fn schedule(&self) -> Result<NoiseSchedule> {
        self.common().schedule_config().build()
    }

    /// The treatment of predicted clean data beyond the range.
    pub fn thresholding(&self) -> Thresholding {
        let common = self.common();
        if common.thresholding {
            return Thresholding::Dynamic {
                ratio: common.dynamic_thresholding_ratio,
                max_value: common.sample_max_value,
            };
        }
        let range = common.clip_sample_range;
        if common.clip_sample {
            Thresholding::Clamp(DataRange::scalar(-range, range))
        } else {
            Thresholding::None
        }
    }

    /// Builds the sampler; DDIM is deterministic.
    ///
    /// # Errors
    ///
    /// As [`schedule`](Self::schedule).
    pub fn sampler(&self) -> Result<Box<dyn Sampler>> {
        self.sampler_config().build(&self.schedule()?)
    }

    /// The consistency boundary that `LCMScheduler` applies to a network; its `sigma_data` is always 0.5.
    pub fn boundary(&self) -> Option<ConsistencyBoundary> {
        self.sampler_config().boundary()
    }

    /// The timesteps of a run of `num_inference_steps`; without a number, the student's training timesteps.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is neither a number nor `ddil_timesteps`; otherwise as
    /// [`Timesteps::spaced`], [`Timesteps::lcm`] and [`Timesteps::explicit`].
    pub fn timesteps(&self, num_inference_steps: Option<u32>) -> Result<Timesteps> {
        let common = self.common();
        let total = common.num_train_timesteps;
        match (num_inference_steps, &common.ddil_timesteps, self) {
            (Some(n), _, Self::Ddim(_)) => {
                Timesteps::spaced(common.timestep_spacing, total, n, common.steps_offset)
            }
            (Some(n), _, Self::Lcm(lcm)) => Timesteps::lcm(total, lcm.original_inference_steps, n),
            (None, Some(trained), _) => Timesteps::explicit(trained.clone(), total),
            (None, None, _) => Err(Error::Invalid(Invalid::new(
                "num_inference_steps",
                "not given",
                format!("in 1..={total}, because the config has no `ddil_timesteps`"),
            ))),
        }
    }

    /// The timesteps of a run as diffusers takes them: see [`Compatibility::Diffusers`]. LCM has no differences.
    ///
    /// # Errors
    ///
    /// As [`timesteps`](Self::timesteps).
    pub fn compatible_timesteps(&self, num_inference_steps: u32) -> Result<Timesteps> {
        match self {
            Self::Ddim(common) => Timesteps::diffusers(
                common.timestep_spacing,
                common.num_train_timesteps,
                num_inference_steps,
                common.steps_offset,
            ),
            Self::Lcm(_) => self.timesteps(Some(num_inference_steps)),
        }
    }

    pub(crate) fn ensure(&self) -> Result<()> {
        let common = self.common();
        self.schedule()?;
        self.thresholding().ensure()?;
        if let Some(trained) = &common.ddil_timesteps {
            Timesteps::explicit(trained.clone(), common.num_train_timesteps)?;
        }
        match self {
            Self::Lcm(LcmConfig { original_inference_steps, .. }) => {
                Timesteps::lcm(common.num_train_timesteps, *original_inference_steps, 1).map(drop)
            }
            Self::Ddim(_) => Ok(()),
        }
    }

    pub(crate) fn keys(&self) -> JsonSettings {
        match self {
            Self::Ddim(common) => JsonSettings::of(common),
            Self::Lcm(lcm) => JsonSettings::of(lcm),
        }
    }
}

/// Solvers of diffusers for networks that DDIM can also sample.
pub(crate) const SOLVERS: [&str; 13] = [
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
];

/// Keys that are written only if they are set.
const OPTIONAL_KEYS: [&str; 2] = ["_diffusers_version", "ddil_timesteps"];

impl CommonConfig {
    /// These settings in diffusers' format.
    ///
    /// # Errors
    ///
    /// [`Error::NotRepresentable`] for settings that diffusers does not support: other families than variance
    /// preserving, flow prediction, a range that is not symmetric or differs by channel, reflection.
    pub fn new(
        schedule: &NoiseScheduleConfig,
        prediction_type: PredictionType,
        thresholding: &Thresholding,
    ) -> Result<Self> {
        let refuse = |field, reason: &str| {
            let reason = reason.to_owned();
            Err(Error::NotRepresentable { class: "DDIMScheduler or LCMScheduler", field, reason })
        };
        let NoiseScheduleConfig::Vp(vp) = schedule else {
            return refuse("schedule.family", "diffusers' schedulers are variance preserving");
        };
        if prediction_type == PredictionType::Flow {
            return refuse(
                "prediction_type",
                "diffusers' schedulers support epsilon, sample and v_prediction",
            );
        }
        let mut config = Self {
            num_train_timesteps: vp.num_train_timesteps,
            beta_start: vp.beta_start,
            beta_end: vp.beta_end,
            beta_schedule: vp.beta_schedule,
            trained_betas: vp.trained_betas.clone(),
            clip_sample: false,
            set_alpha_to_one: vp.final_alpha_cumprod == FinalAlphaCumprod::One,
            prediction_type,
            timestep_spacing: TimestepSpacing::Trailing,
            rescale_betas_zero_snr: vp.rescale_betas_zero_snr,
            ..Self::default()
        };
        match thresholding {
            Thresholding::None => {}
            Thresholding::Dynamic { ratio, max_value } => {
                config.thresholding = true;
                config.dynamic_thresholding_ratio = *ratio;
                config.sample_max_value = *max_value;
            }
            Thresholding::Clamp(DataRange {
                low: Bound::Scalar(low),
                high: Bound::Scalar(high),
            }) if *low == -high => {
                config.clip_sample = true;
                config.clip_sample_range = *high;
            }
            Thresholding::Clamp(_) => {
                return refuse("thresholding", "diffusers' schedulers clip to one symmetric range");
            }
            Thresholding::Reflect(_) => {
                return refuse("thresholding", "diffusers' schedulers do not reflect");
            }
        }
        Ok(config)
    }

    /// The same with the timesteps for which a student was trained.
    #[must_use]
    pub fn with_trained_timesteps(self, timesteps: &Timesteps) -> Self {
        Self { ddil_timesteps: Some(timesteps.as_slice().to_vec()), ..self }
    }

    /// The settings of the schedule.
    pub fn schedule_config(&self) -> NoiseScheduleConfig {
        NoiseScheduleConfig::Vp(VpConfig {
            num_train_timesteps: self.num_train_timesteps,
            beta_schedule: self.beta_schedule,
            beta_start: self.beta_start,
            beta_end: self.beta_end,
            trained_betas: self.trained_betas.clone(),
            rescale_betas_zero_snr: self.rescale_betas_zero_snr,
            final_alpha_cumprod: if self.set_alpha_to_one {
                FinalAlphaCumprod::One
            } else {
                FinalAlphaCumprod::First
            },
        })
    }
}

/// A type that the classes have: not flow.
fn output_type<'de, D: Deserializer<'de>>(value: D) -> Result<PredictionType, D::Error> {
    match PredictionType::deserialize(value) {
        Ok(PredictionType::Flow) | Err(_) => {
            Err(D::Error::custom("expected `epsilon`, `sample` or `v_prediction`"))
        }
        known => known,
    }
}

fn numbers<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Vec<f64>>, D::Error> {
    let refused = |_| D::Error::custom("expected a list of numbers, or null");
    Option::deserialize(value).map_err(refused)
}

fn whole_numbers<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Vec<i64>>, D::Error> {
    let refused = |_| D::Error::custom("expected a list of whole numbers, or null");
    Option::deserialize(value).map_err(refused)
}

pub(crate) fn parse(text: &str) -> Result<JsonSettings> {
    JsonSettings::parse(text).map_err(|source| Error::Parse { source })
}

/// A published file has less than two KiB; an explicit list of a thousand betas needs thirty.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Reads a file, with its name in every error.
pub(crate) fn read<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let failed = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let text = read_text_bounded(path, MAX_FILE_BYTES).map_err(failed)?;
    let named = |error| Error::File { path: path.to_owned(), source: Box::new(error) };
    parse(&text).map_err(named)
}
