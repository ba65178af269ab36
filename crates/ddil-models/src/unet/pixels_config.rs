//! The settings of a [`UNet2DModel`](crate::UNet2DModel), with the keys of diffusers.

use ddil_files::Invalid;
use serde::{Deserialize, Serialize};

use crate::config::count_problems;
use crate::layers::Activation;
use crate::layers::embeddings::MIN_GUIDANCE_WIDTH;

/// Height and width of a sample.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, SampleSize, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"sample_size": [64, 96]}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.sample_size, Some(SampleSize::Rectangle([64, 96])));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a side, or a list of height and width")]
pub enum SampleSize {
    /// Both the same.
    Square(u32),
    /// Height, width.
    Rectangle([u32; 2]),
}

/// How the timestep becomes features.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, TimeEmbeddingType, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"time_embedding_type": "fourier"}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.time_embedding_type, TimeEmbeddingType::Fourier);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeEmbeddingType {
    /// Sines and cosines at fixed frequencies; timesteps are counted from 0.
    #[default]
    Positional,
    /// Sines and cosines of the logarithm at random frequencies; timesteps are noise levels above 0, and the output is
    /// divided by them.
    Fourier,
}

/// A level of the down path.
///
/// # Example
///
/// ```
/// use ddil_models::{DownBlockType, NetworkConfig, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"]}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.down_block_types[3], DownBlockType::AttnDownBlock2D);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DownBlockType {
    /// Residual blocks.
    #[serde(alias = "UNetResDownBlock2D")]
    DownBlock2D,
    /// Residual blocks, each followed by attention.
    #[serde(alias = "UNetResAttnDownBlock2D")]
    AttnDownBlock2D,
}

/// A level of the up path.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, UNet2DConfig, UnknownKeys, UpBlockType};
///
/// let text = r#"{"up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"]}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.up_block_types[0], UpBlockType::AttnUpBlock2D);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UpBlockType {
    /// Residual blocks.
    #[serde(alias = "UNetResUpBlock2D")]
    UpBlock2D,
    /// Residual blocks, each followed by attention.
    #[serde(alias = "UNetResAttnUpBlock2D")]
    AttnUpBlock2D,
}

/// The bottom level.
///
/// # Example
///
/// ```
/// use ddil_models::{MidBlockType, NetworkConfig, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"mid_block_type": null}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.mid_block_type, None::<MidBlockType>);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MidBlockType {
    /// Two residual blocks, with attention between them if `add_attention`.
    UNetMidBlock2D,
}

/// How height and width are halved and doubled.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, ResampleType, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"downsample_type": "conv"}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.downsample_type, ResampleType::Conv);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResampleType {
    /// By a convolution.
    #[default]
    Conv,
}

/// How a residual block applies the timestep.
///
/// # Example
///
/// ```
/// use ddil_models::{NetworkConfig, TimeScaleShift, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"resnet_time_scale_shift": "scale_shift"}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.resnet_time_scale_shift, TimeScaleShift::ScaleShift);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeScaleShift {
    /// Added to the features.
    #[default]
    Default,
    /// As scale and shift after the second norm.
    ScaleShift,
}

/// The type of class labels other than indices into a learned table.
///
/// # Example
///
/// ```
/// use ddil_models::{ClassEmbedType, NetworkConfig, UNet2DConfig, UnknownKeys};
///
/// let text = r#"{"class_embed_type": "timestep"}"#;
/// let config = UNet2DConfig::from_json(text, UnknownKeys::Refuse)?;
/// assert_eq!(config.class_embed_type, Some(ClassEmbedType::Timestep));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassEmbedType {
    /// Numbers, embedded like timesteps.
    Timestep,
    /// Embeddings of the width of the time embedding.
    Identity,
    /// Vectors, through two linear layers; only for a [`UNet2DConditionModel`](crate::UNet2DConditionModel).
    Projection,
    /// Vectors, through one linear layer; only for a [`UNet2DConditionModel`](crate::UNet2DConditionModel).
    SimpleProjection,
}

