//! The settings of a [`UNet2DConditionModel`](crate::UNet2DConditionModel), with the keys of diffusers.

use std::collections::BTreeSet;

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config::count_problems;
use crate::layers::Activation;
use crate::unet::pixels_config::{
    ClassEmbedType, CommonNumbers, SampleSize, TimeEmbeddingType, TimeScaleShift, level_problems,
};

/// One value for all levels, or one per level, the finest first.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, PerLevel, UNet2DConditionConfig, UnknownKeys};
///
/// let text = r#"{"attention_head_dim": [5, 10, 20, 20]}"#;
/// let config = UNet2DConditionConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.attention_head_dim.at(1), Some(10));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value for all levels, or a list with one per level")]
pub enum PerLevel<T> {
    /// The same for all levels.
    All(T),
    /// One per level.
    Each(Vec<T>),
}

impl<T: Copy> PerLevel<T> {
    /// The value of a level; `None` if the list is too short.
    pub fn at(&self, level: usize) -> Option<T> {
        match self {
            Self::All(value) => Some(*value),
            Self::Each(values) => values.get(level).copied(),
        }
    }

    fn length_problem(&self, key: &str, levels: usize) -> Option<Invalid> {
        match self {
            Self::Each(values) if values.len() != levels => {
                Some(wrong_length(key, values.len(), levels))
            }
            _ => None,
        }
    }
}

fn wrong_length(key: &str, len: usize, levels: usize) -> Invalid {
    let expected = format!("{levels} levels, the length of `block_out_channels`, or one number");
    Invalid::new(key, format!("{len} levels"), expected)
}

/// Blocks in the transformers of one level.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, TransformerDepth, UNet2DConditionConfig, UnknownKeys};
///
/// let text = r#"{"reverse_transformer_layers_per_block": [1, 1, 1, [1, 2, 2]]}"#;
/// let config = UNet2DConditionConfig::from_json(text, UnknownKeys::Refuse)?;
/// let depths = config.reverse_transformer_layers_per_block.unwrap_or_default();
/// assert_eq!(depths.first(), Some(&TransformerDepth::All(1)));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number of blocks, or a list with one per transformer")]
pub enum TransformerDepth {
    /// The same number in each.
    All(u32),
    /// One number per transformer.
    Each(Vec<u32>),
}

impl TransformerDepth {
    /// Blocks of one of the transformers; the length of the list was checked.
    pub(crate) fn at(&self, index: usize) -> usize {
        match self {
            Self::All(depth) => *depth as usize,
            Self::Each(depths) => depths.get(index).map_or(0, |&depth| depth as usize),
        }
    }

    /// Whether there is exactly one number above 0 per transformer.
    fn fits(&self, num_layers: u32) -> bool {
        match self {
            Self::All(depth) => *depth > 0,
            Self::Each(depths) => depths.len() == num_layers as usize && !depths.contains(&0),
        }
    }
}

/// Blocks in the transformers of all levels.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, TransformerLayers, UNet2DConditionConfig, UnknownKeys};
///
/// let text = r#"{"transformer_layers_per_block": 2}"#;
/// let config = UNet2DConditionConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.transformer_layers_per_block, TransformerLayers::All(2));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number of blocks, or a list with one number or list per level"
)]
pub enum TransformerLayers {
    /// The same number everywhere.
    All(u32),
    /// Level by level, the finest first.
    Each(Vec<TransformerDepth>),
}

impl TransformerLayers {
    fn at(&self, level: usize) -> Option<TransformerDepth> {
        match self {
            Self::All(depth) => Some(TransformerDepth::All(*depth)),
            Self::Each(depths) => depths.get(level).cloned(),
        }
    }

    fn is_nested(&self) -> bool {
        let nested = |depth: &TransformerDepth| matches!(depth, TransformerDepth::Each(_));
        matches!(self, Self::Each(depths) if depths.iter().any(nested))
    }
}

/// A level of the down path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionDownBlockType {
    /// Residual blocks, each followed by a transformer.
    CrossAttnDownBlock2D,
    /// Residual blocks.
    #[serde(alias = "UNetResDownBlock2D")]
    DownBlock2D,
}

