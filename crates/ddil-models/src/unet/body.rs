//! The layers between embeddings and output, common to all U-Nets.

use tch::{TchError, Tensor};

use crate::error::Result;
use crate::layers::resnet::{Pass, ResnetOptions};
use crate::layers::{Activation, Conv2d, GroupNorm, Output};
use crate::network_output::NetworkOutput;
use crate::parameters::Scope;
use crate::unet::blocks::{
    DownBlock, LevelAttention, LevelOptions, MidBlock, UpBlock, down_blocks, up_blocks,
};

/// Number of residual blocks of a level, and the attention after each.
pub(crate) type Level = (usize, LevelAttention);

/// The settings of a [`Body`].
#[derive(Clone, Debug)]
pub(crate) struct BodyOptions {
    /// Of every level, the finest first.
    pub(crate) channels: Vec<i64>,
    /// The finest first.
    pub(crate) down: Vec<Level>,
    /// `None` omits the bottom level.
    pub(crate) mid: Option<Level>,
    /// The coarsest first.
    pub(crate) up: Vec<Level>,
    /// Of all residual blocks; `output_scale` is that of the bottom level.
    pub(crate) resnet: ResnetOptions,
    pub(crate) centers_input: bool,
    pub(crate) downsample_padding: i64,
    pub(crate) last_activation: Activation,
    pub(crate) out_channels: i64,
    pub(crate) out_kernel: i64,
}

#[derive(Debug)]
pub(crate) struct Body {
    /// Whether samples are in `[0, 1]` and have to be mapped to `[-1, 1]`.
    centers_input: bool,
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    /// The activation between the last norm and the last convolution.
    last_activation: Activation,
    conv_out: Conv2d,
}

impl Body {
    pub(crate) fn new(root: &mut Scope<'_>, conv_in: Conv2d, options: BodyOptions) -> Result<Self> {
        let BodyOptions { channels, resnet: mid_resnet, .. } = options;
        let resnet = ResnetOptions { output_scale: 1.0, ..mid_resnet };
        let level = |(num_layers, attention)| LevelOptions { num_layers, resnet, attention };
        let down: Vec<_> = options.down.into_iter().map(level).collect();
        let up: Vec<_> = options.up.into_iter().map(level).collect();
        let mid = options.mid.map(|(num_layers, attention)| LevelOptions {
            num_layers,
            resnet: mid_resnet,
            attention,
        });
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let ResnetOptions { groups, eps, .. } = resnet;
        Ok(Self {
            centers_input: options.centers_input,
            conv_in,
            down_blocks: down_blocks(root, &channels, &down, options.downsample_padding)?,
            mid_block: mid
                .map(|mid| MidBlock::new(root.at("mid_block"), last, &mid))
                .transpose()?,
            up_blocks: up_blocks(root, &channels, &up)?,
            conv_norm_out: GroupNorm::new(root.at("conv_norm_out"), groups, first, eps)?,
            last_activation: options.last_activation,
            conv_out: {
                let scope = root.at("conv_out");
                Conv2d::new(scope, first, options.out_channels, options.out_kernel)?
            },
        })
    }

    /// The output, and that of the bottom level as features.
    pub(crate) fn forward(
        &self,
        sample: &Tensor,
        pass: Pass<'_>,
    ) -> Result<NetworkOutput, TchError> {
        let (features, skips) = self.down(sample, pass)?;
        Ok(NetworkOutput { sample: self.up(&features, skips, pass)?, features })
    }

    /// The output of the bottom level.
    pub(crate) fn features(&self, sample: &Tensor, pass: Pass<'_>) -> Output {
        Ok(self.down(sample, pass)?.0)
    }

    /// The down path and the bottom level; returns the skips for the up path.
    fn down(&self, sample: &Tensor, pass: Pass<'_>) -> Result<(Tensor, Vec<Tensor>), TchError> {
        let mut sample = sample.shallow_clone();
        if self.centers_input {
            sample = sample.f_mul_scalar(2.0)?.f_add_scalar(-1.0)?;
        }
        let mut hidden = self.conv_in.forward(&sample)?;
        let mut skips = vec![hidden.shallow_clone()];
        for block in &self.down_blocks {
            hidden = block.forward(hidden, pass, &mut skips)?;
        }
        if let Some(mid_block) = &self.mid_block {
            hidden = mid_block.forward(&hidden, pass)?;
        }
        Ok((hidden, skips))
    }

    fn up(&self, features: &Tensor, mut skips: Vec<Tensor>, pass: Pass<'_>) -> Output {
        let mut hidden = features.shallow_clone();
        for block in &self.up_blocks {
            hidden = block.forward(hidden, pass, &mut skips)?;
        }
        let hidden = self.conv_norm_out.forward_with(&hidden, None, self.last_activation)?;
        self.conv_out.forward(&hidden)
    }
}