/// The settings of a [`UNet2DModel`](crate::UNet2DModel); names, defaults and file format are those of diffusers' class
/// of that name.
///
/// # Example
///
/// ```
/// use ddil_models::{DownBlockType, NetworkConfig, Placement, UNet2DConfig, UpBlockType};
///
/// let config = UNet2DConfig {
///     in_channels: 1,
///     out_channels: 1,
///     down_block_types: vec![DownBlockType::DownBlock2D, DownBlockType::AttnDownBlock2D],
///     up_block_types: vec![UpBlockType::AttnUpBlock2D, UpBlockType::UpBlock2D],
///     block_out_channels: vec![8, 16],
///     norm_num_groups: 4,
///     ..UNet2DConfig::default()
/// };
/// let unet = config.build(Placement::default(), 0)?;
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UNet2DConfig {
    /// Height and width of the training samples; others are accepted as well. Default none.
    pub sample_size: Option<SampleSize>,
    /// Channels of a sample. Default 3.
    pub in_channels: u32,
    /// Channels of the output. Default 3.
    pub out_channels: u32,
    /// Whether samples are in `[0, 1]` and have to be mapped to `[-1, 1]`. Default false.
    pub center_input_sample: bool,
    /// How the timestep becomes features. Default positional.
    pub time_embedding_type: TimeEmbeddingType,
    /// Width of the time embedding; none is four times the first of `block_out_channels`, the default.
    pub time_embedding_dim: Option<u32>,
    /// Subtracted from the number of frequencies in their spacing. Default 0.
    pub freq_shift: f64,
    /// Whether cosines come before sines. Default true.
    pub flip_sin_to_cos: bool,
    /// Levels of the down path, the finest first. Default one without and three with attention.
    pub down_block_types: Vec<DownBlockType>,
    /// The bottom level; none omits it.
    pub mid_block_type: Option<MidBlockType>,
    /// Levels of the up path, the coarsest first; as many as in the down path.
    pub up_block_types: Vec<UpBlockType>,
    /// Channels of each level, the finest first. Default 224, 448, 672, 896.
    pub block_out_channels: Vec<u32>,
    /// Residual blocks per level of the down path; the up path has one more. Default 2.
    pub layers_per_block: u32,
    /// Divisor of the output of the bottom level's blocks. Default 1.
    pub mid_block_scale_factor: f64,
    /// Padding of the convolution that halves a map: 1, the default, or 0 for padding only at the right and bottom.
    pub downsample_padding: u32,
    /// How maps are halved in levels with attention. Default conv; the only supported value.
    pub downsample_type: ResampleType,
    /// How maps are doubled in levels with attention. Default conv; the only supported value.
    pub upsample_type: ResampleType,
    /// Probability that a feature is dropped in training. Default 0.
    pub dropout: f64,
    /// The nonlinearity. Default silu.
    pub act_fn: Activation,
    /// Channels of an attention head; none is a single head. Default 8.
    pub attention_head_dim: Option<u32>,
    /// Groups of every group norm. Default 32.
    pub norm_num_groups: u32,
    /// Groups of the norm before the bottom level's attention; none is `norm_num_groups`, or no norm if
    /// `resnet_time_scale_shift` is not default.
    pub attn_norm_num_groups: Option<u32>,
    /// Added to a variance before taking its root. Default 1e-5.
    pub norm_eps: f64,
    /// How a residual block applies the timestep. Default default.
    pub resnet_time_scale_shift: TimeScaleShift,
    /// Whether the bottom level has attention. Default true.
    pub add_attention: bool,
    /// The type of class labels; none means indices if `num_class_embeds` is given, and no classes otherwise.
    pub class_embed_type: Option<ClassEmbedType>,
    /// Size of the table of learned class embeddings, a null class for guidance included.
    pub num_class_embeds: Option<u32>,
    /// Number of timesteps the network was trained with; not used in a forward pass.
    pub num_train_timesteps: Option<u32>,
    /// Width of the embedding of a guidance weight, which is then an input of the network; none, the default, for a
    /// network without this input. 256 is usual.
    ///
    /// The key is that of diffusers' `UNet2DConditionModel`; its `UNet2DModel` does not have it and would ignore it. It
    /// is therefore written to a `config.json` only if it is set, and diffusers cannot load a network that has it.
    pub time_cond_proj_dim: Option<u32>,
}

