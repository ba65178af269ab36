//! One type for all networks of this crate, and their folders.

use std::fs;
use std::path::Path;

use ddil_core::Conditioning;
use ddil_files::{Invalid, JsonSettings};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::config::{self, NetworkConfig, UnknownKeys};
use crate::error::{Error, Result};
use crate::mlp::{Mlp, MlpConfig};
use crate::network_output::NetworkOutput;
use crate::parameters::{Parameters, Placement};
use crate::torch_script::{TorchScript, TorchScriptConfig};
use crate::unet::condition::UNet2DConditionModel;
use crate::unet::condition_config::UNet2DConditionConfig;
use crate::unet::pixels::UNet2DModel;
use crate::unet::pixels_config::{SampleSize, UNet2DConfig};
use crate::weights::{self, WeightFiles, write_error};

/// Runs code for the network or settings of any class.
macro_rules! for_each_class {
    ($value:expr, $inner:ident => $code:expr) => {
        match $value {
            Self::UNet2D($inner) => $code,
            Self::UNet2DCondition($inner) => $code,
            Self::Mlp($inner) => $code,
            Self::TorchScript($inner) => $code,
        }
    };
}

/// The network or settings of the same class.
macro_rules! same_class {
    ($value:expr, $inner:ident => $to:ident($code:expr)) => {
        match $value {
            Self::UNet2D($inner) => $to::UNet2D($code),
            Self::UNet2DCondition($inner) => $to::UNet2DCondition($code),
            Self::Mlp($inner) => $to::Mlp($code),
            Self::TorchScript($inner) => $to::TorchScript($code),
        }
    };
}

/// Runs code for a U-Net; `None` for other classes.
macro_rules! for_unet {
    ($value:expr, $unet:ident => $code:expr) => {
        match $value {
            Self::UNet2D($unet) => Some($code),
            Self::UNet2DCondition($unet) => Some($code),
            Self::Mlp(_) | Self::TorchScript(_) => None,
        }
    };
}

/// The settings of a network; the class is the value of `_class_name`, as in diffusers' files.
///
/// # Example
///
/// ```
/// use ddil_models::{MlpConfig, ModelConfig, Placement};
///
/// let config = ModelConfig::Mlp(MlpConfig::default());
/// let model = config.build(Placement::default(), 0)?;
/// assert_eq!(model.config(), config);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "_class_name")]
#[non_exhaustive]
#[expect(clippy::large_enum_variant, reason = "a run has a few, and copies none in a loop")]
pub enum ModelConfig {
    /// A U-Net for pixels.
    #[serde(rename = "UNet2DModel")]
    UNet2D(UNet2DConfig),
    /// A U-Net conditioned on text.
    #[serde(rename = "UNet2DConditionModel")]
    UNet2DCondition(UNet2DConditionConfig),
    /// A small network for vectors.
    Mlp(MlpConfig),
    /// A `TorchScript` program.
    TorchScript(TorchScriptConfig),
}

impl ModelConfig {
    /// Reads settings from a `config.json`.
    ///
    /// # Errors
    ///
    /// As [`NetworkConfig::from_file`]; [`Error::InvalidConfig`] for an unknown class.
    pub fn from_file(path: impl AsRef<Path>, unknown_keys: UnknownKeys) -> Result<Self> {
        let path = path.as_ref();
        let file = config::read_file(path)?;
        let what = path.display().to_string();
        let classes = [
            UNet2DConfig::CLASS_NAME,
            UNet2DConditionConfig::CLASS_NAME,
            MlpConfig::CLASS_NAME,
            TorchScriptConfig::CLASS_NAME,
        ];
        let class = file.class(&classes).map_err(|problem| Error::InvalidConfig {
            what: what.clone(),
            problems: vec![problem],
        })?;
        let (what, keys) = (what.as_str(), unknown_keys);
        Ok(match class {
            UNet2DConfig::CLASS_NAME => {
                Self::UNet2D(UNet2DConfig::from_settings(what, file, keys)?)
            }
            UNet2DConditionConfig::CLASS_NAME => {
                Self::UNet2DCondition(UNet2DConditionConfig::from_settings(what, file, keys)?)
            }
            MlpConfig::CLASS_NAME => Self::Mlp(MlpConfig::from_settings(what, file, keys)?),
            _ => Self::TorchScript(TorchScriptConfig::from_settings(what, file, keys)?),
        })
    }

