//! Both towers from one file, with their temperature.

use std::path::Path;

use ddil_files::{Invalid, JsonSettings};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::config::{NetworkConfig, UnknownKeys, read_keys};
use crate::error::{Error, Result};
use crate::parameters::{Builder, Init, Parameters, Placement, Values};
use crate::{transformers_folder, transformers_json};

use super::config::{ClipConfig, OtherKeys};
use super::files;
use super::text::ClipTextModel;
use super::text_config::{ClipTextClass, ClipTextConfig};
use super::vision::ClipVisionModel;
use super::vision_config::{ClipVisionClass, ClipVisionConfig};

/// Both towers of CLIP: transformers' `CLIPModel`; built from a [`ClipConfig`] or by [`Self::from_folder`].
///
/// # Example
///
/// ```
/// use ddil_models::{ClipConfig, NetworkConfig};
///
/// let clip = ClipConfig::default().without_values()?;
/// assert_eq!(clip.text().config().projection_dim, Some(512));
/// assert_eq!(clip.vision().config().projection_dim, 512);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ClipModel {
    text: ClipTextModel,
    vision: ClipVisionModel,
    parameters: Parameters,
    logit_scale: Tensor,
}

impl ClipConfig {
    /// The settings of both towers, with projections of one width.
    fn towers(&self) -> (ClipTextConfig, ClipVisionConfig) {
        let text = ClipTextConfig {
            architectures: [ClipTextClass::TextModelWithProjection],
            projection_dim: Some(self.projection_dim),
            ..self.text.clone()
        };
        let vision = ClipVisionConfig {
            architectures: [ClipVisionClass::VisionModelWithProjection],
            projection_dim: self.projection_dim,
            ..self.vision.clone()
        };
        (text, vision)
    }
}

impl NetworkConfig for ClipConfig {
    type Network = ClipModel;

    const CLASS_NAME: &'static str = "CLIPModel";
    const MODEL_TYPE: Option<&'static str> = Some("clip");

    fn problems(&self) -> Vec<Invalid> {
        let (text, vision) = self.towers();
        let text = text.problems().into_iter().map(|problem| problem.under("text_config"));
        let vision = vision.problems().into_iter().map(|problem| problem.under("vision_config"));
        text.chain(vision).collect()
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<ClipModel> {
        ClipModel::new(self, placement, values)
    }

    fn parameters_of(network: &ClipModel) -> &Parameters {
        network.parameters()
    }

    fn load(network: &mut ClipModel, path: &Path) -> Result<()> {
        files::load(network.parameters(), path)
    }

    fn read(network: &ClipModel, path: &Path) -> Result<Vec<(String, Tensor)>> {
        files::read(network.parameters(), path)
    }

    /// Older files contain a tower's settings twice; as in transformers, `text_config_dict` overrides `text_config`.
    fn from_settings(
        what: &str,
        mut file: JsonSettings,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        let mut problems = Vec::new();
        let text = tower(&mut file, "text_config", unknown_keys, &mut problems);
        let vision = tower(&mut file, "vision_config", unknown_keys, &mut problems);
        problems.extend(transformers_json::prepare(&mut file, "clip"));
        let rest = read_keys(&file, &OtherKeys::default(), unknown_keys, &mut problems);
        problems.extend(rest.iter().flat_map(OtherKeys::problems));
        match (text, vision, rest) {
            (Some(text), Some(vision), Some(rest)) if problems.is_empty() => Ok(Self {
                text,
                vision,
                projection_dim: rest.projection_dim,
                logit_scale_init_value: rest.logit_scale_init_value,
            }),
            _ => Err(Error::InvalidConfig { what: what.to_owned(), problems }),
        }
    }
}

/// Removes a tower's settings from the file of both towers and reads them.
fn tower<C: NetworkConfig>(
    file: &mut JsonSettings,
    key: &str,
    unknown_keys: UnknownKeys,
    problems: &mut Vec<Invalid>,
) -> Option<C> {
    let keys = file.object_mut();
    let (older, value) = (keys.remove(&format!("{key}_dict")), keys.remove(key));
    let mut tower = match older.filter(|value| !value.is_null()).or(value) {
        Some(Value::Object(tower)) => tower,
        other => {
            let found = other.map_or("absent".to_owned(), |value| value.to_string());
            problems.push(Invalid::new(key, found, "an object with the tower's settings"));
            return None;
        }
    };
    // A tower of a two-tower file always ends with a projection, whatever its class in the file.
    tower.remove("architectures");
    match C::from_settings(key, tower.into(), unknown_keys) {
        Ok(config) => Some(config),
        Err(Error::InvalidConfig { problems: more, .. }) => {
            problems.extend(more.into_iter().map(|problem| problem.under(key)));
            None
        }
        Err(other) => {
            problems.push(Invalid::new(key, other, "settings"));
            None
        }
    }
}

impl ClipModel {
    fn new(config: &ClipConfig, place: Placement, values: Values) -> Result<Self> {
        let (text, vision) = config.towers();
        let text = text.assemble(place, values)?;
        let vision = vision.assemble(place, values)?;
        let mut builder = Builder::new(place, values);
        let init = Init::Constant(config.logit_scale_init_value);
        let logit_scale = builder.root().parameter("logit_scale", &[], init)?;
        let mut named = vec![("logit_scale".to_owned(), logit_scale.shallow_clone())];
        named.extend(text.parameters().named());
        named.extend(vision.parameters().named());
        let parameters = Parameters::of_foreign(named, place);
        Ok(Self { text, vision, parameters, logit_scale })
    }

    /// Loads both towers from the folder of a `CLIPModel`; see [`ClipTextModel::from_folder`].
    ///
    /// # Errors
    ///
    /// As [`ClipTextModel::from_folder`].
    pub fn from_folder(
        folder: impl AsRef<Path>,
        placement: Placement,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        transformers_folder::open::<ClipConfig>(folder.as_ref(), placement, unknown_keys)
    }

    /// The text encoder, with projection.
    pub fn text(&self) -> &ClipTextModel {
        &self.text
    }

    /// The vision tower, with projection.
    pub fn vision(&self) -> &ClipVisionModel {
        &self.vision
    }

    /// The parameters of both towers and `logit_scale`, under their names in files.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The factor from cosines to the logits of CLIP's training: `exp(logit_scale)`.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if it cannot be copied from the device.
    pub fn temperature(&self) -> Result<f64> {
        let value = self.logit_scale.f_to_kind(Kind::Double).and_then(|t| t.f_double_value(&[]));
        Ok(value.map_err(Error::torch("ClipModel::temperature"))?.exp())
    }
}