impl Default for UNet2DConfig {
    fn default() -> Self {
        use DownBlockType::{AttnDownBlock2D, DownBlock2D};
        use UpBlockType::{AttnUpBlock2D, UpBlock2D};
        Self {
            sample_size: None,
            in_channels: 3,
            out_channels: 3,
            center_input_sample: false,
            time_embedding_type: TimeEmbeddingType::Positional,
            time_embedding_dim: None,
            freq_shift: 0.0,
            flip_sin_to_cos: true,
            down_block_types: vec![DownBlock2D, AttnDownBlock2D, AttnDownBlock2D, AttnDownBlock2D],
            mid_block_type: Some(MidBlockType::UNetMidBlock2D),
            up_block_types: vec![AttnUpBlock2D, AttnUpBlock2D, AttnUpBlock2D, UpBlock2D],
            block_out_channels: vec![224, 448, 672, 896],
            layers_per_block: 2,
            mid_block_scale_factor: 1.0,
            downsample_padding: 1,
            downsample_type: ResampleType::Conv,
            upsample_type: ResampleType::Conv,
            dropout: 0.0,
            act_fn: Activation::Silu,
            attention_head_dim: Some(8),
            norm_num_groups: 32,
            attn_norm_num_groups: None,
            norm_eps: 1e-5,
            resnet_time_scale_shift: TimeScaleShift::Default,
            add_attention: true,
            class_embed_type: None,
            num_class_embeds: None,
            num_train_timesteps: None,
            time_cond_proj_dim: None,
        }
    }
}

impl UNet2DConfig {
    /// Width of the embedding of timestep and class.
    pub(crate) fn time_width(&self) -> i64 {
        let width = self.time_embedding_dim.map(i64::from);
        width.unwrap_or_else(|| 4 * i64::from(self.block_out_channels[0]))
    }

    /// Channels of every level, as tensor sizes.
    pub(crate) fn channels(&self) -> Vec<i64> {
        self.block_out_channels.iter().copied().map(i64::from).collect()
    }

    pub(super) fn check(&self) -> Vec<Invalid> {
        let mut problems = level_problems(
            &self.block_out_channels,
            self.norm_num_groups,
            self.down_block_types.len(),
            self.up_block_types.len(),
        );
        self.ensure_attention(&mut problems);
        self.ensure_numbers(&mut problems);
        problems
    }

    fn ensure_attention(&self, problems: &mut Vec<Invalid>) {
        let levels = self.block_out_channels.len();
        let attends = |i: usize| {
            self.down_block_types.get(i) == Some(&DownBlockType::AttnDownBlock2D)
                || self.up_block_types.iter().rev().nth(i) == Some(&UpBlockType::AttnUpBlock2D)
                || (i + 1 == levels && self.add_attention && self.mid_block_type.is_some())
        };
        for (i, &channels) in
            self.block_out_channels.iter().enumerate().filter(|&(i, _)| attends(i))
        {
            match self.attention_head_dim {
                Some(dim) if dim == 0 || channels % dim != 0 => {
                    let key = "attention_head_dim";
                    let expected = format!("a divisor of block_out_channels[{i}], {channels}");
                    problems.push(Invalid::new(key, dim, expected));
                }
                _ => {}
            }
        }
        if let (Some(groups), Some(&channels)) =
            (self.attn_norm_num_groups, self.block_out_channels.last())
            && (groups == 0 || channels % groups != 0)
        {
            let expected = format!("a divisor of the last of block_out_channels, {channels}");
            problems.push(Invalid::new("attn_norm_num_groups", groups, expected));
        }
    }