    /// The settings as a `config.json`.
    pub fn to_json(&self) -> String {
        for_each_class!(self, config => config.to_json())
    }

    /// The class, as in `_class_name`.
    pub fn class_name(&self) -> &'static str {
        for_each_class!(self, config => class_name_of(config))
    }

    /// Input and output channels of a U-Net; `None` for other classes.
    pub fn channels(&self) -> Option<[u32; 2]> {
        for_unet!(self, unet => [unet.in_channels, unet.out_channels])
    }

    /// Height and width of a U-Net's training samples; `None` if not in its settings, and for other classes.
    pub fn sample_size(&self) -> Option<[u32; 2]> {
        for_unet!(self, unet => unet.sample_size).flatten().map(|size| match size {
            SampleSize::Square(side) => [side; 2],
            SampleSize::Rectangle(sides) => sides,
        })
    }

    /// Channels of every level of a U-Net, the finest first; `None` for other classes.
    pub(crate) fn level_channels(&self) -> Option<&[u32]> {
        for_unet!(self, unet => unet.block_out_channels.as_slice())
    }

    /// Checks the settings.
    pub(crate) fn ensure_valid(&self) -> Result<()> {
        for_each_class!(self, config => config.ensure_valid())
    }

    /// Number of classes in the table; `None` for a network without one.
    pub fn num_class_embeds(&self) -> Option<u32> {
        match self {
            Self::UNet2D(unet) => unet.num_class_embeds,
            Self::UNet2DCondition(unet) => unet.num_class_embeds,
            Self::Mlp(mlp) => mlp.num_class_embeds,
            Self::TorchScript(_) => None,
        }
    }

    /// Width of a U-Net's embedding of the guidance weight; `None` for a U-Net without this input, and for other
    /// classes.
    pub fn time_cond_proj_dim(&self) -> Option<u32> {
        for_unet!(self, unet => unet.time_cond_proj_dim).flatten()
    }

    /// The same U-Net with a guidance weight as input, through an embedding of this width.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] for other classes.
    pub fn with_time_cond_proj_dim(mut self, width: u32) -> Result<Self> {
        match for_unet!(&mut self, unet => unet.time_cond_proj_dim = Some(width)) {
            Some(()) => Ok(self),
            None => Err(self.not_a_unet()),
        }
    }

    /// The same U-Net for samples of that height and width.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] for other classes.
    pub fn with_sample_size(mut self, sides: [u32; 2]) -> Result<Self> {
        let [height, width] = sides;
        let is_square = height == width;
        // diffusers' pipeline of Stable Diffusion XL multiplies this value, and does not accept a list.
        let sample_size =
            if is_square { SampleSize::Square(height) } else { SampleSize::Rectangle(sides) };
        match for_unet!(&mut self, unet => unet.sample_size = Some(sample_size)) {
            Some(()) => Ok(self),
            None => Err(self.not_a_unet()),
        }
    }

    fn not_a_unet(&self) -> Error {
        let expected =
            format!("{} or {}", UNet2DConfig::CLASS_NAME, UNet2DConditionConfig::CLASS_NAME);
        let problem = Invalid::new("_class_name", self.class_name(), expected);
        Error::InvalidConfig { what: self.class_name().to_owned(), problems: vec![problem] }
    }

    /// Checks the settings and builds a network whose parameters are zeros that take no memory and cannot be changed:
    /// to read names and sizes, and to check that adapters fit.
    ///
    /// # Errors
    ///
    /// As [`Self::build`].
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_models::{ModelConfig, UNet2DConditionConfig};
    ///
    /// let unet = ModelConfig::UNet2DCondition(UNet2DConditionConfig::sdxl());
    /// assert_eq!(unet.without_values()?.parameters().num_values(), 2_567_463_684);
    /// # Ok::<_, ddil_models::Error>(())
    /// ```
    pub fn without_values(&self) -> Result<Model> {
        Ok(same_class!(self, config => Model(config.without_values()?)))
    }

    /// Checks the settings and builds a network with fresh parameters.
    ///
    /// # Errors
    ///
    /// As [`NetworkConfig::build`]; [`Error::InvalidConfig`] for a `TorchScript` program, which has no fresh parameters.
    pub fn build(&self, placement: Placement, seed: u64) -> Result<Model> {
        Ok(same_class!(self, config => Model(config.build(placement, seed)?)))
    }

    /// The weights of a file or index, checked against the settings; see [`NetworkConfig::read_weights`].
    ///
    /// # Errors
    ///
    /// As [`NetworkConfig::read_weights`].
    pub fn read_weights(&self, weights: impl AsRef<Path>) -> Result<Vec<(String, Tensor)>> {
        for_each_class!(self, config => config.read_weights(weights))
    }

    /// The keys of a `config.json` that are known to be no settings of its class; see [`UnknownKeys::IgnoreForeign`].
    ///
    /// # Errors
    ///
    /// As [`from_file`](Self::from_file), with such keys ignored.
    pub fn foreign_keys(path: impl AsRef<Path>) -> Result<Vec<String>> {
        let path = path.as_ref();
        let config = Self::from_file(path, UnknownKeys::IgnoreForeign)?;
        let unknown = |file: JsonSettings| {
            let keys = config.unknown_in(&file);
            keys.into_iter().map(str::to_owned).collect()
        };
        config::read_file(path).map(unknown)
    }

    fn unknown_in<'a>(&self, file: &'a JsonSettings) -> Vec<&'a str> {
        for_each_class!(self, config => file.unknown(config))
    }

    fn build_from(&self, placement: Placement, weights: &Path) -> Result<Model> {
        Ok(same_class!(self, config => Model(config.build_from(placement, weights)?)))
    }
}

