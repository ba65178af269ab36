//! What the settings of all networks have in common: files, checks, and building.

use std::path::Path;

use ddil_files::{Invalid, JsonSettings};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::foreign_keys::is_foreign;
use crate::parameters::{Parameters, Placement, Values};
use crate::transformers_json;
use crate::weights;

/// The file of a network's settings in its folder.
pub(crate) const FILE_NAME: &str = "config.json";
/// The diffusers release whose `config.json` is written.
const DIFFUSERS_VERSION: &str = "0.42.1";
/// Upper bound of integers in a network's settings: far above every published width, vocabulary or count, and low
/// enough that a product of three does not overflow.
const MAX_NUMBER: u64 = 1 << 20;
/// The longest list in a network's settings.
const MAX_LIST: usize = 10_000;

/// How to treat an unknown key.
///
/// # Example
///
/// ```
/// use ddil_models::{MlpConfig, NetworkConfig, UnknownKeys};
///
/// let text = r#"{"dim": 3, "width": 5}"#;
/// assert!(MlpConfig::from_json(text, UnknownKeys::Refuse).is_err());
/// assert_eq!(MlpConfig::from_json(text, UnknownKeys::Ignore)?.dim, 3);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownKeys {
    /// An error that names it, because it may be a setting that changes the output.
    #[default]
    Refuse,
    /// Ignore it if it is known to be no setting of the class: that of another network of diffusers, or of the moving
    /// average that its training scripts write as `unet_ema`. Refuse any other.
    IgnoreForeign,
    /// Ignore it.
    Ignore,
}

/// The settings of a network: read from a `config.json`, checked, and built.
///
/// Names, defaults and file format of the settings are those of diffusers' or transformers' class
/// [`CLASS_NAME`](Self::CLASS_NAME). The networks of this crate implement it, and no others can. [`ModelConfig`] is one
/// type for all of them that a denoiser can have, with methods of the same names.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, Placement, UNet2DConditionConfig, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"_class_name": "UNet2DModel", "block_out_channels": [8, 8], "norm_num_groups": 4,
///     "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.in_channels, 3, "the default of diffusers");
/// let unet = config.build(Placement::default(), 0)?;
/// assert_eq!(unet.parameters().shapes(), config.parameter_shapes()?);
///
/// let mistyped = UNet2DConfig::from_json(r#"{"in_chanels": 1}"#, UnknownKeys::Refuse);
/// let invalid = mistyped.unwrap_err().invalid().cloned();
/// assert_eq!(invalid.map(|invalid| invalid.field).as_deref(), Some("in_chanels"));
///
/// // Names and shapes without the 10 GB of values.
/// let sdxl = UNet2DConditionConfig::sdxl().without_values()?;
/// assert_eq!(sdxl.parameters().num_values(), 2_567_463_684);
/// # Ok::<_, ddil_models::Error>(())
/// ```
///
/// [`ModelConfig`]: crate::ModelConfig
pub trait NetworkConfig: Clone + Default + Serialize + DeserializeOwned {
    /// The network that is built.
    type Network;

    /// The class: the value of `_class_name` or `architectures` in a file.
    const CLASS_NAME: &'static str;