/// A level of the up path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionUpBlockType {
    /// Residual blocks, each followed by a transformer.
    CrossAttnUpBlock2D,
    /// Residual blocks.
    #[serde(alias = "UNetResUpBlock2D")]
    UpBlock2D,
}

/// The bottom level.
///
/// # Example
///
/// ```
/// use ddil_models::{ConditionMidBlockType, NetworkConfig, UNet2DConditionConfig, UnknownKeys};
///
/// let text = r#"{"mid_block_type": "UNetMidBlock2D"}"#;
/// let config = UNet2DConditionConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.mid_block_type, Some(ConditionMidBlockType::UNetMidBlock2D));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionMidBlockType {
    /// Two residual blocks with a transformer between them.
    UNetMidBlock2DCrossAttn,
    /// One residual block.
    UNetMidBlock2D,
}

/// The embedding of a whole text that is added to the embedding of the timestep.
///
/// # Example
///
/// ```
/// use ddil_models::{AdditionEmbedType, NetworkConfig, UNet2DConditionConfig, UnknownKeys};
///
/// let text = r#"{"addition_embed_type": "text"}"#;
/// let config = UNet2DConditionConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.addition_embed_type, Some(AdditionEmbedType::Text));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdditionEmbedType {
    /// A pooled text embedding and numbers of size and crop (SDXL).
    TextTime,
    /// The tokens of the text, pooled by attention.
    Text,
}

/// How blocks of a transformer attend.
///
/// # Example
///
/// ```
/// use ddil_models::{AttentionType, NetworkConfig, UNet2DConditionConfig, UnknownKeys};
///
/// let text = r#"{"attention_type": "default"}"#;
/// let config = UNet2DConditionConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.attention_type, AttentionType::Default);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionType {
    /// To the pixels, then to the text. The only supported type.
    #[default]
    Default,
}

