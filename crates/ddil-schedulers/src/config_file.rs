//! `scheduler_config.json` as diffusers reads and writes it.

use std::path::Path;

use ddil_files::Invalid;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

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
#[derive(Clone, Debug, PartialEq)]
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
    pub ddil_timesteps: Option<Vec<i64>>,
    /// The version of diffusers that wrote the file, if any.
    pub diffusers_version: Option<String>,
}

/// The keys of `LCMScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub struct LcmConfig {
    /// The keys common with DDIM, with LCM's defaults.
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
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be read, is not a regular file or is larger than 16 MiB; [`Error::File`] with an
    /// error of [`from_json`](Self::from_json).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        read(path.as_ref(), Self::from_json)
    }

    /// Reads the file of any scheduler of a variance-preserving model, as diffusers' `DDIMScheduler.from_config` does:
    /// a solver that this crate does not have is replaced by DDIM on the same noise schedule, and its class is
    /// returned.
    ///
    /// Keys specific to that class are ignored: they only affect its steps. None of these classes clips clean data
    /// unless the file sets it.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), with an error of [`from_json_any`](Self::from_json_any).
    pub fn read_any(path: impl AsRef<Path>) -> Result<(Self, Option<String>)> {
        read(path.as_ref(), Self::from_json_any)
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    ///
    /// As [`from_json`](Self::from_json); [`Error::Invalid`] for an unsupported class.
    pub fn from_json_any(text: &str) -> Result<(Self, Option<String>)> {
        let mut keys: Map<String, Value> =
            serde_json::from_str(text).map_err(|source| Error::Parse { source })?;
        let solver = keys.get("_class_name").and_then(Value::as_str).map(str::to_owned);
        let Some(solver) = solver.filter(|class| SOLVERS.contains(&class.as_str())) else {
            return Ok((Self::from_json(text)?, None));
        };
        let defaults = CommonConfig { clip_sample: false, ..CommonConfig::default() };
        let config = Self::Ddim(CommonConfig::take(&mut keys, defaults)?);
        config.ensure()?;
        Ok((config, Some(solver)))
    }

    /// Reads a file, ignores keys that its class does not have, and returns them.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), except for unknown keys.
    pub fn read_lenient(path: impl AsRef<Path>) -> Result<(Self, Vec<String>)> {
        read(path.as_ref(), Self::from_json_lenient)
    }

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

    /// Reads the text of a file.
    ///
    /// # Errors
    ///
    /// [`Error::Parse`] if it is not a JSON object, [`Error::UnknownKeys`] with all keys that its class does not have,
    /// [`Error::Invalid`] for another class or an invalid value.
    pub fn from_json(text: &str) -> Result<Self> {
        let (config, unknown) = Self::from_json_lenient(text)?;
        if unknown.is_empty() {
            return Ok(config);
        }
        let always = config.to_keys().into_iter().map(|(key, _)| key);
        let mut known: Vec<String> = always.chain(OPTIONAL_KEYS.map(str::to_owned)).collect();
        known.sort();
        known.dedup();
        Err(Error::UnknownKeys { class: config.class(), unknown, known })
    }

    /// Reads the text of a file, ignores keys that its class does not have, and returns them.
    ///
    /// # Errors
    ///
    /// As [`from_json`](Self::from_json), except for unknown keys.
    pub fn from_json_lenient(text: &str) -> Result<(Self, Vec<String>)> {
        let mut keys: Map<String, Value> =
            serde_json::from_str(text).map_err(|source| Error::Parse { source })?;
        let class: String = take(&mut keys, "_class_name", "a string", String::new())?;
        let config = match class.as_str() {
            "DDIMScheduler" => Self::Ddim(CommonConfig::take(&mut keys, CommonConfig::default())?),
            "LCMScheduler" => Self::Lcm(LcmConfig::take(&mut keys)?),
            other => {
                return Err(Error::Invalid(Invalid::new(
                    "_class_name",
                    format!("`{other}`"),
                    "DDIMScheduler or LCMScheduler",
                )));
            }
        };
        config.ensure()?;
        Ok((config, keys.into_iter().map(|(key, _)| key).collect()))
    }

    /// The text of the file.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", Value::Object(self.to_keys()))
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
                format!("in 1..={total}, as the config has no `ddil_timesteps`"),
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

    fn ensure(&self) -> Result<()> {
        let common = self.common();
        self.schedule()?;
        self.thresholding().ensure()?;
        if common.prediction_type == PredictionType::Flow {
            return Err(Error::Invalid(Invalid::new(
                "prediction_type",
                "flow_prediction",
                "epsilon, sample or v_prediction",
            )));
        }
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

    fn to_keys(&self) -> Map<String, Value> {
        let mut keys = self.common().to_keys();
        keys.insert("_class_name".to_owned(), json!(self.class()));
        if let Self::Lcm(lcm) = self {
            keys.insert("original_inference_steps".to_owned(), json!(lcm.original_inference_steps));
            keys.insert("timestep_scaling".to_owned(), json!(lcm.timestep_scaling));
        }
        keys
    }
}

/// Solvers of diffusers for networks that DDIM can also sample.
const SOLVERS: [&str; 13] = [
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
            return refuse("schedule.family", "they are variance preserving");
        };
        if prediction_type == PredictionType::Flow {
            return refuse("prediction_type", "they know epsilon, sample and v_prediction");
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
                return refuse("thresholding", "they clip to one symmetric range");
            }
            Thresholding::Reflect(_) => return refuse("thresholding", "they do not reflect"),
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

    /// Removes the common keys from `keys`.
    fn take(keys: &mut Map<String, Value>, defaults: Self) -> Result<Self> {
        const COUNT: &str = "a whole number, not negative";
        const NUMBER: &str = "a number";
        const BOOL: &str = "true or false";
        const BETAS: &str = "linear, scaled_linear or squaredcos_cap_v2";
        const OUTPUTS: &str = "epsilon, sample or v_prediction";
        const SPACINGS: &str = "leading, linspace or trailing";
        const LIST: &str = "a list of numbers, or null";
        const WHOLE: &str = "a list of whole numbers, or null";
        let d = defaults;
        Ok(Self {
            num_train_timesteps: take(keys, "num_train_timesteps", COUNT, d.num_train_timesteps)?,
            beta_start: take(keys, "beta_start", NUMBER, d.beta_start)?,
            beta_end: take(keys, "beta_end", NUMBER, d.beta_end)?,
            beta_schedule: take(keys, "beta_schedule", BETAS, d.beta_schedule)?,
            trained_betas: take(keys, "trained_betas", LIST, d.trained_betas)?,
            clip_sample: take(keys, "clip_sample", BOOL, d.clip_sample)?,
            clip_sample_range: take(keys, "clip_sample_range", NUMBER, d.clip_sample_range)?,
            set_alpha_to_one: take(keys, "set_alpha_to_one", BOOL, d.set_alpha_to_one)?,
            steps_offset: take(keys, "steps_offset", COUNT, d.steps_offset)?,
            prediction_type: take(keys, "prediction_type", OUTPUTS, d.prediction_type)?,
            thresholding: take(keys, "thresholding", BOOL, d.thresholding)?,
            dynamic_thresholding_ratio: take(
                keys,
                "dynamic_thresholding_ratio",
                NUMBER,
                d.dynamic_thresholding_ratio,
            )?,
            sample_max_value: take(keys, "sample_max_value", NUMBER, d.sample_max_value)?,
            timestep_spacing: take(keys, "timestep_spacing", SPACINGS, d.timestep_spacing)?,
            rescale_betas_zero_snr: take(
                keys,
                "rescale_betas_zero_snr",
                BOOL,
                d.rescale_betas_zero_snr,
            )?,
            ddil_timesteps: take(keys, "ddil_timesteps", WHOLE, d.ddil_timesteps)?,
            diffusers_version: take(keys, "_diffusers_version", "a string", d.diffusers_version)?,
        })
    }

    fn to_keys(&self) -> Map<String, Value> {
        let mut keys = Map::new();
        let mut put = |key: &str, value| keys.insert(key.to_owned(), value);
        put("num_train_timesteps", json!(self.num_train_timesteps));
        put("beta_start", json!(self.beta_start));
        put("beta_end", json!(self.beta_end));
        put("beta_schedule", json!(self.beta_schedule));
        put("trained_betas", json!(self.trained_betas));
        put("clip_sample", json!(self.clip_sample));
        put("clip_sample_range", json!(self.clip_sample_range));
        put("set_alpha_to_one", json!(self.set_alpha_to_one));
        put("steps_offset", json!(self.steps_offset));
        put("prediction_type", json!(self.prediction_type));
        put("thresholding", json!(self.thresholding));
        put("dynamic_thresholding_ratio", json!(self.dynamic_thresholding_ratio));
        put("sample_max_value", json!(self.sample_max_value));
        put("timestep_spacing", json!(self.timestep_spacing));
        put("rescale_betas_zero_snr", json!(self.rescale_betas_zero_snr));
        if let Some(timesteps) = &self.ddil_timesteps {
            put("ddil_timesteps", json!(timesteps));
        }
        if let Some(version) = &self.diffusers_version {
            put("_diffusers_version", json!(version));
        }
        keys
    }
}

