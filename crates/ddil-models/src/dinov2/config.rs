//! The settings of a [`Dinov2Model`](crate::Dinov2Model), with the keys of transformers.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config::count_problems;
use crate::layers::Activation;

/// The settings of a [`Dinov2Model`](crate::Dinov2Model); names, defaults and file format are those of transformers'
/// class of that name.
///
/// # Example
///
/// ```
/// use ddil_models::{Dinov2Config, NetworkConfig, UnknownKeys};
///
/// let text = r#"{"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "image_size": 518}"#;
/// let config = Dinov2Config::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!((config.num_hidden_layers, config.patch_size), (12, 14));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dinov2Config {
    /// Width of a token. Default 768.
    pub hidden_size: u32,
    /// Default 12.
    pub num_hidden_layers: u32,
    /// Default 12.
    pub num_attention_heads: u32,
    /// Width between the two linear layers that follow attention, in multiples of `hidden_size`. Default 4.
    pub mlp_ratio: u32,
    /// The nonlinearity between these; unused with `use_swiglu_ffn`. Default gelu.
    pub hidden_act: Activation,
    /// Written back; not applied. Default 0.
    pub hidden_dropout_prob: f64,
    /// Written back; not applied. Default 0.
    pub attention_probs_dropout_prob: f64,
    /// Standard deviation of fresh parameters. Default 0.02.
    pub initializer_range: f64,
    /// Added to a variance before taking its root. Default 1e-6.
    pub layer_norm_eps: f64,
    /// Height and width of the images whose position embeddings are stored; 518 in published files. Default 224.
    pub image_size: u32,
    /// Height and width of a patch. Default 14.
    pub patch_size: u32,
    /// Channels of an image. Default 3.
    pub num_channels: u32,
    /// Whether queries, keys and values have a bias. Default true.
    pub qkv_bias: bool,
    /// The initial scale of the output of attention and of the layers that follow it. Default 1.
    pub layerscale_value: f64,
    /// Written back; not applied. Default 0.
    pub drop_path_rate: f64,
    /// Whether a gated unit replaces the two linear layers, as in the largest published network. Default false.
    pub use_swiglu_ffn: bool,
    /// Whether there is an embedding of masked patches, which only pretraining uses. Default true.
    pub use_mask_token: bool,
}

impl Default for Dinov2Config {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            mlp_ratio: 4,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            initializer_range: 0.02,
            layer_norm_eps: 1e-6,
            image_size: 224,
            patch_size: 14,
            num_channels: 3,
            qkv_bias: true,
            layerscale_value: 1.0,
            drop_path_rate: 0.0,
            use_swiglu_ffn: false,
            use_mask_token: true,
        }
    }
}

impl Dinov2Config {
    /// Width between the two linear layers, or of the gated unit.
    pub(super) fn inner_width(&self) -> i64 {
        let width = i64::from(self.hidden_size) * i64::from(self.mlp_ratio);
        // As in the published networks: as many parameters as without gates, in multiples of 8.
        if self.use_swiglu_ffn { (width * 2 / 3 + 7) / 8 * 8 } else { width }
    }

    pub(super) fn check(&self) -> Vec<Invalid> {
        let mut problems = count_problems(&[
            ("hidden_size", Some(self.hidden_size)),
            ("num_hidden_layers", Some(self.num_hidden_layers)),
            ("mlp_ratio", Some(self.mlp_ratio)),
            ("num_channels", Some(self.num_channels)),
            ("patch_size", Some(self.patch_size)),
        ]);
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        if heads == 0 || !width.is_multiple_of(heads) {
            let expected = format!("a divisor of hidden_size, {width}");
            problems.push(Invalid::new("num_attention_heads", heads, expected));
        }
        if self.image_size < self.patch_size.max(1) {
            let expected = format!("at least patch_size, {}", self.patch_size);
            problems.push(Invalid::new("image_size", self.image_size, expected));
        }
        let mut refuse_unless = |fits: bool, key: &str, value: f64, expected: &str| {
            if !fits {
                problems.push(Invalid::new(key, value, expected));
            }
        };
        let eps = self.layer_norm_eps;
        refuse_unless(eps > 0.0 && eps.is_finite(), "layer_norm_eps", eps, "above 0");
        for (key, share) in [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("drop_path_rate", self.drop_path_rate),
        ] {
            refuse_unless((0.0..1.0).contains(&share), key, share, "at least 0 and less than 1");
        }
        let range = self.initializer_range;
        refuse_unless(range >= 0.0 && range.is_finite(), "initializer_range", range, "at least 0");
        let scale = self.layerscale_value;
        refuse_unless(scale.is_finite(), "layerscale_value", scale, "a finite number");
        problems
    }
}
