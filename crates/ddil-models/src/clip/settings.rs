//! The settings that both towers share.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::config::count_problems;

/// The nonlinearity of a CLIP tower, spelt as in transformers.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipActivation, ClipTextConfig, NetworkConfig, UnknownKeys};
///
/// let text = r#"{"hidden_act": "quick_gelu"}"#;
/// let config = ClipTextConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.hidden_act, ClipActivation::QuickGelu);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipActivation {
    /// `x * sigmoid(1.702 x)`, of `OpenAI`'s networks.
    #[default]
    QuickGelu,
    /// `x` times the cumulative normal distribution function of `x`, of `OpenCLIP`'s networks.
    Gelu,
}

impl ClipActivation {
    pub(super) fn forward(self, x: &Tensor) -> crate::layers::Output {
        match self {
            Self::QuickGelu => x.f_mul(&x.f_mul_scalar(1.702)?.f_sigmoid()?),
            Self::Gelu => x.f_gelu("none"),
        }
    }
}

/// The settings of a tower's transformer, under the names that both towers have for them.
#[derive(Clone, Copy, Debug)]
pub(super) struct EncoderSettings {
    pub(super) hidden_size: u32,
    pub(super) intermediate_size: u32,
    pub(super) num_hidden_layers: u32,
    pub(super) num_attention_heads: u32,
    pub(super) hidden_act: ClipActivation,
    pub(super) layer_norm_eps: f64,
    pub(super) attention_dropout: f64,
    pub(super) initializer_range: f64,
    pub(super) initializer_factor: f64,
}

impl EncoderSettings {
    pub(super) fn problems(&self) -> Vec<Invalid> {
        let mut problems = count_problems(&[
            ("hidden_size", Some(self.hidden_size)),
            ("intermediate_size", Some(self.intermediate_size)),
            ("num_hidden_layers", Some(self.num_hidden_layers)),
        ]);
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        if heads == 0 || !width.is_multiple_of(heads) {
            let expected = format!("a divisor of hidden_size, {width}");
            problems.push(Invalid::new("num_attention_heads", heads, expected));
        }
        let mut refuse_unless = |fits: bool, key: &str, value: f64, expected: &str| {
            if !fits {
                problems.push(Invalid::new(key, value, expected));
            }
        };
        let eps = self.layer_norm_eps;
        refuse_unless(eps > 0.0 && eps.is_finite(), "layer_norm_eps", eps, "above 0");
        let (dropout, share) = (self.attention_dropout, "at least 0 and less than 1");
        refuse_unless((0.0..1.0).contains(&dropout), "attention_dropout", dropout, share);
        for (key, scale) in [
            ("initializer_range", self.initializer_range),
            ("initializer_factor", self.initializer_factor),
        ] {
            refuse_unless(scale >= 0.0 && scale.is_finite(), key, scale, "at least 0");
        }
        problems
    }
}
