//! The settings of a [`ClipVisionModel`](crate::ClipVisionModel), with the keys of transformers.

use std::path::Path;

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config::{self, Config, UnknownKeys};
use crate::error::Result;

use super::settings::{
    ClipActivation, ModelType, ensure_counts, ensure_heads, ensure_numbers, read, write,
};

/// The class of a vision tower: with or without a projection.
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
/// use ddil_models::{ClipVisionConfig, Placement};
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
    /// Reads settings from a `config.json`, as [`ClipTextConfig::from_file`](super::ClipTextConfig::from_file).
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::from_file`](super::ClipTextConfig::from_file).
    pub fn from_file(path: impl AsRef<Path>, unknown_keys: UnknownKeys) -> Result<Self> {
        let path = path.as_ref();
        read(&path.display().to_string(), config::read_file(path)?, unknown_keys)
    }

    /// The settings as a `config.json` for transformers.
    pub fn to_json(&self) -> String {
        write(self)
    }

    /// Whether there is a projection.
    pub(super) fn projects(&self) -> bool {
        self.architectures == [ClipVisionClass::VisionModelWithProjection]
    }
}

impl Config for ClipVisionConfig {
    const CLASS_NAME: &'static str = "CLIPVisionModel";

    fn problems(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        let counts = [
            ("intermediate_size", self.intermediate_size),
            ("projection_dim", self.projection_dim),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_channels", self.num_channels),
            ("patch_size", self.patch_size),
        ];
        ensure_counts(&counts, &mut problems);
        ensure_heads(self.hidden_size, self.num_attention_heads, &mut problems);
        if self.image_size < self.patch_size.max(1) {
            let expected = format!("at least patch_size, {}", self.patch_size);
            problems.push(Invalid::new("image_size", self.image_size, expected));
        }
        ensure_numbers(
            self.layer_norm_eps,
            self.attention_dropout,
            [
                ("initializer_range", self.initializer_range),
                ("initializer_factor", self.initializer_factor),
            ],
            &mut problems,
        );
        problems
    }
}

impl ModelType for ClipVisionConfig {
    const MODEL_TYPE: &'static str = "clip_vision_model";
}