fn class_name_of<C: NetworkConfig>(_: &C) -> &'static str {
    C::CLASS_NAME
}

/// A network of any class.
///
/// # Example
///
/// ```
/// use ddil_models::{MlpConfig, Model, NetworkConfig, Placement, UnknownKeys};
///
/// # let folder = std::env::temp_dir().join(format!("ddil-model-{}", std::process::id()));
/// let model = Model::Mlp(MlpConfig::default().build(Placement::default(), 0)?);
/// model.save_to_folder(&folder)?;
/// let again = Model::from_folder(&folder, Placement::default(), UnknownKeys::Refuse)?;
/// assert_eq!(again.class_name(), "Mlp");
/// assert_eq!(again.config(), model.config());
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
#[expect(clippy::large_enum_variant, reason = "one lives for a whole run, and none is moved in it")]
pub enum Model {
    /// A U-Net for pixels.
    UNet2D(UNet2DModel),
    /// A U-Net conditioned on text.
    UNet2DCondition(UNet2DConditionModel),
    /// A small network for vectors.
    Mlp(Mlp),
    /// A `TorchScript` program.
    TorchScript(TorchScript),
}

impl Model {
    /// Loads a network from a diffusers folder: `config.json` and the weights that [`WeightFiles::DIFFUSION`] finds, or
    /// the `TorchScript` program.
    ///
    /// # Errors
    ///
    /// As [`ModelConfig::from_file`], [`WeightFiles::find`] and [`weights::load_into`](crate::weights::load_into).
    pub fn from_folder(
        folder: impl AsRef<Path>,
        placement: Placement,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        Self::from_folder_variant(folder, None, placement, unknown_keys)
    }

    /// As [`Self::from_folder`], with weights of a variant such as `fp16`.
    ///
    /// # Errors
    ///
    /// As [`Self::from_folder`]; the error lists the existing variants if this one is missing.
    pub fn from_folder_variant(
        folder: impl AsRef<Path>,
        variant: Option<&str>,
        placement: Placement,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        let config = ModelConfig::from_file(folder.join(config::FILE_NAME), unknown_keys)?;
        let weights = match &config {
            ModelConfig::TorchScript(config) => folder.join(&config.file),
            _ => WeightFiles { variant, ..WeightFiles::DIFFUSION }.find(folder)?,
        };
        config.build_from(placement, &weights)
    }

