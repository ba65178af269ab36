//! The U-Net for pixels, with the weight names and numbers of diffusers' `UNet2DModel`.

use ddil_files::Invalid;
use ddil_libtorch::{ensure_real, ensure_shape};
use tch::{TchError, Tensor};

use crate::config::NetworkConfig;
use crate::error::Result;
use crate::layers::attention::{self, AttentionOptions};
use crate::layers::class_embedding::ClassOptions;
use crate::layers::embeddings::{
    FourierProjection, SinusoidalProjection, TimeProjection, one_per_sample,
};
use crate::layers::resnet::ResnetOptions;
use crate::layers::{Activation, Conv2d, Output};
use crate::network_output::NetworkOutput;
use crate::parameters::{Builder, Parameters, Placement, Scope, Values};
use crate::unet::blocks::LevelAttention;
use crate::unet::body::{Body, BodyOptions};
use crate::unet::core::{Embedded, Embeddings, Inputs, UNet};
use crate::unet::pixels_config::{
    DownBlockType, TimeEmbeddingType, TimeScaleShift, UNet2DConfig, UpBlockType,
};

const FORWARD: &str = "UNet2DModel::forward";

/// The U-Net of [Ho et al. 2020](https://arxiv.org/abs/2006.11239) as diffusers generalised it; built from a
/// [`UNet2DConfig`].
///
/// Parameters have the names of diffusers' files, and outputs agree with diffusers' up to rounding. In files of 2022 the
/// attention layers are named `query`, `key`, `value` and `proj_attn`; they are read as `to_q`, `to_k`, `to_v` and
/// `to_out.0`.
///
/// # Example
///
/// ```
/// use ddil_models::{DownBlockType, NetworkConfig, Placement, UNet2DConfig, UpBlockType};
/// use tch::{Tensor, kind};
///
/// let config = UNet2DConfig {
///     down_block_types: vec![DownBlockType::DownBlock2D; 2],
///     up_block_types: vec![UpBlockType::UpBlock2D; 2],
///     block_out_channels: vec![8, 8],
///     norm_num_groups: 4,
///     num_class_embeds: Some(11),
///     ..UNet2DConfig::default()
/// };
/// let unet = config.build(Placement::default(), 0)?;
///
/// let x_t = Tensor::randn([2, 3, 8, 8], kind::FLOAT_CPU);
/// let (timesteps, labels) = (Tensor::from_slice(&[999_i64, 4]), Tensor::from_slice(&[3_i64, 10]));
/// let output = unet.forward(&x_t, &timesteps, Some(&labels), None)?;
/// assert_eq!(output.size(), [2, 3, 8, 8]);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct UNet2DModel {
    config: UNet2DConfig,
    unet: UNet,
}

impl NetworkConfig for UNet2DConfig {
    type Network = UNet2DModel;

    const CLASS_NAME: &'static str = "UNet2DModel";
    const OWN_KEYS: &'static [&'static str] = &["time_cond_proj_dim"];

    fn problems(&self) -> Vec<Invalid> {
        self.check()
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<UNet2DModel> {
        UNet2DModel::new(self, placement, values)
    }

    fn parameters_of(network: &UNet2DModel) -> &Parameters {
        network.parameters()
    }

    fn new_name(old: &str) -> Option<String> {
        const BLOCKS: &str = ".attentions.";
        let end = old.find(BLOCKS)? + BLOCKS.len();
        let digits = old[end..].bytes().take_while(u8::is_ascii_digit).count();
        let rest = old[end + digits..].strip_prefix('.')?;
        attention::new_name(&old[..=end + digits], rest)
    }
}

impl UNet2DModel {
    fn new(config: &UNet2DConfig, placement: Placement, values: Values) -> Result<Self> {
        let first = i64::from(config.block_out_channels[0]);
        let mut builder = Builder::new(placement, values);
        let mut root = builder.root();
        let conv_in = Conv2d::new(root.at("conv_in"), config.in_channels.into(), first, 3)?;
        let time_proj = time_projection(&mut root, config, first)?;
        let class = ClassOptions {
            embed_type: config.class_embed_type,
            num_classes: config.num_class_embeds,
            label_width: 0,
            width: config.time_width(),
            activation: Activation::Silu,
        };
        let guidance_width = config.time_cond_proj_dim;
        let embeddings = Embeddings::new(&mut root, time_proj, guidance_width, class, None)?;
        let body = Body::new(&mut root, conv_in, body_options(config))?;
        Ok(Self { config: config.clone(), unet: UNet::new(builder.finish(), embeddings, body) })
    }