impl LcmConfig {
    fn take(keys: &mut Map<String, Value>) -> Result<Self> {
        let Self { common, original_inference_steps, timestep_scaling } = Self::default();
        let count = "a whole number, not negative";
        Ok(Self {
            common: CommonConfig::take(keys, common)?,
            original_inference_steps: take(
                keys,
                "original_inference_steps",
                count,
                original_inference_steps,
            )?,
            timestep_scaling: take(keys, "timestep_scaling", "a number", timestep_scaling)?,
        })
    }
}

/// Removes one key, or returns its default if it is absent.
fn take<T: DeserializeOwned>(
    keys: &mut Map<String, Value>,
    field: &'static str,
    expected: &str,
    default: T,
) -> Result<T> {
    let Some(value) = keys.remove(field) else { return Ok(default) };
    let found = value.to_string();
    // serde's message names Rust types; `expected` describes the value in terms of the file.
    serde_json::from_value(value).map_err(|_| Error::Invalid(Invalid::new(field, found, expected)))
}

/// A published file has less than two KiB; an explicit list of a thousand betas needs thirty.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Reads a file, with its name in every error.
fn read<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let failed = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let text = ddil_files::read_text_bounded(path, MAX_FILE_BYTES).map_err(failed)?;
    let named = |error| Error::File { path: path.to_owned(), source: Box::new(error) };
    parse(&text).map_err(named)
}