    /// Keys that diffusers' class of that name does not have; written only if they are set.
    #[doc(hidden)]
    const OWN_KEYS: &'static [&'static str] = &[];

    /// The value of `model_type`, for a class of transformers.
    #[doc(hidden)]
    const MODEL_TYPE: Option<&'static str> = None;

    /// The problems of settings whose types and sizes are all correct.
    #[doc(hidden)]
    fn problems(&self) -> Vec<Invalid>;

    /// Builds the network of settings that are valid.
    #[doc(hidden)]
    fn assemble(&self, placement: Placement, values: Values) -> Result<Self::Network>;

    #[doc(hidden)]
    fn parameters_of(network: &Self::Network) -> &Parameters;

    /// The current name of a parameter that files of older releases name otherwise, if the network has attention.
    #[doc(hidden)]
    fn new_name(_old: &str) -> Option<String> {
        None
    }

    /// Fills a network from a file, which may use other names.
    #[doc(hidden)]
    fn load(network: &mut Self::Network, path: &Path) -> Result<()> {
        weights::load_renamed(&Self::parameters_of(network).named(), path, Self::new_name).map(drop)
    }

    /// The memory-mapped tensors of a file that would fill a network, under the names of its parameters.
    #[doc(hidden)]
    fn read(network: &Self::Network, path: &Path) -> Result<Vec<(String, Tensor)>> {
        weights::read_renamed(&Self::parameters_of(network).named(), path, Self::new_name)
    }

    /// Reads settings from a file; errors refer to it as `what`.
    #[doc(hidden)]
    fn from_settings(
        what: &str,
        mut file: JsonSettings,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        let mut problems = Vec::new();
        if let Some(model_type) = Self::MODEL_TYPE {
            problems = transformers_json::prepare(&mut file, model_type);
        } else if file.object().contains_key(JsonSettings::CLASS) {
            problems.extend(file.class(&[Self::CLASS_NAME]).err());
        }
        let config = read_keys(&file, &Self::default(), unknown_keys, &mut problems);
        problems.extend(config.iter().flat_map(all_problems));
        match config {
            Some(config) if problems.is_empty() => Ok(config),
            _ => Err(Error::InvalidConfig { what: what.to_owned(), problems }),
        }
    }

    /// Reads settings from a `config.json` written by diffusers, transformers or [`to_json`](Self::to_json); absent keys
    /// have their default.
    ///
    /// Keys that transformers writes for every kind of network, such as those of text generation, have no effect here
    /// and are ignored.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::InvalidJson`], and [`Error::InvalidConfig`] with every key that is unknown or has an
    /// invalid or unsupported value.
    fn from_file(path: impl AsRef<Path>, unknown_keys: UnknownKeys) -> Result<Self> {
        let path = path.as_ref();
        Self::from_settings(&path.display().to_string(), read_file(path)?, unknown_keys)
    }

    /// Reads settings from the text of such a file.
    ///
    /// # Errors
    ///
    /// As [`from_file`](Self::from_file), except for [`Error::Read`].
    fn from_json(text: &str, unknown_keys: UnknownKeys) -> Result<Self> {
        let file = JsonSettings::parse(text).map_err(|source| Error::InvalidJson {
            path: Self::CLASS_NAME.into(),
            source: source.into(),
        })?;
        Self::from_settings(Self::CLASS_NAME, file, unknown_keys)
    }

    /// The settings as a `config.json` for diffusers or transformers: class, version, sorted keys.
    fn to_json(&self) -> String {
        let file = JsonSettings::of(self).without_unset(Self::OWN_KEYS);
        if let Some(model_type) = Self::MODEL_TYPE {
            return transformers_json::complete(file, model_type).to_string();
        }
        let mut file = file.with_class(Self::CLASS_NAME);
        file.object_mut().insert("_diffusers_version".into(), DIFFUSERS_VERSION.into());
        file.to_string()
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] with every invalid value.
    fn ensure_valid(&self) -> Result<()> {
        match all_problems(self) {
            problems if problems.is_empty() => Ok(()),
            problems => Err(Error::InvalidConfig { what: Self::CLASS_NAME.into(), problems }),
        }
    }

    /// Checks the settings and builds a network with fresh parameters, initialised as `torch.nn` or transformers would.
    ///
    /// The same seed gives the same parameters on every device.
    ///
    /// # Errors
    ///
    /// As [`ensure_valid`](Self::ensure_valid); [`Error::Torch`] if the device is not available or its memory does not
    /// suffice.
    fn build(&self, placement: Placement, seed: u64) -> Result<Self::Network> {
        self.ensure_valid()?;
        ensure_room(self, placement)?;
        self.assemble(placement, Values::Seeded(seed))
    }

    /// Checks the settings and builds a network with the parameters in a safetensors file or index of shards.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build), and as [`weights::load_into`]. If memory does not suffice, differences between the
    /// settings and the file are reported first: they are the likelier cause.
    fn build_from(&self, placement: Placement, weights: impl AsRef<Path>) -> Result<Self::Network> {
        let path = weights.as_ref();
        self.ensure_valid()?;
        let built = self.assemble(placement, Values::Unset);
        let mut network = built.map_err(|error| self.read_weights(path).err().unwrap_or(error))?;
        Self::load(&mut network, path)?;
        Ok(network)
    }

    /// Checks the settings and builds a network whose parameters are zeros that take no memory and cannot be changed:
    /// to read names and sizes, and to check that adapters fit.
    ///
    /// # Errors
    ///
    /// As [`ensure_valid`](Self::ensure_valid).
    fn without_values(&self) -> Result<Self::Network> {
        self.ensure_valid()?;
        self.assemble(Placement::default(), Values::Sizes)
    }

    /// Name and shape of every parameter of the network, in the order of its layers, without allocating their values.
    ///
    /// # Errors
    ///
    /// As [`ensure_valid`](Self::ensure_valid).
    fn parameter_shapes(&self) -> Result<Vec<(String, Vec<i64>)>> {
        Ok(Self::parameters_of(&self.without_values()?).shapes())
    }

    /// The weights of a file or index, checked against the settings: under the names of the parameters, in the kinds of
    /// the file, and memory-mapped, so that no memory is needed for their values.
    ///
    /// # Errors
    ///
    /// As [`ensure_valid`](Self::ensure_valid), and as [`weights::load_into`].
    fn read_weights(&self, weights: impl AsRef<Path>) -> Result<Vec<(String, Tensor)>> {
        Self::read(&self.without_values()?, weights.as_ref())
    }
}