    /// Writes the network to a folder in diffusers' layout, creating it if needed.
    ///
    /// # Errors
    ///
    /// As [`weights::save`](crate::weights::save).
    pub fn save_to_folder(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|e| write_error(folder, e))?;
        match self {
            Self::UNet2D(_) | Self::UNet2DCondition(_) | Self::Mlp(_) => {
                WeightFiles::DIFFUSION.save(&self.parameters().named(), folder)?;
            }
            Self::TorchScript(script) => script.save(folder.join(&script.config().file))?,
        }
        weights::write_text(&folder.join(config::FILE_NAME), &self.config().to_json())
    }

    /// The settings from which the network was built.
    pub fn config(&self) -> ModelConfig {
        same_class!(self, network => ModelConfig(network.config().clone()))
    }

    /// The parameters, under their names in files.
    pub fn parameters(&self) -> &Parameters {
        for_each_class!(self, network => network.parameters())
    }

    /// Switches dropout on or off; it is off in a new network.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if a `TorchScript` program fails.
    pub fn set_training(&self, training: bool) -> Result<()> {
        // An Mlp has no layers that depend on the mode.
        for_unet!(self, unet => unet.set_training(training));
        match self {
            Self::TorchScript(script) => script.set_training(training),
            _ => Ok(()),
        }
    }

    /// Switches activation checkpointing on or off, see [`UNet2DModel::set_activation_checkpointing`].
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] to switch it on for classes other than U-Nets, which have no blocks.
    pub fn set_activation_checkpointing(&self, on: bool) -> Result<()> {
        match for_unet!(self, unet => unet.set_activation_checkpointing(on)) {
            None if on => Err(self.config().not_a_unet()),
            _ => Ok(()),
        }
    }

    /// Whether the backward pass recomputes activations.
    pub fn activation_checkpointing(&self) -> bool {
        for_unet!(self, unet => unet.activation_checkpointing()).unwrap_or(false)
    }

    /// The class name in `config.json`.
    pub fn class_name(&self) -> &'static str {
        for_each_class!(self, network => class_name_of(network.config()))
    }

    /// Names of the parts of a [`Conditioning`] that the network requires; it takes no others.
    pub fn conditioning_fields(&self) -> Vec<&'static str> {
        for_each_class!(self, network => network.conditioning_fields())
    }

    /// The output for noisy samples, not yet converted to clean data and noise.
    ///
    /// # Shapes and units
    ///
    /// - as the network of that class
    ///
    /// # Errors
    ///
    /// [`Error::MissingPart`], [`Error::Core`] for a part of `conditioning` that the network does not take; otherwise
    /// as the network of that class.
    pub fn forward(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let (labels, weight) = self.parts("Model::forward", conditioning)?;
        match self {
            Self::UNet2D(unet) => unet.forward(x_t, timesteps, labels, weight),
            Self::UNet2DCondition(unet) => unet.forward(x_t, timesteps, conditioning.into()),
            Self::Mlp(mlp) => mlp.forward(x_t, timesteps, labels, weight),
            Self::TorchScript(script) => script.forward(x_t, timesteps, labels),
        }
    }

    /// As [`Self::forward`], with the features from the same pass.
    ///
    /// # Shapes and units
    ///
    /// - as [`UNet2DModel::forward_with_features`] and [`Mlp::forward_with_features`]
    ///
    /// # Errors
    ///
    /// As [`Self::forward`]; [`Error::NoFeatures`] for a `TorchScript` program, which returns only its output.
    pub fn forward_with_features(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<NetworkOutput> {
        let (labels, weight) = self.parts("Model::forward_with_features", conditioning)?;
        match self {
            Self::UNet2D(unet) => unet.forward_with_features(x_t, timesteps, labels, weight),
            Self::UNet2DCondition(unet) => {
                unet.forward_with_features(x_t, timesteps, conditioning.into())
            }
            Self::Mlp(mlp) => mlp.forward_with_features(x_t, timesteps, labels, weight),
            Self::TorchScript(_) => Err(Error::NoFeatures { network: self.class_name() }),
        }
    }

    /// The features only, which for a U-Net is half the work.
    ///
    /// # Errors
    ///
    /// As [`Self::forward_with_features`].
    pub fn features(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let (labels, weight) = self.parts("Model::features", conditioning)?;
        match self {
            Self::UNet2D(unet) => unet.features(x_t, timesteps, labels, weight),
            Self::UNet2DCondition(unet) => unet.features(x_t, timesteps, conditioning.into()),
            _ => Ok(self.forward_with_features(x_t, timesteps, conditioning)?.features),
        }
    }

    /// Class labels and guidance weight; an error for parts that the network does not take.
    fn parts<'a>(
        &self,
        op: &'static str,
        conditioning: &'a Conditioning,
    ) -> Result<(Option<&'a Tensor>, Option<&'a Tensor>)> {
        conditioning.ensure_known(op, self.class_name(), &self.conditioning_fields())?;
        let [labels, weight] = [Conditioning::CLASS_LABELS, Conditioning::GUIDANCE_WEIGHT];
        Ok((conditioning.get(labels), conditioning.get(weight)))
    }
}
