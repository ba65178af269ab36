//! The settings of both towers of CLIP, with the keys of transformers.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config::count_problems;

use super::text_config::ClipTextConfig;
use super::vision_config::ClipVisionConfig;

/// The settings of both towers of a [`ClipModel`](crate::ClipModel); transformers' `CLIPConfig`.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipConfig, ClipTextConfig, ClipVisionConfig, NetworkConfig, Placement};
///
/// let text = ClipTextConfig {
///     vocab_size: 100,
///     hidden_size: 8,
///     intermediate_size: 16,
///     num_hidden_layers: 1,
///     num_attention_heads: 2,
///     eos_token_id: 99,
///     ..ClipTextConfig::default()
/// };
/// let vision = ClipVisionConfig {
///     hidden_size: 12,
///     intermediate_size: 16,
///     num_hidden_layers: 1,
///     num_attention_heads: 2,
///     image_size: 16,
///     patch_size: 8,
///     ..ClipVisionConfig::default()
/// };
/// let config = ClipConfig { text, vision, projection_dim: 4, ..ClipConfig::default() };
/// let clip = config.build(Placement::default(), 0)?;
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipConfig {
    /// The text encoder; its class and `projection_dim` are ignored.
    #[serde(rename = "text_config")]
    pub text: ClipTextConfig,
    /// The vision tower; its class and `projection_dim` are ignored.
    #[serde(rename = "vision_config")]
    pub vision: ClipVisionConfig,
    /// Width of both towers' embeddings. Default 512.
    pub projection_dim: u32,
    /// The initial logarithm of the temperature. Default 2.6592.
    pub logit_scale_init_value: f64,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            text: ClipTextConfig::default(),
            vision: ClipVisionConfig::default(),
            projection_dim: 512,
            logit_scale_init_value: 2.6592,
        }
    }
}

/// The keys other than the towers in the file of a [`ClipConfig`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct OtherKeys {
    architectures: [BothTowers; 1],
    pub(super) projection_dim: u32,
    pub(super) logit_scale_init_value: f64,
    initializer_factor: f64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
enum BothTowers {
    #[default]
    #[serde(rename = "CLIPModel")]
    Clip,
}

impl Default for OtherKeys {
    fn default() -> Self {
        let ClipConfig { projection_dim, logit_scale_init_value, .. } = ClipConfig::default();
        let architectures = [BothTowers::Clip];
        Self { architectures, projection_dim, logit_scale_init_value, initializer_factor: 1.0 }
    }
}

impl OtherKeys {
    pub(super) fn problems(&self) -> Vec<Invalid> {
        count_problems(&[("projection_dim", Some(self.projection_dim))])
    }
}
