//! The settings of both towers of CLIP, with the keys of transformers.

use std::path::Path;

use ddil_files::{Invalid, JsonSettings};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{self, Config, UnknownKeys};
use crate::error::{Error, Result};

use super::settings::{ModelType, ensure_counts, keep_problems, read};
use super::text_config::ClipTextConfig;
use super::vision_config::ClipVisionConfig;

/// The settings of both towers of a [`ClipModel`](crate::ClipModel); transformers' `CLIPConfig`.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipConfig, ClipTextConfig, ClipVisionConfig, Placement};
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
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// The text encoder; its class and `projection_dim` are ignored.
    pub text: ClipTextConfig,
    /// The vision tower; its class and `projection_dim` are ignored.
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

impl ClipConfig {
    /// Reads settings from the `config.json` of a `CLIPModel`, as [`ClipTextConfig::from_file`].
    ///
    /// Older files contain a tower's settings twice; as in transformers, `text_config_dict` overrides `text_config`.
    ///
    /// # Errors
    ///
    /// As [`ClipTextConfig::from_file`], with the problems of both towers.
    pub fn from_file(path: impl AsRef<Path>, unknown_keys: UnknownKeys) -> Result<Self> {
        let path = path.as_ref();
        let mut file = config::read_file(path)?;
        let mut problems = Vec::new();
        let text = nested(&mut file, "text_config", unknown_keys, &mut problems);
        let vision = nested(&mut file, "vision_config", unknown_keys, &mut problems);
        let what = path.display().to_string();
        let whole: Option<Whole> = keep_problems(read(&what, file, unknown_keys), &mut problems)?;
        match (text, vision, whole) {
            (Some(text), Some(vision), Some(whole)) if problems.is_empty() => Ok(Self {
                text,
                vision,
                projection_dim: whole.projection_dim,
                logit_scale_init_value: whole.logit_scale_init_value,
            }),
            _ => Err(Error::InvalidConfig { what, problems }),
        }
    }
}

/// The keys other than the towers in the file of a [`ClipConfig`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Whole {
    architectures: [WholeClass; 1],
    projection_dim: u32,
    logit_scale_init_value: f64,
    initializer_factor: f64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
enum WholeClass {
    #[default]
    #[serde(rename = "CLIPModel")]
    Clip,
}

impl Default for Whole {
    fn default() -> Self {
        Self {
            architectures: [WholeClass::Clip],
            projection_dim: 512,
            logit_scale_init_value: 2.6592,
            initializer_factor: 1.0,
        }
    }
}

impl Config for Whole {
    const CLASS_NAME: &'static str = "CLIPModel";

    fn problems(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        ensure_counts(&[("projection_dim", self.projection_dim)], &mut problems);
        problems
    }
}

impl ModelType for Whole {
    const MODEL_TYPE: &'static str = "clip";
}

/// Removes a tower's settings from the file of both towers and reads them.
fn nested<C: ModelType>(
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
    match read(key, tower.into(), unknown_keys) {
        Ok(config) => Some(config),
        Err(Error::InvalidConfig { problems: more, .. }) => {
            let named = more.into_iter().map(|problem| problem.under(key));
            problems.extend(named);
            None
        }
        Err(other) => {
            problems.push(Invalid::new(key, other, "settings"));
            None
        }
    }
}