/// The settings of a [`UNet2DConditionModel`](crate::UNet2DConditionModel); names, defaults and file format are those
/// of diffusers' class of that name.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, UNet2DConditionConfig};
///
/// // Names and shapes without the 3.4 GB of values.
/// let shapes = UNet2DConditionConfig::sd15().parameter_shapes()?;
/// let values: i64 = shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
/// assert_eq!(values, 859_520_964);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "they are keys of diffusers' file")]
pub struct UNet2DConditionConfig {
    /// Height and width of the training samples; others are accepted as well. Default none.
    pub sample_size: Option<SampleSize>,
    /// Channels of a sample. Default 4.
    pub in_channels: u32,
    /// Channels of the output. Default 4.
    pub out_channels: u32,
    /// Whether samples are in `[0, 1]` and have to be mapped to `[-1, 1]`. Default false.
    pub center_input_sample: bool,
    /// Whether cosines come before sines. Default true.
    pub flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in their spacing. Default 0.
    pub freq_shift: f64,
    /// Levels of the down path, the finest first. Default three with cross attention and one without.
    pub down_block_types: Vec<ConditionDownBlockType>,
    /// The bottom level; none omits it. Default with cross attention.
    pub mid_block_type: Option<ConditionMidBlockType>,
    /// Levels of the up path, the coarsest first; as many as in the down path.
    pub up_block_types: Vec<ConditionUpBlockType>,
    /// Whether the first attention of every block also attends to the text; that of the bottom level never does.
    /// Default false.
    pub only_cross_attention: PerLevel<bool>,
    /// Channels of each level, the finest first. Default 320, 640, 1280, 1280.
    pub block_out_channels: Vec<u32>,
    /// Residual blocks per level of the down path; the up path has one more. Default 2.
    pub layers_per_block: PerLevel<u32>,
    /// Padding of the convolution that halves a map: 1, the default, or 0 for padding only at the right and bottom.
    pub downsample_padding: u32,
    /// Divisor of the output of the bottom level's residual blocks. Default 1.
    pub mid_block_scale_factor: f64,
    /// Probability that a feature of a residual block is dropped in training. Default 0.
    pub dropout: f64,
    /// The nonlinearity of residual blocks. Default silu.
    pub act_fn: Activation,
    /// Groups of every group norm. Default 32.
    pub norm_num_groups: u32,
    /// Added to a variance before its root is taken, in residual blocks. Default 1e-5.
    pub norm_eps: f64,
    /// Width of the text's embeddings; levels with cross attention all have the same. Default 1280.
    pub cross_attention_dim: PerLevel<u32>,
    /// Blocks in a transformer. Default 1.
    pub transformer_layers_per_block: TransformerLayers,
    /// The same for the up path, the coarsest level first; none, the default, mirrors the down path, which must not
    /// contain nested lists in this case.
    pub reverse_transformer_layers_per_block: Option<Vec<TransformerDepth>>,
    /// Width of a text that is projected before use. Only none is supported.
    pub encoder_hid_dim: Option<u32>,
    /// How a text is projected before use. Only none is supported.
    pub encoder_hid_dim_type: Option<String>,
    /// Heads of every attention, **not** their size: the name is a mistake in diffusers' files. A head has channels /
    /// `attention_head_dim` channels. Default 8.
    pub attention_head_dim: PerLevel<u32>,
    /// An error, as in diffusers, as long as `attention_head_dim` has that meaning.
    pub num_attention_heads: Option<PerLevel<u32>>,
    /// Whether there are two transformers in parallel. Only false is supported.
    pub dual_cross_attention: bool,
    /// Whether the projections of a transformer are linear layers instead of 1x1 convolutions. Default false.
    pub use_linear_projection: bool,
    /// The type of class labels; none means indices if `num_class_embeds` is given, and no classes otherwise.
    pub class_embed_type: Option<ClassEmbedType>,
    /// The embedding of the whole text that is added to the embedding of the timestep. Default none.
    pub addition_embed_type: Option<AdditionEmbedType>,
    /// Number of sines and cosines per number of size and crop, for [`AdditionEmbedType::TextTime`]. SDXL has 256.
    pub addition_time_embed_dim: Option<u32>,
    /// Size of the table of learned class embeddings.
    pub num_class_embeds: Option<u32>,
    /// Whether scores of attention are computed in `Float`. It has no effect, as in diffusers by default: libtorch's
    /// attention accumulates in `Float` for any kind.
    pub upcast_attention: Option<bool>,
    /// How a residual block applies the timestep. Default default.
    pub resnet_time_scale_shift: TimeScaleShift,
    /// A setting of unsupported blocks, without effect on the supported ones. Default false.
    pub resnet_skip_time_act: bool,
    /// A setting of unsupported blocks, without effect on the supported ones. Default 1.
    pub resnet_out_scale_factor: f64,
    /// How the timestep becomes features. Only positional is supported.
    pub time_embedding_type: TimeEmbeddingType,
    /// Width of the time embedding; none is four times the first of `block_out_channels`, the default.
    pub time_embedding_dim: Option<u32>,
    /// A further activation of the time embedding before the blocks. Default none.
    pub time_embedding_act_fn: Option<Activation>,
    /// An activation after the layers that embed the timestep, before class and text are added. Default none.
    pub timestep_post_act: Option<Activation>,
    /// Width of the embedding of a guidance weight, which is then an input of the network; none, the default, for a
    /// network without this input. 256 in the networks of [Luo et al. 2023](https://arxiv.org/abs/2310.04378).
    pub time_cond_proj_dim: Option<u32>,
    /// Height and width of the first convolution, odd. Default 3.
    pub conv_in_kernel: u32,
    /// Height and width of the last convolution, odd. Default 3.
    pub conv_out_kernel: u32,
    /// Width of class labels that are projected; or, for [`AdditionEmbedType::TextTime`], of the pooled text embedding
    /// and the features of all numbers of size and crop: 1280 + 6 * 256 = 2816 for SDXL.
    pub projection_class_embeddings_input_dim: Option<u32>,
    /// How blocks of a transformer attend. Only default is supported.
    pub attention_type: AttentionType,
    /// Whether the class embedding is concatenated with that of the timestep. Only false is supported.
    pub class_embeddings_concat: bool,
    /// A setting of an unsupported bottom level, without effect on the supported ones. Default none.
    pub mid_block_only_cross_attention: Option<bool>,
    /// A norm of the text before cross attention. Only none is supported.
    pub cross_attention_norm: Option<String>,
    /// Number of heads that pool the text for [`AdditionEmbedType::Text`]. Default 64.
    pub addition_embed_type_num_heads: u32,
}