/// Checks that memory suffices for all values of a network before the first is drawn: a system that overcommits memory
/// kills the process when it is used.
///
/// Values from a file are not checked here: their memory is used only after the file was found to contain them.
fn ensure_room<C: NetworkConfig>(config: &C, placement: Placement) -> Result<()> {
    if placement.device != Device::Cpu {
        return Ok(());
    }
    let sized = config.assemble(placement, Values::Sizes)?;
    let parameters = C::parameters_of(&sized);
    let all = i64::try_from(parameters.num_values()).unwrap_or(i64::MAX);
    let room = Tensor::f_empty([all], (parameters.placement().kind, placement.device));
    room.map(drop).map_err(Error::torch("allocating parameters"))
}

/// Numbers and lists beyond the limits; if there are none, all other problems.
pub(crate) fn all_problems(config: &impl NetworkConfig) -> Vec<Invalid> {
    let mut problems = Vec::new();
    for (key, value) in JsonSettings::of(config).object() {
        size_problems(key, value, &mut problems);
    }
    if problems.is_empty() { config.problems() } else { problems }
}

/// The numbers and lists of a setting that exceed the limits.
fn size_problems(key: &str, value: &Value, problems: &mut Vec<Invalid>) {
    match value {
        Value::Number(number) if number.is_u64() && number.as_u64() > Some(MAX_NUMBER) => {
            problems.push(Invalid::new(key, number, format!("at most {MAX_NUMBER}")));
        }
        Value::Array(items) if items.len() > MAX_LIST => {
            let found = format!("{} entries long", items.len());
            problems.push(Invalid::new(key, found, format!("at most {MAX_LIST}")));
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                size_problems(&format!("{key}[{i}]"), item, problems);
            }
        }
        Value::Object(object) => {
            for (name, item) in object {
                size_problems(&format!("{key}.{name}"), item, problems);
            }
        }
        _ => {}
    }
}

/// The settings in a file.
pub(crate) fn read_file(path: &Path) -> Result<JsonSettings> {
    JsonSettings::from_file(path).map_err(|error| match error {
        ddil_files::Error::Json { path, source, .. } => {
            Error::InvalidJson { path, source: source.into() }
        }
        ddil_files::Error::Io { path, source, .. } => Error::Read { path, source: source.into() },
        other => Error::Read { path: path.into(), source: other.into() },
    })
}

/// Reads settings; adds every key that is unknown or has a value of the wrong type to `problems`.
pub(crate) fn read_keys<T: Serialize + DeserializeOwned>(
    file: &JsonSettings,
    defaults: &T,
    unknown_keys: UnknownKeys,
    problems: &mut Vec<Invalid>,
) -> Option<T> {
    let mut found = file.problems(defaults);
    if unknown_keys != UnknownKeys::Ignore {
        let known = JsonSettings::of(defaults);
        let known: Vec<_> = known.object().keys().map(String::as_str).collect();
        let expected = format!("one of {}", known.join(", "));
        let is_refused =
            |key: &&str| !(unknown_keys == UnknownKeys::IgnoreForeign && is_foreign(key));
        let unknown = file.unknown(defaults).into_iter().filter(is_refused);
        found.extend(unknown.map(|key| Invalid::new(key, &file.object()[key], expected.clone())));
    }
    found.sort_by(|left, right| left.field.cmp(&right.field));
    let settings = file.over(defaults);
    if let (Err(problem), true) = (&settings, found.is_empty()) {
        found.push(problem.clone());
    }
    problems.append(&mut found);
    settings.ok()
}

/// A problem for each of the counts that is 0.
pub(crate) fn count_problems(counts: &[(&str, Option<u32>)]) -> Vec<Invalid> {
    let zeros = counts.iter().filter(|(_, count)| *count == Some(0));
    zeros.map(|(key, _)| Invalid::new(*key, 0, "at least 1")).collect()
}
