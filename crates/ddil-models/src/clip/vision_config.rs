//! The settings of a [`ClipVisionModel`](crate::ClipVisionModel), with the keys of transformers.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config::count_problems;

use super::settings::{ClipActivation, EncoderSettings};

/// The class of a vision tower: with or without a projection.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipVisionClass, ClipVisionConfig, NetworkConfig, UnknownKeys};
///
/// let text = r#"{"architectures": ["CLIPVisionModelWithProjection"]}"#;
/// let config = ClipVisionConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.architectures, [ClipVisionClass::VisionModelWithProjection]);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClipVisionClass {
    /// Hidden states only.
    #[default]
    #[serde(rename = "CLIPVisionModel")]
    VisionModel,
    /// With `image_embeds`.
    #[serde(rename = "CLIPVisionModelWithProjection")]
    VisionModelWithProjection,
}

/// The settings of a [`ClipVisionModel`](crate::ClipVisionModel); names, defaults and file format are those of
/// transformers' class of that name.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipVisionConfig, NetworkConfig, Placement};
///
/// let config = ClipVisionConfig {
///     hidden_size: 8,
///     intermediate_size: 16,
///     num_hidden_layers: 2,
///     num_attention_heads: 2,
///     image_size: 16,
///     patch_size: 8,
///     ..ClipVisionConfig::default()
/// };
/// let tower = config.build(Placement::default(), 0)?;
/// assert_eq!(tower.config().to_json(), config.to_json());
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipVisionConfig {
    /// The class; without projection if the file does not contain it.
    pub architectures: [ClipVisionClass; 1],
    /// Width of a hidden state. Default 768.
    pub hidden_size: u32,
    /// Width between the two linear layers that follow attention. Default 3072.
    pub intermediate_size: u32,
    /// Width of `image_embeds`; unused by a class without projection. Default 512.
    pub projection_dim: u32,
    /// Default 12.
    pub num_hidden_layers: u32,
    /// Default 12.
    pub num_attention_heads: u32,
    /// Channels of an image. Default 3.
    pub num_channels: u32,
    /// Height and width of an image. Default 224.
    pub image_size: u32,
    /// Height and width of a patch. Default 32.
    pub patch_size: u32,
    /// The nonlinearity. Default quick gelu.
    pub hidden_act: ClipActivation,
    /// Added to a variance before taking its root. Default 1e-5.
    pub layer_norm_eps: f64,
    /// Written back; not applied. Default 0.
    pub attention_dropout: f64,
    /// Standard deviation of fresh embeddings. Default 0.02.
    pub initializer_range: f64,
    /// Scale of fresh parameters. Default 1.
    pub initializer_factor: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            architectures: [ClipVisionClass::VisionModel],
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            initializer_factor: 1.0,
        }
    }
}

impl ClipVisionConfig {
    /// Whether there is a projection.
    pub(super) fn projects(&self) -> bool {
        self.architectures == [ClipVisionClass::VisionModelWithProjection]
    }

    /// The settings of the transformer.
    pub(super) fn encoder(&self) -> EncoderSettings {
        EncoderSettings {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            attention_dropout: self.attention_dropout,
            initializer_range: self.initializer_range,
            initializer_factor: self.initializer_factor,
        }
    }

    pub(super) fn check(&self) -> Vec<Invalid> {
        let mut problems = count_problems(&[
            ("projection_dim", Some(self.projection_dim)),
            ("num_channels", Some(self.num_channels)),
            ("patch_size", Some(self.patch_size)),
        ]);
        problems.extend(self.encoder().problems());
        if self.image_size < self.patch_size.max(1) {
            let expected = format!("at least patch_size, {}", self.patch_size);
            problems.push(Invalid::new("image_size", self.image_size, expected));
        }
        problems
    }
}