impl Default for UNet2DConditionConfig {
    fn default() -> Self {
        use ConditionDownBlockType::{CrossAttnDownBlock2D, DownBlock2D};
        use ConditionUpBlockType::{CrossAttnUpBlock2D, UpBlock2D};
        let (cross_down, cross_up) = (CrossAttnDownBlock2D, CrossAttnUpBlock2D);
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: vec![cross_down, cross_down, cross_down, DownBlock2D],
            mid_block_type: Some(ConditionMidBlockType::UNetMidBlock2DCrossAttn),
            up_block_types: vec![UpBlock2D, cross_up, cross_up, cross_up],
            only_cross_attention: PerLevel::All(false),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerLevel::All(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            dropout: 0.0,
            act_fn: Activation::Silu,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerLevel::All(1280),
            transformer_layers_per_block: TransformerLayers::All(1),
            reverse_transformer_layers_per_block: None,
            encoder_hid_dim: None,
            encoder_hid_dim_type: None,
            attention_head_dim: PerLevel::All(8),
            num_attention_heads: None,
            dual_cross_attention: false,
            use_linear_projection: false,
            class_embed_type: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            num_class_embeds: None,
            upcast_attention: Some(false),
            resnet_time_scale_shift: TimeScaleShift::Default,
            resnet_skip_time_act: false,
            resnet_out_scale_factor: 1.0,
            time_embedding_type: TimeEmbeddingType::Positional,
            time_embedding_dim: None,
            time_embedding_act_fn: None,
            timestep_post_act: None,
            time_cond_proj_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            projection_class_embeddings_input_dim: None,
            attention_type: AttentionType::Default,
            class_embeddings_concat: false,
            mid_block_only_cross_attention: None,
            cross_attention_norm: None,
            addition_embed_type_num_heads: 64,
        }
    }
}

impl UNet2DConditionConfig {
    /// Stable Diffusion 1.5: 8 heads everywhere, text width 768, 859,520,964 parameters.
    pub fn sd15() -> Self {
        Self {
            sample_size: Some(SampleSize::Square(64)),
            cross_attention_dim: PerLevel::All(768),
            ..Self::default()
        }
    }

    /// Stable Diffusion 2.1 at 768 pixels, which predicts v: heads of 64 channels, text width 1024, linear projections,
    /// 865,910,724 parameters. The variant at 512 pixels, which predicts epsilon, differs only in `sample_size` (64).
    pub fn sd21() -> Self {
        Self {
            sample_size: Some(SampleSize::Square(96)),
            attention_head_dim: PerLevel::Each(vec![5, 10, 20, 20]),
            cross_attention_dim: PerLevel::All(1024),
            use_linear_projection: true,
            upcast_attention: Some(true),
            ..Self::default()
        }
    }

    /// SDXL 1.0, base: three levels, the finest without attention, transformers of 2 and 10 blocks, text width 2048,
    /// and a pooled text with numbers of size and crop; 2,567,463,684 parameters.
    pub fn sdxl() -> Self {
        use ConditionDownBlockType::{CrossAttnDownBlock2D, DownBlock2D};
        use ConditionUpBlockType::{CrossAttnUpBlock2D, UpBlock2D};
        Self {
            sample_size: Some(SampleSize::Square(128)),
            down_block_types: vec![DownBlock2D, CrossAttnDownBlock2D, CrossAttnDownBlock2D],
            up_block_types: vec![CrossAttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D],
            block_out_channels: vec![320, 640, 1280],
            cross_attention_dim: PerLevel::All(2048),
            transformer_layers_per_block: TransformerLayers::Each(
                [1, 2, 10].map(TransformerDepth::All).into(),
            ),
            attention_head_dim: PerLevel::Each(vec![5, 10, 20]),
            use_linear_projection: true,
            addition_embed_type: Some(AdditionEmbedType::TextTime),
            addition_time_embed_dim: Some(256),
            upcast_attention: None,
            projection_class_embeddings_input_dim: Some(2816),
            ..Self::default()
        }
    }

