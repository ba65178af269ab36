//! The layers from a network's features to one logit.

use ddil_files::Invalid;
use ddil_libtorch::{ensure_real, ensure_shape};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::config::{NetworkConfig, count_problems};
use crate::error::{Error, Result};
use crate::layers::{Activation, Conv2d, GroupNorm, Output};
use crate::model::ModelConfig;
use crate::parameters::{Builder, Parameters, Placement, Values};

/// Largest side at which one convolution covers the whole map.
const LAST_SIDE: u32 = 4;
const KERNEL: i64 = 4;
const MAX_GROUPS: u32 = 32;
/// Minimum channels per group. The last norm has one pixel: a group of one channel would always be 0, and a group of
/// two only a sign.
const MIN_GROUP: u32 = 8;
const NORM_EPS: f64 = 1e-5;

/// The settings of a [`DiscriminatorHead`]; the defaults are those for Stable Diffusion 1.5.
///
/// # Example
///
/// ```
/// use ddil_models::{DiscriminatorHeadConfig, NetworkConfig, Placement};
/// use tch::{Tensor, kind};
///
/// let config = DiscriminatorHeadConfig { in_channels: 16, side: 4, ..Default::default() };
/// let head = config.build(Placement::default(), 0)?;
/// assert_eq!(head.forward(&Tensor::randn([3, 16, 4, 4], kind::FLOAT_CPU))?.size(), [3]);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiscriminatorHeadConfig {
    /// Channels of the features. Default 1280.
    pub in_channels: u32,
    /// Height and width of the features; 1 for features that are vectors. Default 8.
    pub side: u32,
    /// Channels inside the head; none, the default, is the number of channels of the features.
    pub width: Option<u32>,
    /// Groups of every norm, a divisor of the width with at least 8 channels per group. None, the default, is the
    /// largest such divisor up to 32: 32 for a width of 1280, 12 for 96.
    pub norm_num_groups: Option<u32>,
}

impl Default for DiscriminatorHeadConfig {
    fn default() -> Self {
        Self { in_channels: 1280, side: 8, width: None, norm_num_groups: None }
    }
}

impl DiscriminatorHeadConfig {
    /// A head for the features of a network: the output of the bottom level of a U-Net; or the last hidden layer of an
    /// [`Mlp`](crate::Mlp), for which the head is one more hidden layer of the same width, then one logit.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] if settings are invalid, or a U-Net's `sample_size` is absent, not square, or not a
    /// multiple of 2 to the power of the number of levels minus one; [`Error::NoFeatures`] for a `TorchScript` program.
    pub fn for_model(model: &ModelConfig) -> Result<Self> {
        model.ensure_valid()?;
        let in_channels = num_features(model)?;
        let side = match model.level_channels() {
            Some(levels) => bottom_side(model, levels.len() as u32)?,
            None => 1,
        };
        let config = Self { in_channels, side, ..Self::default() };
        config.ensure_valid()?;
        Ok(config)
    }

    fn inner_width(&self) -> u32 {
        self.width.unwrap_or(self.in_channels)
    }

    /// Groups of every norm.
    fn num_groups(&self) -> u32 {
        let width = self.inner_width();
        self.norm_num_groups.unwrap_or_else(|| {
            let fits = |groups: &u32| width.is_multiple_of(*groups) && width / groups >= MIN_GROUP;
            (1..=MAX_GROUPS).rev().find(fits).unwrap_or(1)
        })
    }
}

impl NetworkConfig for DiscriminatorHeadConfig {
    type Network = DiscriminatorHead;

    const CLASS_NAME: &'static str = "DiscriminatorHead";

