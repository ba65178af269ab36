//! The levels of a U-Net: one resolution each, down, middle and up.

use tch::{TchError, Tensor};

use crate::error::Result;
use crate::layers::Output;
use crate::layers::attention::{AttentionBlock, AttentionOptions};
use crate::layers::recompute::Part;
use crate::layers::resnet::{Downsample2D, Pass, ResnetBlock2D, ResnetOptions, Upsample2D};
use crate::layers::transformer::{TextTransformer, TransformerOptions};
use crate::parameters::{Joined, Scope, Share};
use crate::unet::condition_config::TransformerDepth;

/// The layer after a residual block.
#[derive(Debug)]
enum Attention {
    None,
    Pixels(Part<AttentionBlock>),
    Text(TextTransformer),
}

/// A residual block, followed by attention in levels with attention.
#[derive(Debug)]
struct Layer {
    resnet: Part<ResnetBlock2D>,
    attention: Attention,
}

impl Layer {
    fn new(
        scope: &mut Scope<'_>,
        index: usize,
        [inputs, outputs]: [i64; 2],
        options: &LevelOptions,
    ) -> Result<Self> {
        let name = format!("resnets.{index}");
        let resnet = ResnetBlock2D::new(scope.at(&name), inputs, outputs, options.resnet)?;
        let resnet = Part::new(resnet);
        let scope = scope.at(&format!("attentions.{index}"));
        let attention = match &options.attention {
            LevelAttention::None => Attention::None,
            LevelAttention::Pixels(options) => {
                Attention::Pixels(Part::new(AttentionBlock::new(scope, *options)?))
            }
            LevelAttention::Text { options, depth } => {
                Attention::Text(TextTransformer::new(scope, *options, depth.at(index))?)
            }
        };
        Ok(Self { resnet, attention })
    }

    /// Takes maps concatenated along the channels.
    fn forward(&self, maps: &[&Tensor], pass: Pass<'_>) -> Output {
        let hidden = self.resnet.forward_joined(maps, pass)?;
        match &self.attention {
            Attention::None => Ok(hidden),
            Attention::Pixels(attention) => {
                attention
                    .forward(&[&hidden], pass.recompute, |block, inputs| block.forward(inputs[0]))
            }
            Attention::Text(transformer) => {
                let missing =
                    || TchError::Shape("a level has cross attention, but there is no text".into());
                transformer.forward(&hidden, pass.text.ok_or_else(missing)?, pass.recompute)
            }
        }
    }
}

/// The layers after the residual blocks of a level.
#[derive(Clone, Debug)]
pub(crate) enum LevelAttention {
    None,
    /// Self-attention of the pixels.
    Pixels(AttentionOptions),
    /// Transformers with cross attention to the text.
    Text {
        options: TransformerOptions,
        depth: TransformerDepth,
    },
}

/// The common settings of the layers of one level.
#[derive(Clone, Debug)]
pub(crate) struct LevelOptions {
    /// Residual blocks.
    pub(crate) num_layers: usize,
    pub(crate) resnet: ResnetOptions,
    pub(crate) attention: LevelAttention,
}

/// A level of the down path.
#[derive(Debug)]
pub(crate) struct DownBlock {
    layers: Vec<Layer>,
    downsampler: Option<Downsample2D>,
}

impl DownBlock {
    /// `downsample_padding` is `None` in the last level, which keeps its resolution.
    fn new(
        mut scope: Scope<'_>,
        [inputs, outputs]: [i64; 2],
        options: &LevelOptions,
        downsample_padding: Option<i64>,
    ) -> Result<Self> {
        let layers = (0..options.num_layers)
            .map(|i| {
                let inputs = if i == 0 { inputs } else { outputs };
                Layer::new(&mut scope, i, [inputs, outputs], options)
            })
            .collect::<Result<_>>()?;
        let downsampler = downsample_padding
            .map(|padding| Downsample2D::new(scope.at("downsamplers.0"), outputs, padding))
            .transpose()?;
        Ok(Self { layers, downsampler })
    }

    /// Pushes the output of every layer to `skips`, for the level of the same resolution on the up path.
    pub(crate) fn forward(&self, x: Tensor, pass: Pass<'_>, skips: &mut Vec<Tensor>) -> Output {
        let mut hidden = x;
        for layer in &self.layers {
            hidden = layer.forward(&[&hidden], pass)?;
            skips.push(hidden.shallow_clone());
        }
        if let Some(downsampler) = &self.downsampler {
            hidden = downsampler.forward(&hidden)?;
            skips.push(hidden.shallow_clone());
        }
        Ok(hidden)
    }
}

/// The bottom level: two residual blocks with attention between them, or a single residual block.
#[derive(Debug)]
pub(crate) struct MidBlock {
    first: Layer,
    second: Option<Part<ResnetBlock2D>>,
}