    /// SSD-1B of [Gupta et al. 2024](https://arxiv.org/abs/2401.02677): SDXL with a bottom level of one residual block
    /// and fewer transformer blocks; 1,331,334,404 parameters.
    ///
    /// Depths and the bottom level are those expected by public loaders of its single-file checkpoint. Its
    /// `config.json` was not available: its value for the transformers of the finest level, which has none, may differ
    /// without effect.
    pub fn ssd_1b() -> Self {
        use TransformerDepth::{All, Each};
        let down = vec![All(1), Each(vec![2, 2]), Each(vec![4, 4])];
        let up = vec![Each(vec![4, 4, 10]), Each(vec![2, 1, 1]), All(1)];
        Self {
            mid_block_type: Some(ConditionMidBlockType::UNetMidBlock2D),
            transformer_layers_per_block: TransformerLayers::Each(down),
            reverse_transformer_layers_per_block: Some(up),
            ..Self::sdxl()
        }
    }

    /// Width of the embedding of timestep, class and text.
    pub(crate) fn time_width(&self) -> i64 {
        let width = self.time_embedding_dim.map(i64::from);
        width.unwrap_or_else(|| 4 * i64::from(self.block_out_channels[0]))
    }

    /// Channels of every level, as tensor sizes.
    pub(crate) fn channels(&self) -> Vec<i64> {
        self.block_out_channels.iter().copied().map(i64::from).collect()
    }

    /// Width of the text for levels with cross attention; `None` if there are none.
    pub(crate) fn text_width(&self) -> Option<u32> {
        let place = self.cross_attention().into_iter().next();
        place.and_then(|place| self.cross_attention_dim.at(place.level))
    }

    /// The transformers of a level of the down path, if it has cross attention.
    pub(crate) fn cross_down(&self, level: usize) -> Option<CrossAttention> {
        let block_type = self.down_block_types.get(level)?;
        (*block_type == ConditionDownBlockType::CrossAttnDownBlock2D).then(|| CrossAttention {
            level,
            num_layers: self.num_layers(level),
            key: format!("transformer_layers_per_block[{level}]"),
            depth: self.transformer_layers_per_block.at(level),
        })
    }

    /// The transformers of the bottom level, if it has cross attention.
    pub(crate) fn cross_mid(&self) -> Option<CrossAttention> {
        let crosses = self.mid_block_type == Some(ConditionMidBlockType::UNetMidBlock2DCrossAttn);
        let level = self.block_out_channels.len().checked_sub(1).filter(|_| crosses)?;
        let depth = match self.transformer_layers_per_block.at(level) {
            // There is one transformer, and diffusers uses the first number of a list.
            Some(TransformerDepth::Each(depths)) => {
                Some(TransformerDepth::All(depths.first().copied().unwrap_or(0)))
            }
            depth => depth,
        };
        let key = format!("transformer_layers_per_block[{level}]");
        Some(CrossAttention { level, num_layers: 1, key, depth })
    }

    /// The transformers of level `i` of the up path, if it has cross attention.
    pub(crate) fn cross_up(&self, i: usize) -> Option<CrossAttention> {
        let block_type = self.up_block_types.get(i)?;
        let level = self.block_out_channels.len().checked_sub(i + 1)?;
        let (key, depth) = match &self.reverse_transformer_layers_per_block {
            Some(depths) => {
                (format!("reverse_transformer_layers_per_block[{i}]"), depths.get(i).cloned())
            }
            None => (
                format!("transformer_layers_per_block[{level}]"),
                self.transformer_layers_per_block.at(level),
            ),
        };
        (*block_type == ConditionUpBlockType::CrossAttnUpBlock2D).then(|| {
            let num_layers = self.num_layers(level).saturating_add(1);
            CrossAttention { level, num_layers, key, depth }
        })
    }

    /// Residual blocks of a level of the down path.
    pub(crate) fn num_layers(&self, level: usize) -> u32 {
        self.layers_per_block.at(level).unwrap_or(0)
    }