    /// The settings from which the network was built.
    pub fn config(&self) -> &UNet2DConfig {
        &self.config
    }

    /// The parameters, under their names in diffusers' files.
    pub fn parameters(&self) -> &Parameters {
        &self.unet.parameters
    }

    /// Switches dropout on or off; it is off in a new network.
    pub fn set_training(&self, training: bool) {
        self.unet.training.set(training);
    }

    /// Switches activation checkpointing on or off; it is off in a new network.
    ///
    /// A pass then stores only the inputs of residual blocks, attention and transformer blocks. The backward pass
    /// recomputes the activations inside them, which saves memory for about one more forward pass
    /// ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)). Outputs and gradients are the same. Passes without
    /// gradients are not affected. Weights and adapters must not change between the two passes; switching adapters is
    /// allowed, see [`Lora`](crate::Lora).
    pub fn set_activation_checkpointing(&self, on: bool) {
        self.unet.recomputes.set(on);
    }

    /// Whether the backward pass recomputes activations.
    pub fn activation_checkpointing(&self) -> bool {
        self.unet.recomputes.get()
    }

    /// Names of the parts of a [`Conditioning`](ddil_core::Conditioning) that the network requires.
    pub(crate) fn conditioning_fields(&self) -> Vec<&'static str> {
        let parts = self.unet.embeddings.parts().into_iter();
        parts.filter_map(|(name, takes)| takes.then_some(name)).collect()
    }

    /// The output for noisy samples; its meaning (epsilon, x0, v) depends on the training.
    ///
    /// # Shapes and units
    ///
    /// - `sample`: `[batch, in_channels, height, width]`, kind of the parameters; height and width multiples of 2 to
    ///   the power of the number of levels minus one
    /// - `timesteps`: `[batch]` or `[]`, `Int64` or floating point, counted from 0; for a Fourier time embedding noise
    ///   levels above 0
    /// - `class_labels`: `[batch]`, `Int64` for a table of classes (their range is checked only on the CPU); any
    ///   timestep kind for [`ClassEmbedType::Timestep`](crate::ClassEmbedType::Timestep); `[batch, time_embedding_dim]`
    ///   for [`ClassEmbedType::Identity`](crate::ClassEmbedType::Identity)
    /// - `guidance_weight`: `[batch]`, floating point, guidance scale minus one; only for a network with a
    ///   `time_cond_proj_dim`
    /// - returns: `[batch, out_channels, height, width]`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind); [`Error::MissingPart`](crate::Error::MissingPart), [`Error::UnexpectedPart`](crate::Error::UnexpectedPart),
    /// [`Error::ClassLabelOutOfRange`](crate::Error::ClassLabelOutOfRange); [`Error::Torch`](crate::Error::Torch) if memory runs out or an input is on another device.
    pub fn forward(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        class_labels: Option<&Tensor>,
        guidance_weight: Option<&Tensor>,
    ) -> Result<Tensor> {
        let output =
            self.forward_with_features(sample, timesteps, class_labels, guidance_weight)?;
        Ok(output.sample)
    }

    /// As [`Self::forward`], with the output of the bottom level as features for a discriminator.
    ///
    /// # Shapes and units
    ///
    /// - returns: as `sample` the output; as `features` `[batch, channels, height / 2^n, width / 2^n]`, with the last
    ///   of `block_out_channels` and n one less than its length; both from one pass
    ///
    /// # Errors
    ///
    /// As [`Self::forward`].
    pub fn forward_with_features(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        class_labels: Option<&Tensor>,
        guidance_weight: Option<&Tensor>,
    ) -> Result<NetworkOutput> {
        let inputs = Inputs { timesteps, class_labels, guidance_weight };
        self.ensure_inputs(sample, inputs)?;
        let embed = || self.embed(sample, inputs);
        self.unet.pass(FORWARD, sample, embed, |body, sample, pass| {
            let output = body.forward(sample, pass)?;
            Ok(NetworkOutput { sample: self.scale_output(output.sample, timesteps)?, ..output })
        })
    }

    /// The output of the bottom level, without the up path: the features of [`Self::forward_with_features`].
    ///
    /// # Errors
    ///
    /// As [`Self::forward`].
    pub fn features(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        class_labels: Option<&Tensor>,
        guidance_weight: Option<&Tensor>,
    ) -> Result<Tensor> {
        let inputs = Inputs { timesteps, class_labels, guidance_weight };
        self.ensure_inputs(sample, inputs)?;
        let embed = || self.embed(sample, inputs);
        self.unet.pass("UNet2DModel::features", sample, embed, Body::features)
    }

    fn embed(&self, sample: &Tensor, inputs: Inputs<'_>) -> Result<Embedded, TchError> {
        let kind = self.unet.parameters.placement().kind;
        let time = self.unet.embeddings.forward(inputs, sample.size()[0], kind)?;
        Ok(Embedded { time: self.config.act_fn.forward(&time)?, text: None, bias: None })
    }

    fn scale_output(&self, sample: Tensor, timesteps: &Tensor) -> Output {
        match self.config.time_embedding_type {
            TimeEmbeddingType::Positional => Ok(sample),
            TimeEmbeddingType::Fourier => {
                let timesteps = one_per_sample(timesteps, sample.size()[0])?;
                sample.f_div(&timesteps.f_reshape([-1, 1, 1, 1])?)
            }
        }
    }

    fn ensure_inputs(&self, sample: &Tensor, inputs: Inputs<'_>) -> Result<()> {
        ensure_real(FORWARD, "sample", sample)?;
        let channels = i64::from(self.config.in_channels);
        let step = 1 << (self.config.block_out_channels.len() - 1);
        let fits = matches!(sample.size()[..], [_, c, height, width]
            if c == channels && height > 0 && width > 0 && height % step == 0 && width % step == 0);
        let expected = || {
            format!("[batch, {channels}, height, width] with height and width multiples of {step}")
        };
        ensure_shape(FORWARD, "sample", sample, fits, expected)?;
        self.unet.embeddings.ensure(FORWARD, inputs, sample.size()[0])
    }
}