impl MidBlock {
    pub(crate) fn new(mut scope: Scope<'_>, channels: i64, options: &LevelOptions) -> Result<Self> {
        let first = Layer::new(&mut scope, 0, [channels; 2], options)?;
        let second = (options.num_layers > 1)
            .then(|| ResnetBlock2D::new(scope.at("resnets.1"), channels, channels, options.resnet))
            .transpose()?
            .map(Part::new);
        Ok(Self { first, second })
    }

    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Output {
        let hidden = self.first.forward(&[x], pass)?;
        self.second
            .as_ref()
            .map_or(Ok(hidden.shallow_clone()), |second| second.forward_joined(&[&hidden], pass))
    }
}

/// Channels of the inputs of a level on the up path.
#[derive(Clone, Copy, Debug)]
struct UpChannels {
    /// From the level below.
    below: i64,
    /// Of the last skip, which comes from the level above on the down path.
    last_skip: i64,
    /// Of this level.
    outputs: i64,
}

/// Marks the axes of parameters along a residual block's two concatenated inputs.
fn mark_inputs(mut resnet: Scope<'_>, parts: [i64; 2]) {
    let places =
        [("norm1.weight", 0), ("norm1.bias", 0), ("conv1.weight", 1), ("conv_shortcut.weight", 1)];
    for (name, axis) in places {
        resnet.mark(name, Joined { axis, parts: parts.to_vec(), share: Share::First });
    }
}

/// A level of the up path.
#[derive(Debug)]
pub(crate) struct UpBlock {
    layers: Vec<Layer>,
    upsampler: Option<Upsample2D>,
}

impl UpBlock {
    fn new(
        mut scope: Scope<'_>,
        channels: UpChannels,
        options: &LevelOptions,
        upsample: bool,
    ) -> Result<Self> {
        let UpChannels { below, last_skip, outputs } = channels;
        let layers = (0..options.num_layers)
            .map(|i| {
                let skip = if i + 1 == options.num_layers { last_skip } else { outputs };
                let inputs = if i == 0 { below } else { outputs };
                let layer = Layer::new(&mut scope, i, [inputs + skip, outputs], options)?;
                mark_inputs(scope.at(&format!("resnets.{i}")), [inputs, skip]);
                Ok(layer)
            })
            .collect::<Result<_>>()?;
        let upsampler =
            upsample.then(|| Upsample2D::new(scope.at("upsamplers.0"), outputs)).transpose()?;
        Ok(Self { layers, upsampler })
    }

    /// Takes one of `skips` per layer, the latest first.
    pub(crate) fn forward(&self, x: Tensor, pass: Pass<'_>, skips: &mut Vec<Tensor>) -> Output {
        let mut hidden = x;
        for layer in &self.layers {
            let skip = skips.pop().ok_or_else(|| {
                TchError::Shape("the up path has more layers than the down path".into())
            })?;
            hidden = layer.forward(&[&hidden, &skip], pass)?;
        }
        match (&self.upsampler, skips.last().map(Tensor::size)) {
            // To the size of the level above, which is odd if its half was rounded up.
            (Some(upsampler), Some(above)) => upsampler.forward_to(&hidden, [above[2], above[3]]),
            (Some(upsampler), None) => upsampler.forward(&hidden),
            (None, _) => Ok(hidden),
        }
    }
}

/// All levels of the down path; `channels` and `levels` the finest first.
pub(crate) fn down_blocks(
    root: &mut Scope<'_>,
    channels: &[i64],
    levels: &[LevelOptions],
    downsample_padding: i64,
) -> Result<Vec<DownBlock>> {
    let last = channels.len() - 1;
    let block = |(i, options): (usize, &LevelOptions)| {
        let padding = (i < last).then_some(downsample_padding);
        let sides = [channels[i.saturating_sub(1)], channels[i]];
        DownBlock::new(root.at(&format!("down_blocks.{i}")), sides, options, padding)
    };
    levels.iter().enumerate().map(block).collect()
}

/// All levels of the up path; `channels` the finest first, `levels` the coarsest first.
pub(crate) fn up_blocks(
    root: &mut Scope<'_>,
    channels: &[i64],
    levels: &[LevelOptions],
) -> Result<Vec<UpBlock>> {
    let last = channels.len() - 1;
    let block = |(i, options): (usize, &LevelOptions)| {
        let level = last - i;
        let up_channels = UpChannels {
            below: channels[(level + 1).min(last)],
            last_skip: channels[level.saturating_sub(1)],
            outputs: channels[level],
        };
        UpBlock::new(root.at(&format!("up_blocks.{i}")), up_channels, options, i < last)
    };
    levels.iter().enumerate().map(block).collect()
}