    /// All levels with cross attention: down, bottom, up.
    fn cross_attention(&self) -> Vec<CrossAttention> {
        let down = (0..self.down_block_types.len()).filter_map(|level| self.cross_down(level));
        let up = (0..self.up_block_types.len()).filter_map(|i| self.cross_up(i));
        down.chain(self.cross_mid()).chain(up).collect()
    }

    pub(super) fn check(&self) -> Vec<Invalid> {
        let mut problems = level_problems(
            &self.block_out_channels,
            self.norm_num_groups,
            self.down_block_types.len(),
            self.up_block_types.len(),
        );
        problems.extend(self.length_problems());
        problems.extend(self.attention_problems());
        problems.extend(self.embedding_problems());
        problems.extend(self.number_problems());
        problems.extend(self.unsupported());
        problems
    }

    fn length_problems(&self) -> Vec<Invalid> {
        let levels = self.block_out_channels.len();
        let mut problems: Vec<_> = [
            self.only_cross_attention.length_problem("only_cross_attention", levels),
            self.layers_per_block.length_problem("layers_per_block", levels),
            self.cross_attention_dim.length_problem("cross_attention_dim", levels),
            self.attention_head_dim.length_problem("attention_head_dim", levels),
        ]
        .into_iter()
        .flatten()
        .collect();
        let (key, reverse_key) =
            ("transformer_layers_per_block", "reverse_transformer_layers_per_block");
        if let TransformerLayers::Each(depths) = &self.transformer_layers_per_block
            && depths.len() != levels
        {
            problems.push(wrong_length(key, depths.len(), levels));
        }
        match &self.reverse_transformer_layers_per_block {
            Some(depths) if depths.len() != levels => {
                problems.push(wrong_length(reverse_key, depths.len(), levels));
            }
            None if self.transformer_layers_per_block.is_nested() => {
                let expected = format!("a list, because `{key}` contains lists");
                problems.push(Invalid::new(reverse_key, "null", expected));
            }
            _ => {}
        }
        problems
    }

    fn attention_problems(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        let places = self.cross_attention();
        let levels: BTreeSet<usize> = places.iter().map(|place| place.level).collect();
        let channels = |level: usize| self.block_out_channels.get(level).copied();
        for &level in &levels {
            if let (Some(heads), Some(channels)) =
                (self.attention_head_dim.at(level), channels(level))
                && (heads == 0 || channels % heads != 0)
            {
                let expected = format!(
                    "a number of heads that divides block_out_channels[{level}], {channels}"
                );
                problems.push(Invalid::new("attention_head_dim", heads, expected));
            }
        }
        let widths: BTreeSet<u32> =
            levels.iter().filter_map(|&level| self.cross_attention_dim.at(level)).collect();
        if widths.len() > 1 || widths.contains(&0) {
            let found = format!("{widths:?} at the levels with cross attention");
            let expected = "one width above 0, because all levels attend to the same text";
            problems.push(Invalid::new("cross_attention_dim", found, expected));
        }
        // A mirrored list is checked twice.
        let mut seen = BTreeSet::new();
        for CrossAttention { num_layers, key, depth, .. } in places {
            if let Some(depth) = depth.filter(|depth| !depth.fits(num_layers))
                && seen.insert(key.clone())
            {
                let expected = format!("above 0, or a list of length {num_layers}");
                problems.push(Invalid::new(key, format!("{depth:?}"), expected));
            }
        }
        problems
    }

    fn embedding_problems(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        let width = self.projection_class_embeddings_input_dim;
        let key = "projection_class_embeddings_input_dim";
        let projects = matches!(
            self.class_embed_type,
            Some(ClassEmbedType::Projection | ClassEmbedType::SimpleProjection)
        );
        let text_time = self.addition_embed_type == Some(AdditionEmbedType::TextTime);
        if width.is_none() && (projects || text_time) {
            let expected = "the width of what is projected, for this class_embed_type or \
                            addition_embed_type";
            problems.push(Invalid::new(key, "null", expected));
        }
        if text_time {
            let features = self.addition_time_embed_dim.unwrap_or(0);
            if f64::from(features / 2) <= self.freq_shift.max(0.0) {
                let found = self.addition_time_embed_dim.map_or("null".into(), |n| n.to_string());
                let expected =
                    "the number of sines and cosines: at least 2 and more than twice freq_shift";
                problems.push(Invalid::new("addition_time_embed_dim", found, expected));
            }
        }
        if self.addition_embed_type == Some(AdditionEmbedType::Text) {
            problems.extend(self.pooling_problem());
        }
        problems
    }

