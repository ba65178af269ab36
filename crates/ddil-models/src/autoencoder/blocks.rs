//! The two halves of an autoencoder: levels without skips between them, and no timestep.

use tch::Tensor;

use crate::autoencoder::config::AutoencoderKLConfig;
use crate::error::Result;
use crate::layers::attention::AttentionOptions;
use crate::layers::resnet::{Downsample2D, Pass, ResnetBlock2D, ResnetOptions, Upsample2D};
use crate::layers::{Activation, Conv2d, GroupNorm, Output};
use crate::parameters::Scope;
use crate::unet::blocks::{LevelAttention, LevelOptions, MidBlock};
use crate::unet::pixels_config::TimeScaleShift;

/// Added to every variance before taking its root; fixed, as in diffusers.
const EPS: f64 = 1e-6;

/// There is no timestep, and no setting for dropout.
const PASS: Pass<'static> = Pass { time: None, text: None, training: false, recompute: None };

/// The layer that changes height and width after the residual blocks of a level.
#[derive(Debug)]
enum Resample {
    Down(Downsample2D),
    Up(Upsample2D),
    None,
}

/// Residual blocks of one resolution, followed by a resampling layer.
#[derive(Debug)]
struct Level {
    resnets: Vec<ResnetBlock2D>,
    resample: Resample,
}

impl Level {
    fn new(
        scope: &mut Scope<'_>,
        [inputs, outputs]: [i64; 2],
        num_layers: u32,
        options: ResnetOptions,
    ) -> Result<Self> {
        let resnet = |i| {
            let inputs = if i == 0 { inputs } else { outputs };
            ResnetBlock2D::new(scope.at(&format!("resnets.{i}")), inputs, outputs, options)
        };
        let resnets = (0..num_layers).map(resnet).collect::<Result<_>>()?;
        Ok(Self { resnets, resample: Resample::None })
    }

    fn forward(&self, x: Tensor) -> Output {
        let mut hidden = x;
        for resnet in &self.resnets {
            hidden = resnet.forward(&hidden, PASS)?;
        }
        match &self.resample {
            Resample::Down(downsampler) => downsampler.forward(&hidden),
            Resample::Up(upsampler) => upsampler.forward(&hidden),
            Resample::None => Ok(hidden),
        }
    }
}

/// Images to means and log-variances, concatenated along the channels.
#[derive(Debug)]
pub(crate) struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<Level>,
    mid_block: MidBlock,
    out: Out,
}

impl Encoder {
    pub(crate) fn new(mut scope: Scope<'_>, config: &AutoencoderKLConfig) -> Result<Self> {
        let channels = config.channels();
        let last = channels.len() - 1;
        let conv_in = Conv2d::new(scope.at("conv_in"), config.in_channels.into(), channels[0], 3)?;
        let down_block = |i: usize| {
            let mut scope = scope.at(&format!("down_blocks.{i}"));
            let sides = [channels[i.saturating_sub(1)], channels[i]];
            let mut level =
                Level::new(&mut scope, sides, config.layers_per_block, resnet_options(config))?;
            if i < last {
                let downsampler = Downsample2D::new(scope.at("downsamplers.0"), channels[i], 0)?;
                level.resample = Resample::Down(downsampler);
            }
            Ok(level)
        };
        let down_blocks = (0..=last).map(down_block).collect::<Result<_>>()?;
        let mid_block = mid_block(scope.at("mid_block"), config)?;
        let moments = 2 * i64::from(config.latent_channels);
        let out = Out::new(&mut scope, config, channels[last], moments)?;
        Ok(Self { conv_in, down_blocks, mid_block, out })
    }

    pub(crate) fn forward(&self, images: &Tensor) -> Output {
        let mut hidden = self.conv_in.forward(images)?;
        for block in &self.down_blocks {
            hidden = block.forward(hidden)?;
        }
        self.out.forward(&self.mid_block.forward(&hidden, PASS)?)
    }
}

/// Latents to images.
#[derive(Debug)]
pub(crate) struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<Level>,
    out: Out,
}

impl Decoder {
    pub(crate) fn new(mut scope: Scope<'_>, config: &AutoencoderKLConfig) -> Result<Self> {
        let channels: Vec<i64> = config.channels().into_iter().rev().collect();
        let last = channels.len() - 1;
        let latent_channels = config.latent_channels.into();
        let conv_in = Conv2d::new(scope.at("conv_in"), latent_channels, channels[0], 3)?;
        let mid_block = mid_block(scope.at("mid_block"), config)?;
        let up_block = |i: usize| {
            let mut scope = scope.at(&format!("up_blocks.{i}"));
            let sides = [channels[i.saturating_sub(1)], channels[i]];
            let num_layers = config.layers_per_block.saturating_add(1);
            let mut level = Level::new(&mut scope, sides, num_layers, resnet_options(config))?;
            if i < last {
                let upsampler = Upsample2D::new(scope.at("upsamplers.0"), channels[i])?;
                level.resample = Resample::Up(upsampler);
            }
            Ok(level)
        };
        let up_blocks = (0..=last).map(up_block).collect::<Result<_>>()?;
        let out = Out::new(&mut scope, config, channels[last], config.out_channels.into())?;
        Ok(Self { conv_in, mid_block, up_blocks, out })
    }

    pub(crate) fn forward(&self, latents: &Tensor) -> Output {
        let mut hidden = self.mid_block.forward(&self.conv_in.forward(latents)?, PASS)?;
        for block in &self.up_blocks {
            hidden = block.forward(hidden)?;
        }
        self.out.forward(&hidden)
    }
}

/// Norm, silu and convolution at the end of both halves.
#[derive(Debug)]
struct Out {
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Out {
    fn new(
        scope: &mut Scope<'_>,
        config: &AutoencoderKLConfig,
        inputs: i64,
        outputs: i64,
    ) -> Result<Self> {
        let groups = config.norm_num_groups.into();
        Ok(Self {
            conv_norm_out: GroupNorm::new(scope.at("conv_norm_out"), groups, inputs, EPS)?,
            conv_out: Conv2d::new(scope.at("conv_out"), inputs, outputs, 3)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Output {
        self.conv_out.forward(&self.conv_norm_out.forward_with(x, None, Activation::Silu)?)
    }
}

fn mid_block(scope: Scope<'_>, config: &AutoencoderKLConfig) -> Result<MidBlock> {
    let channels = i64::from(config.block_out_channels[config.block_out_channels.len() - 1]);
    let attention = AttentionOptions {
        channels,
        head_dim: channels,
        norm_groups: Some(config.norm_num_groups.into()),
        eps: EPS,
        output_scale: 1.0,
    };
    let attention = if config.mid_block_add_attention {
        LevelAttention::Pixels(attention)
    } else {
        LevelAttention::None
    };
    let options = LevelOptions { num_layers: 2, resnet: resnet_options(config), attention };
    MidBlock::new(scope, channels, &options)
}

fn resnet_options(config: &AutoencoderKLConfig) -> ResnetOptions {
    ResnetOptions {
        time_width: None,
        groups: config.norm_num_groups.into(),
        eps: EPS,
        activation: config.act_fn,
        time_scale_shift: TimeScaleShift::Default,
        dropout: 0.0,
        output_scale: 1.0,
    }
}