fn time_projection(
    root: &mut Scope<'_>,
    config: &UNet2DConfig,
    width: i64,
) -> Result<TimeProjection> {
    Ok(match config.time_embedding_type {
        TimeEmbeddingType::Positional => {
            let (cosines_first, freq_shift) = (config.flip_sin_to_cos, config.freq_shift);
            let projection = SinusoidalProjection { width, cosines_first, freq_shift };
            TimeProjection::Positional(projection)
        }
        TimeEmbeddingType::Fourier => {
            TimeProjection::Fourier(FourierProjection::new(root.at("time_proj"), width)?)
        }
    })
}

fn body_options(config: &UNet2DConfig) -> BodyOptions {
    let channels = config.channels();
    let num_layers = config.layers_per_block as usize;
    let attention = |channels, attends: bool| {
        let options = attention(config, channels);
        if attends { LevelAttention::Pixels(options) } else { LevelAttention::None }
    };
    let down = config.down_block_types.iter().zip(&channels).map(|(block, &channels)| {
        (num_layers, attention(channels, *block == DownBlockType::AttnDownBlock2D))
    });
    let up = config.up_block_types.iter().zip(channels.iter().rev()).map(|(block, &channels)| {
        (num_layers + 1, attention(channels, *block == UpBlockType::AttnUpBlock2D))
    });
    let mid = || (2, mid_attention(config, channels[channels.len() - 1]));
    BodyOptions {
        down: down.collect(),
        mid: config.mid_block_type.map(|_| mid()),
        up: up.collect(),
        resnet: ResnetOptions {
            time_width: Some(config.time_width()),
            groups: config.norm_num_groups.into(),
            eps: config.norm_eps,
            activation: config.act_fn,
            time_scale_shift: config.resnet_time_scale_shift,
            dropout: config.dropout,
            output_scale: config.mid_block_scale_factor,
        },
        centers_input: config.center_input_sample,
        downsample_padding: config.downsample_padding.into(),
        last_activation: Activation::Silu,
        out_channels: config.out_channels.into(),
        out_kernel: 3,
        channels,
    }
}

fn attention(config: &UNet2DConfig, channels: i64) -> AttentionOptions {
    AttentionOptions {
        channels,
        head_dim: config.attention_head_dim.map_or(channels, i64::from),
        norm_groups: Some(config.norm_num_groups.into()),
        eps: config.norm_eps,
        output_scale: 1.0,
    }
}

fn mid_attention(config: &UNet2DConfig, channels: i64) -> LevelAttention {
    if !config.add_attention {
        return LevelAttention::None;
    }
    let default = match config.resnet_time_scale_shift {
        TimeScaleShift::Default => Some(config.norm_num_groups),
        TimeScaleShift::ScaleShift => None,
    };
    LevelAttention::Pixels(AttentionOptions {
        norm_groups: config.attn_norm_num_groups.or(default).map(i64::from),
        output_scale: config.mid_block_scale_factor,
        ..attention(config, channels)
    })
}