    fn pooling_problem(&self) -> Option<Invalid> {
        let heads = self.addition_embed_type_num_heads;
        match self.cross_attention_dim {
            PerLevel::Each(_) => Some(Invalid::new(
                "cross_attention_dim",
                "a list",
                "one width, for the addition_embed_type text",
            )),
            PerLevel::All(width) if heads == 0 || width == 0 || width % heads != 0 => {
                let expected = format!("a divisor of cross_attention_dim, {width}");
                Some(Invalid::new("addition_embed_type_num_heads", heads, expected))
            }
            PerLevel::All(_) => None,
        }
    }

    /// Values that diffusers supports and this crate does not.
    fn unsupported(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        let mut refuse = |key: &str, found: Option<String>, expected: &str| {
            problems.extend(found.map(|found| Invalid::new(key, found, expected)));
        };
        let is_set = |set: bool| set.then(|| "true".to_owned());
        refuse("dual_cross_attention", is_set(self.dual_cross_attention), "false");
        refuse("class_embeddings_concat", is_set(self.class_embeddings_concat), "false");
        refuse("encoder_hid_dim", self.encoder_hid_dim.map(|dim| dim.to_string()), "null");
        refuse("encoder_hid_dim_type", self.encoder_hid_dim_type.clone(), "null");
        refuse("cross_attention_norm", self.cross_attention_norm.clone(), "null");
        let heads = self.num_attention_heads.as_ref().map(|heads| format!("{heads:?}"));
        refuse("num_attention_heads", heads, "null; the number of heads is `attention_head_dim`");
        let fourier = self.time_embedding_type == TimeEmbeddingType::Fourier;
        refuse("time_embedding_type", fourier.then(|| "fourier".to_owned()), "positional");
        problems
    }

    fn number_problems(&self) -> Vec<Invalid> {
        let mut problems = count_problems(&[
            ("in_channels", Some(self.in_channels)),
            ("out_channels", Some(self.out_channels)),
            ("norm_num_groups", Some(self.norm_num_groups)),
            ("time_embedding_dim", self.time_embedding_dim),
            ("num_class_embeds", self.num_class_embeds),
            ("projection_class_embeddings_input_dim", self.projection_class_embeddings_input_dim),
        ]);
        if (0..self.block_out_channels.len())
            .any(|level| self.layers_per_block.at(level) == Some(0))
        {
            problems.push(Invalid::new("layers_per_block", 0, "at least 1"));
        }
        let kernels =
            [("conv_in_kernel", self.conv_in_kernel), ("conv_out_kernel", self.conv_out_kernel)];
        for (key, kernel) in kernels.into_iter().filter(|(_, kernel)| kernel % 2 == 0) {
            problems.push(Invalid::new(key, kernel, "odd, so that maps keep their size"));
        }
        let numbers = CommonNumbers {
            downsample_padding: self.downsample_padding,
            dropout: self.dropout,
            mid_block_scale_factor: self.mid_block_scale_factor,
            norm_eps: self.norm_eps,
            freq_shift: self.freq_shift,
            time_features: Some(self.block_out_channels.first().copied().unwrap_or(2)),
            time_cond_proj_dim: self.time_cond_proj_dim,
        };
        problems.extend(numbers.problems());
        problems
    }
}

/// The transformers of a level, in one direction.
#[derive(Clone, Debug)]
pub(crate) struct CrossAttention {
    /// The level; the finest is 0.
    pub(crate) level: usize,
    /// Number of transformers.
    num_layers: u32,
    /// The setting of their depth.
    key: String,
    pub(crate) depth: Option<TransformerDepth>,
}
