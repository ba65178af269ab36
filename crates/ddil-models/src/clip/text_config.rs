//! The settings of a [`ClipTextModel`](crate::ClipTextModel), with the keys of transformers.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config::count_problems;

use super::settings::{ClipActivation, EncoderSettings};

/// The `eos_token_id` for which the pooled position is that of the largest token.
pub(super) const LARGEST_TOKEN: i64 = 2;

/// The class of a text encoder: with or without a projection.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipTextClass, ClipTextConfig, NetworkConfig, UnknownKeys};
///
/// let text = r#"{"architectures": ["CLIPTextModelWithProjection"]}"#;
/// let config = ClipTextConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.architectures, [ClipTextClass::TextModelWithProjection]);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClipTextClass {
    /// Hidden states only, for Stable Diffusion.
    #[default]
    #[serde(rename = "CLIPTextModel")]
    TextModel,
    /// With `text_embeds`, for the second encoder of Stable Diffusion XL and the score.
    #[serde(rename = "CLIPTextModelWithProjection")]
    TextModelWithProjection,
}

/// The settings of a [`ClipTextModel`](crate::ClipTextModel); names, defaults and file format are those of
/// transformers' class of that name.
///
/// Dropout is not applied: in every published encoder it is 0.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipTextConfig, NetworkConfig, Placement};
///
/// let config = ClipTextConfig {
///     vocab_size: 100,
///     hidden_size: 8,
///     intermediate_size: 16,
///     num_hidden_layers: 2,
///     num_attention_heads: 2,
///     eos_token_id: 99,
///     ..ClipTextConfig::default()
/// };
/// let encoder = config.build(Placement::default(), 0)?;
/// assert_eq!(ClipTextConfig::stable_diffusion_2().num_hidden_layers, 23);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipTextConfig {
    /// The class; without projection if the file does not contain it.
    pub architectures: [ClipTextClass; 1],
    /// Number of tokens. Default 49408.
    pub vocab_size: u32,
    /// Width of a hidden state. Default 512.
    pub hidden_size: u32,
    /// Width between the two linear layers that follow attention. Default 2048.
    pub intermediate_size: u32,
    /// Width of `text_embeds`; unused by a class without projection. Default 512.
    pub projection_dim: Option<u32>,
    /// Default 12.
    pub num_hidden_layers: u32,
    /// Default 8.
    pub num_attention_heads: u32,
    /// Length of the longest prompt, in tokens. Default 77.
    pub max_position_embeddings: u32,
    /// The nonlinearity. Default quick gelu.
    pub hidden_act: ClipActivation,
    /// Added to a variance before taking its root. Default 1e-5.
    pub layer_norm_eps: f64,
    /// Written back; not applied. Default 0.
    pub attention_dropout: f64,
    /// Written back; transformers uses it only in the vision tower. Default 0.02.
    pub initializer_range: f64,
    /// Scale of fresh parameters. Default 1.
    pub initializer_factor: f64,
    /// Not used in a forward pass. Default 1.
    pub pad_token_id: Option<i64>,
    /// Not used in a forward pass. Default 49406.
    pub bos_token_id: Option<i64>,
    /// The token whose first position is pooled; 2, as in older files, means the largest token of a prompt.
    /// Default 49407.
    pub eos_token_id: i64,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            architectures: [ClipTextClass::TextModel],
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: Some(512),
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            initializer_factor: 1.0,
            pad_token_id: Some(1),
            bos_token_id: Some(49406),
            eos_token_id: 49407,
        }
    }
}

impl ClipTextConfig {
    /// The encoder of Stable Diffusion 1 and the first one of Stable Diffusion XL: CLIP's `ViT-L/14`.
    pub fn stable_diffusion() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: Some(768),
            num_attention_heads: 12,
            bos_token_id: Some(0),
            eos_token_id: 2,
            ..Self::default()
        }
    }

    /// The encoder of Stable Diffusion 2: `OpenCLIP`'s `ViT-H/14` without its last layer.
    pub fn stable_diffusion_2() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            projection_dim: Some(512),
            num_hidden_layers: 23,
            num_attention_heads: 16,
            hidden_act: ClipActivation::Gelu,
            ..Self::stable_diffusion()
        }
    }

    /// The second encoder of Stable Diffusion XL: `OpenCLIP`'s `ViT-bigG/14`, with projection.
    pub fn stable_diffusion_xl_second() -> Self {
        Self {
            architectures: [ClipTextClass::TextModelWithProjection],
            hidden_size: 1280,
            intermediate_size: 5120,
            projection_dim: Some(1280),
            num_hidden_layers: 32,
            num_attention_heads: 20,
            ..Self::stable_diffusion_2()
        }
    }

    /// Whether there is a projection.
    pub(super) fn projects(&self) -> bool {
        self.architectures == [ClipTextClass::TextModelWithProjection]
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
            ("vocab_size", Some(self.vocab_size)),
            ("max_position_embeddings", Some(self.max_position_embeddings)),
            ("projection_dim", self.projection_dim),
        ]);
        problems.extend(self.encoder().problems());
        if self.projection_dim.is_none() && self.projects() {
            problems.push(Invalid::new("projection_dim", "null", "a width"));
        }
        let eos = self.eos_token_id;
        if eos != LARGEST_TOKEN && !(0..self.vocab_size.into()).contains(&eos) {
            let expected = format!("{LARGEST_TOKEN}, or less than vocab_size, {}", self.vocab_size);
            problems.push(Invalid::new("eos_token_id", eos, expected));
        }
        problems
    }
}
