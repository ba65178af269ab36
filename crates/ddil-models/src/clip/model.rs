//! Both towers from one file, with their temperature.

use std::path::Path;

use ddil_files::Invalid;
use tch::{Kind, Tensor};

use crate::config::{Config, UnknownKeys};
use crate::error::{Error, Result};
use crate::parameters::{Builder, Init, Parameters, Placement, Values, build_filled};

use super::config::ClipConfig;
use super::files;
use super::text::ClipTextModel;
use super::text_config::ClipTextClass;
use super::vision::ClipVisionModel;
use super::vision_config::ClipVisionClass;

/// Both towers of CLIP: transformers' `CLIPModel`; built by [`ClipConfig::build`] or [`Self::from_folder`].
#[derive(Debug)]
pub struct ClipModel {
    text: ClipTextModel,
    vision: ClipVisionModel,
    parameters: Parameters,
    logit_scale: Tensor,
}

impl ClipConfig {
    /// Checks the settings and builds both towers with fresh parameters.
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::build`](crate::ClipTextConfig::build).
    pub fn build(&self, placement: Placement, seed: u64) -> Result<ClipModel> {
        ClipModel::new(self, placement, Values::Seeded(seed))
    }

    /// Checks the settings and builds both towers with the parameters in one safetensors file or index of shards.
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::build_from`](crate::ClipTextConfig::build_from).
    pub fn build_from(&self, placement: Placement, weights: impl AsRef<Path>) -> Result<ClipModel> {
        let path = weights.as_ref();
        build_filled(
            |values| ClipModel::new(self, placement, values),
            |clip| files::read(clip.parameters().named(), path).map(drop),
            |clip| files::load(clip.parameters().named(), path),
        )
    }
}

impl ClipModel {
    pub(super) fn new(config: &ClipConfig, place: Placement, values: Values) -> Result<Self> {
        let mut text = config.text.clone();
        text.architectures = [ClipTextClass::TextModelWithProjection];
        text.projection_dim = Some(config.projection_dim);
        let mut vision = config.vision.clone();
        vision.architectures = [ClipVisionClass::VisionModelWithProjection];
        vision.projection_dim = config.projection_dim;
        ensure_valid(&text, &vision)?;
        let text = ClipTextModel::new(&text, place, values)?;
        let vision = ClipVisionModel::new(&vision, place, values)?;
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
    /// As [`ClipConfig::from_file`] and [`ClipTextModel::from_folder`].
    pub fn from_folder(
        folder: impl AsRef<Path>,
        placement: Placement,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        ClipConfig::from_file(folder.join(files::CONFIG_FILE), unknown_keys)?
            .build_from(placement, files::weights_in(folder)?)
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

/// Collects the problems of both towers in one error.
fn ensure_valid(text: &impl Config, vision: &impl Config) -> Result<()> {
    let named = |prefix: &str, problems: Vec<Invalid>| {
        let name = |p: Invalid| p.under(prefix);
        problems.into_iter().map(name).collect::<Vec<_>>()
    };
    let mut problems = named("text_config", text.problems());
    problems.extend(named("vision_config", vision.problems()));
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::InvalidConfig { what: "CLIPModel".into(), problems })
}