    fn problems(&self) -> Vec<Invalid> {
        let mut problems =
            count_problems(&[("in_channels", Some(self.in_channels)), ("side", Some(self.side))]);
        let width = self.inner_width();
        if width < MIN_GROUP {
            let expected = format!("at least {MIN_GROUP}, the group size of its norm layers");
            let key = if self.width.is_some() { "width" } else { "in_channels" };
            problems.push(Invalid::new(key, width, expected));
        } else if let Some(groups) = self.norm_num_groups
            && (!width.is_multiple_of(groups) || width / groups < MIN_GROUP)
        {
            let expected = format!("a divisor of {width} that leaves {MIN_GROUP} channels or more");
            problems.push(Invalid::new("norm_num_groups", groups, expected));
        }
        problems
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<DiscriminatorHead> {
        DiscriminatorHead::new(self, placement, values)
    }

    fn parameters_of(network: &DiscriminatorHead) -> &Parameters {
        network.parameters()
    }
}

/// Channels of the features of a network.
pub(super) fn num_features(model: &ModelConfig) -> Result<u32> {
    match model {
        ModelConfig::Mlp(mlp) => Ok(mlp.num_features()),
        _ => model
            .level_channels()
            .and_then(|levels| levels.last().copied())
            .ok_or(Error::NoFeatures { network: model.class_name() }),
    }
}

/// Height and width of the bottom level of a U-Net.
fn bottom_side(model: &ModelConfig, levels: u32) -> Result<u32> {
    let step = 1_u32.checked_shl(levels - 1);
    let size = model.sample_size();
    let side = size.filter(|[height, width]| height == width).map(|[height, _]| height).zip(step);
    if let Some((side, step)) = side.filter(|(side, step)| side % step == 0) {
        return Ok(side / step);
    }
    let step = step.map_or("2 to the power of the number of levels minus 1".to_owned(), |step| {
        step.to_string()
    });
    let expected = format!("one side, a multiple of {step}, for a discriminator");
    let problems = vec![Invalid::new("sample_size", format!("{size:?}"), expected)];
    Err(Error::InvalidConfig { what: model.class_name().into(), problems })
}

/// The head of DMD2 on the bottleneck of its fake score: from features to one logit per sample.
///
/// While the map is larger than 4x4, a 4x4 convolution with stride 2 and padding 1 halves it, rounding down; then a
/// convolution of the size of the remaining map reduces it to one pixel; each is followed by a group norm and `silu`. A
/// 1x1 convolution computes the logit. This is the head of section 4.3 of [Yin et al.
/// 2024](https://arxiv.org/abs/2405.14867) for sides of 4, 8, 16, ..: one halving for Stable Diffusion 1.5 (1280x8x8),
/// three for SDXL (1280x32x32). With a side of 1 it is a network of two linear layers.
///
/// Parameters are named `blocks.0.conv.weight`, `blocks.0.norm.weight`, .. and `conv_out.weight`.
///
/// # Example
///
/// ```
/// use ddil_models::{DiscriminatorHeadConfig, ModelConfig, NetworkConfig, Placement, UNet2DConditionConfig};
///
/// let unet = ModelConfig::UNet2DCondition(UNet2DConditionConfig::sd15());
/// let config = DiscriminatorHeadConfig::for_model(&unet)?;
/// assert_eq!((config.in_channels, config.side), (1280, 8));
/// let head = config.without_values()?;
/// assert_eq!(head.parameters().get("blocks.0.conv.weight").map(|w| w.size()), Some(vec![1280, 1280, 4, 4]));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct DiscriminatorHead {
    config: DiscriminatorHeadConfig,
    parameters: Parameters,
    blocks: Vec<Block>,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct Block {
    conv: Conv2d,
    norm: GroupNorm,
}

impl DiscriminatorHead {
    fn new(config: &DiscriminatorHeadConfig, placement: Placement, values: Values) -> Result<Self> {
        let (width, groups) = (i64::from(config.inner_width()), i64::from(config.num_groups()));
        let mut builder = Builder::new(placement, values);
        let mut root = builder.root();
        let mut blocks = Vec::new();
        let mut inputs = i64::from(config.in_channels);
        for [kernel, stride, padding] in convolutions(config.side) {
            let mut scope = root.at(&format!("blocks.{}", blocks.len()));
            let conv = Conv2d::strided(scope.at("conv"), [inputs, width], kernel, stride, padding)?;
            let norm = GroupNorm::new(scope.at("norm"), groups, width, NORM_EPS)?;
            blocks.push(Block { conv, norm });
            inputs = width;
        }
        let conv_out = Conv2d::new(root.at("conv_out"), width, 1, 1)?;
        Ok(Self { config: config.clone(), parameters: builder.finish(), blocks, conv_out })
    }

    /// The settings from which the head was built.
    pub fn config(&self) -> &DiscriminatorHeadConfig {
        &self.config
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The logit of each sample being real rather than fake.
    ///
    /// # Shapes and units
    ///
    /// - `features`: `[batch, in_channels, side, side]`, or `[batch, in_channels]` if the side is 1; kind of the
    ///   parameters
    /// - returns: `[batch]`, positive for real
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind); [`Error::Torch`] if memory runs out or the features
    /// are on another device.
    pub fn forward(&self, features: &Tensor) -> Result<Tensor> {
        self.ensure_features(features)?;
        self.run(features).map_err(Error::torch("DiscriminatorHead::forward"))
    }

    fn run(&self, features: &Tensor) -> Output {
        let (channels, side) = (i64::from(self.config.in_channels), i64::from(self.config.side));
        // A vector is a map with one pixel.
        let mut hidden = features.f_reshape([features.size()[0], channels, side, side])?;
        for Block { conv, norm } in &self.blocks {
            hidden = norm.forward_with(&conv.forward(&hidden)?, None, Activation::Silu)?;
        }
        self.conv_out.forward(&hidden)?.f_flatten(0, -1)
    }

    fn ensure_features(&self, features: &Tensor) -> Result<()> {
        let (op, name) = ("DiscriminatorHead::forward", "features");
        let DiscriminatorHeadConfig { in_channels, side, .. } = self.config;
        let (channels, side) = (i64::from(in_channels), i64::from(side));
        ensure_real(op, name, features)?;
        let fits = match features.size()[..] {
            [_, c, height, width] => (c, height, width) == (channels, side, side),
            [_, c] => c == channels && side == 1,
            _ => false,
        };
        let expected = || format!("[batch, {channels}, {side}, {side}]");
        Ok(ensure_shape(op, name, features, fits, expected)?)
    }
}

/// Kernel, stride and padding of every block, from a map of that side to one pixel.
fn convolutions(mut side: u32) -> Vec<[i64; 3]> {
    let mut convolutions = Vec::new();
    while side > LAST_SIDE {
        convolutions.push([KERNEL, 2, 1]);
        side /= 2;
    }
    convolutions.push([side.into(), 1, 0]);
    convolutions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_side_ends_in_one_pixel() {
        for first in 1..=70 {
            let mut side = i64::from(first);
            for [kernel, stride, padding] in convolutions(first) {
                assert!(side + 2 * padding >= kernel, "{first}");
                side = (side + 2 * padding - kernel) / stride + 1;
            }
            assert_eq!(side, 1, "{first}");
        }
        assert_eq!(convolutions(8), [[4, 2, 1], [4, 1, 0]]);
        assert_eq!(convolutions(32).len(), 4);
    }

    #[test]
    fn groups_hold_several_channels() {
        for (in_channels, groups) in [(1280, 32), (320, 32), (96, 12), (64, 8), (13, 1), (8, 1)] {
            let config = DiscriminatorHeadConfig { in_channels, ..Default::default() };
            assert_eq!(config.num_groups(), groups, "{in_channels}");
        }
    }
}