    fn ensure_numbers(&self, problems: &mut Vec<Invalid>) {
        problems.extend(count_problems(&[
            ("in_channels", Some(self.in_channels)),
            ("out_channels", Some(self.out_channels)),
            ("layers_per_block", Some(self.layers_per_block)),
            ("norm_num_groups", Some(self.norm_num_groups)),
            ("time_embedding_dim", self.time_embedding_dim),
            ("num_class_embeds", self.num_class_embeds),
        ]));
        let positional = self.time_embedding_type == TimeEmbeddingType::Positional;
        let first = self.block_out_channels.first().copied().unwrap_or(2);
        let numbers = CommonNumbers {
            downsample_padding: self.downsample_padding,
            dropout: self.dropout,
            mid_block_scale_factor: self.mid_block_scale_factor,
            norm_eps: self.norm_eps,
            freq_shift: self.freq_shift,
            time_features: positional.then_some(first),
            time_cond_proj_dim: self.time_cond_proj_dim,
        };
        problems.extend(numbers.problems());
        if let Some(found @ (ClassEmbedType::Projection | ClassEmbedType::SimpleProjection)) =
            self.class_embed_type
        {
            let found = format!("{found:?}");
            problems.push(Invalid::new("class_embed_type", found, "timestep or identity"));
        }
    }
}

/// The problems of the levels of a network.
pub(crate) fn level_problems(
    channels: &[u32],
    norm_num_groups: u32,
    num_down: usize,
    num_up: usize,
) -> Vec<Invalid> {
    let mut problems = Vec::new();
    let levels = channels.len();
    if levels == 0 {
        problems.push(Invalid::new("block_out_channels", "[]", "at least one level"));
    }
    let lists = [("down_block_types", num_down), ("up_block_types", num_up)];
    for (key, len) in lists.into_iter().filter(|&(_, len)| len != levels) {
        let expected = format!("{levels} levels, the length of `block_out_channels`");
        problems.push(Invalid::new(key, format!("{len} levels"), expected));
    }
    let groups = norm_num_groups.max(1);
    for (i, &channels) in channels.iter().enumerate() {
        if channels == 0 || channels % groups != 0 {
            let (key, expected) = (
                format!("block_out_channels[{i}]"),
                format!("a multiple of norm_num_groups, {groups}"),
            );
            problems.push(Invalid::new(key, channels, expected));
        }
    }
    problems
}

/// Settings common to all U-Nets.
pub(crate) struct CommonNumbers {
    pub(crate) downsample_padding: u32,
    pub(crate) dropout: f64,
    pub(crate) mid_block_scale_factor: f64,
    pub(crate) norm_eps: f64,
    pub(crate) freq_shift: f64,
    /// Number of sines and cosines of the timestep; `None` if `freq_shift` leaves no spacing.
    pub(crate) time_features: Option<u32>,
    pub(crate) time_cond_proj_dim: Option<u32>,
}

impl CommonNumbers {
    pub(crate) fn problems(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        let mut refuse = |key, found: &dyn std::fmt::Display, expected: String| {
            problems.push(Invalid::new(key, found, expected));
        };
        if let Some(dim) = self.time_cond_proj_dim.filter(|&dim| dim < MIN_GUIDANCE_WIDTH) {
            let expected = format!("at least {MIN_GUIDANCE_WIDTH}, two frequencies");
            refuse("time_cond_proj_dim", &dim, expected);
        }
        if self.downsample_padding > 1 {
            refuse("downsample_padding", &self.downsample_padding, "0 or 1".into());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            refuse("dropout", &self.dropout, "at least 0 and less than 1".into());
        }
        let scale = self.mid_block_scale_factor;
        if !scale.is_normal() {
            refuse("mid_block_scale_factor", &scale, "finite and not 0".into());
        }
        if !(self.norm_eps > 0.0 && self.norm_eps.is_finite()) {
            refuse("norm_eps", &self.norm_eps, "above 0".into());
        }
        let half = self.time_features.map_or(f64::INFINITY, |features| f64::from(features / 2));
        if !self.freq_shift.is_finite() || self.freq_shift >= half {
            let expected = format!("less than half of the first of block_out_channels, {half}");
            refuse("freq_shift", &self.freq_shift, expected);
        }
        problems
    }
}
