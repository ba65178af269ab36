//! The U-Net for pixels, with the weight names and numbers of diffusers' `UNet2DModel`.

use std::cell::Cell;
use std::path::Path;

use ddil_libtorch::ArgumentError;
use tch::Tensor;

use crate::config::Config;
use crate::error::{
    Error, Result, ensure_dense, ensure_guidance_weight, ensure_timesteps, is_float,
};
use crate::layers::attention::AttentionOptions;
use crate::layers::class_embedding::{ClassEmbedding, ClassOptions};
use crate::layers::embeddings::{
    FourierProjection, GuidanceEmbedding, SinusoidalProjection, TimeProjection, TimestepEmbedding,
    one_per_sample,
};
use crate::layers::recompute::Recompute;
use crate::layers::resnet::{Pass, ResnetOptions};
use crate::layers::{Activation, Conv2d, GroupNorm, Output};
use crate::network_output::NetworkOutput;
use crate::parameters::{Builder, Parameters, Placement, Scope, Values, build_filled, ensure_room};
use crate::unet::blocks::{LevelAttention, LevelOptions, MidBlock, down_blocks, up_blocks};
use crate::unet::body::Body;
use crate::unet::pixels_config::{
    DownBlockType, TimeEmbeddingType, TimeScaleShift, UNet2DConfig, UpBlockType,
};
use crate::weights;

const FORWARD: &str = "UNet2DModel::forward";

/// The inputs of the network other than the sample.
#[derive(Clone, Copy, Debug)]
struct Told<'a> {
    timesteps: &'a Tensor,
    class_labels: Option<&'a Tensor>,
    guidance_weight: Option<&'a Tensor>,
}

/// The U-Net of [Ho et al. 2020](https://arxiv.org/abs/2006.11239) as diffusers generalised it; built by
/// [`UNet2DConfig::build`].
///
/// Parameters have the names of diffusers' files, and outputs agree with diffusers' up to rounding.
///
/// # Example
///
/// ```
/// use ddil_models::{DownBlockType, Placement, UNet2DConfig, UpBlockType};
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
    parameters: Parameters,
    time_proj: TimeProjection,
    guidance_embedding: Option<GuidanceEmbedding>,
    time_embedding: TimestepEmbedding,
    class_embedding: Option<ClassEmbedding>,
    body: Body,
    training: Cell<bool>,
    recomputes: Cell<bool>,
}

impl UNet2DConfig {
    /// Name and shape of every parameter of the network, in the order of its layers, without allocating their values.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) with every invalid value.
    pub fn parameter_shapes(&self) -> Result<Vec<(String, Vec<i64>)>> {
        Ok(self.without_values()?.parameters().shapes())
    }

    /// Checks the settings and builds a network whose parameters are zeros that take no memory and cannot be changed:
    /// to read names and sizes, and to check that adapters fit.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) with every invalid value.
    pub fn without_values(&self) -> Result<UNet2DModel> {
        UNet2DModel::new(self, Placement::default(), Values::Sizes)
    }

    /// Checks the settings and builds a network with fresh parameters, initialised as `torch.nn` would.
    ///
    /// The same seed gives the same parameters on every device.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) with every invalid value;
    /// [`Error::Torch`](crate::Error::Torch) if the device is not available or its memory does not suffice.
    pub fn build(&self, placement: Placement, seed: u64) -> Result<UNet2DModel> {
        UNet2DModel::new(self, placement, Values::Seeded(seed))
    }

    /// Checks the settings and builds a network with the parameters in a safetensors file or index of shards.
    ///
    /// # Errors
    ///
    /// As [`Self::build`], and as [`weights::load_into`](crate::weights::load_into).
    pub fn build_from(
        &self,
        placement: Placement,
        weights: impl AsRef<Path>,
    ) -> Result<UNet2DModel> {
        let path = weights.as_ref();
        build_filled(
            |values| UNet2DModel::new(self, placement, values),
            |unet| weights::ensure_fits(&unet.parameters().named(), path),
            |unet| unet.parameters().load(path),
        )
    }
}

impl UNet2DModel {
    pub(crate) fn new(config: &UNet2DConfig, placement: Placement, values: Values) -> Result<Self> {
        config.ensure_valid()?;
        ensure_room(values, placement, || {
            Ok(Self::new(config, placement, Values::Sizes)?.parameters)
        })?;
        let first = config.channels()[0];
        let mut builder = Builder::new(placement, values);
        let mut root = builder.root();

        let conv_in = Conv2d::new(root.at("conv_in"), config.in_channels.into(), first, 3)?;
        let time_proj = time_projection(&mut root, config)?;
        let width = config.time_width();
        let guidance_embedding = guidance_embedding(&mut root, config, &time_proj)?;
        let time_embedding = TimestepEmbedding::new(root.at("time_embedding"), &time_proj, width)?;
        let class_options = ClassOptions {
            embed_type: config.class_embed_type,
            num_classes: config.num_class_embeds,
            label_width: 0,
            width,
            activation: Activation::Silu,
        };
        let class_embedding =
            ClassEmbedding::new(root.at("class_embedding"), class_options, &time_proj)?;
        let body = body(&mut root, config, conv_in)?;
        Ok(Self {
            config: config.clone(),
            parameters: builder.finish(),
            time_proj,
            guidance_embedding,
            time_embedding,
            class_embedding,
            body,
            training: Cell::new(false),
            recomputes: Cell::new(false),
        })
    }

    /// The settings from which the network was built.
    pub fn config(&self) -> &UNet2DConfig {
        &self.config
    }

    /// The parameters, under their names in diffusers' files.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Switches dropout on or off; it is off in a new network.
    pub fn set_training(&self, training: bool) {
        self.training.set(training);
    }

    /// Switches activation checkpointing on or off; it is off in a new network.
    ///
    /// A pass then stores only the inputs of residual blocks, attention and transformer blocks. The backward pass
    /// recomputes the activations inside them, which saves memory for about one more forward pass
    /// ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)). Outputs and gradients are the same. Passes without
    /// gradients are not affected. Weights and adapters must not change between the two passes; switching adapters is
    /// allowed, see [`Lora`](crate::Lora).
    pub fn set_activation_checkpointing(&self, on: bool) {
        self.recomputes.set(on);
    }

    /// Whether the backward pass recomputes activations.
    pub fn activation_checkpointing(&self) -> bool {
        self.recomputes.get()
    }

    /// Names of the parts of a [`Conditioning`](ddil_core::Conditioning) that the network requires.
    pub(crate) fn conditioning_fields(&self) -> Vec<&'static str> {
        let fields = [
            ("class_labels", self.class_embedding.is_some()),
            ("guidance_weight", self.guidance_embedding.is_some()),
        ];
        fields.into_iter().filter_map(|(name, takes)| takes.then_some(name)).collect()
    }

    /// The state to record at the start of a pass that will be recomputed.
    fn recompute(&self) -> Option<Recompute> {
        self.recomputes.get().then(|| Recompute::of(&self.parameters))
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
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind); [`Error::MissingPart`], [`Error::UnexpectedPart`],
    /// [`Error::ClassLabelOutOfRange`]; [`Error::Torch`] if memory runs out or an input is on another device.
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
        let told = Told { timesteps, class_labels, guidance_weight };
        self.ensure_inputs(sample, told)?;
        let sample = &self.parameters.placement().arrange(sample)?;
        let run = || {
            let timesteps = &one_per_sample(timesteps, sample.size()[0])?;
            let time = self.embed(Told { timesteps, ..told })?;
            let recompute = self.recompute();
            let pass = self.pass(&time, recompute.as_ref());
            let (features, skips) = self.body.down(sample, pass)?;
            let sample = self.body.up(&features, skips, pass)?;
            Ok(NetworkOutput { sample: self.scale_output(sample, timesteps)?, features })
        };
        run().map_err(Error::torch(FORWARD))
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
        let told = Told { timesteps, class_labels, guidance_weight };
        self.ensure_inputs(sample, told)?;
        let sample = &self.parameters.placement().arrange(sample)?;
        let run = || {
            let timesteps = &one_per_sample(timesteps, sample.size()[0])?;
            let time = self.embed(Told { timesteps, ..told })?;
            let recompute = self.recompute();
            let pass = self.pass(&time, recompute.as_ref());
            Ok(self.body.down(sample, pass)?.0)
        };
        run().map_err(Error::torch("UNet2DModel::features"))
    }

    fn pass<'a>(&self, time: &'a Tensor, recompute: Option<&'a Recompute>) -> Pass<'a> {
        Pass { time: Some(time), text: None, training: self.training.get(), recompute }
    }

    /// The embedding of timestep, class and guidance, after the activation that every block would apply to it.
    fn embed(&self, told: Told<'_>) -> Output {
        let Told { timesteps, class_labels, guidance_weight } = told;
        let kind = self.parameters.placement().kind;
        let mut features = self.time_proj.forward(timesteps)?.f_to_kind(kind)?;
        if let (Some(embedding), Some(weight)) = (&self.guidance_embedding, guidance_weight) {
            features = embedding.forward(&features, weight)?;
        }
        let mut time = self.time_embedding.forward(&features)?;
        if let (Some(embedding), Some(labels)) = (&self.class_embedding, class_labels) {
            let class = embedding.forward(labels, &self.time_proj, kind)?;
            time = time.f_add(&class)?;
        }
        self.config.act_fn.forward(&time)
    }

    fn scale_output(&self, sample: Tensor, timesteps: &Tensor) -> Output {
        match self.config.time_embedding_type {
            TimeEmbeddingType::Positional => Ok(sample),
            TimeEmbeddingType::Fourier => sample.f_div(&timesteps.f_reshape([-1, 1, 1, 1])?),
        }
    }

    fn ensure_inputs(&self, sample: &Tensor, told: Told<'_>) -> Result<()> {
        let op = FORWARD;
        ensure_dense(op, "sample", sample)?;
        let channels = i64::from(self.config.in_channels);
        let step = 1 << (self.config.block_out_channels.len() - 1);
        let fits = matches!(sample.size()[..], [_, c, height, width]
            if c == channels && height > 0 && width > 0 && height % step == 0 && width % step == 0);
        if !fits {
            let expected = format!(
                "[batch, {channels}, height, width] with height and width multiples of {step}"
            );
            return Err(Error::Argument(ArgumentError::Shape {
                op,
                name: "sample",
                shape: sample.size(),
                expected,
            }));
        }
        if !is_float(sample.kind()) {
            let (name, found) = ("sample", sample.kind());
            return Err(Error::Argument(ArgumentError::Kind {
                op,
                name,
                kind: found,
                expected: "floating point",
            }));
        }
        let batch = sample.size()[0];
        ensure_timesteps(op, told.timesteps, batch)?;
        ClassEmbedding::ensure(op, self.class_embedding.as_ref(), told.class_labels, batch)?;
        ensure_guidance_weight(op, told.guidance_weight, batch, self.guidance_embedding.is_some())
    }
}

fn time_projection(root: &mut Scope<'_>, config: &UNet2DConfig) -> Result<TimeProjection> {
    let width = i64::from(config.block_out_channels[0]);
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

fn guidance_embedding(
    root: &mut Scope<'_>,
    config: &UNet2DConfig,
    features: &TimeProjection,
) -> Result<Option<GuidanceEmbedding>> {
    let mut scope = root.at("time_embedding");
    let width = config.time_cond_proj_dim.map(i64::from);
    width.map(|width| GuidanceEmbedding::new(scope.at("cond_proj"), width, features)).transpose()
}

fn body(root: &mut Scope<'_>, config: &UNet2DConfig, conv_in: Conv2d) -> Result<Body> {
    let channels = config.channels();
    let num_layers = config.layers_per_block as usize;
    let down_levels: Vec<_> = (config.down_block_types.iter().zip(&channels))
        .map(|(block, &channels)| {
            level(config, channels, num_layers, *block == DownBlockType::AttnDownBlock2D)
        })
        .collect();
    let up_levels: Vec<_> = (config.up_block_types.iter().zip(channels.iter().rev()))
        .map(|(block, &channels)| {
            level(config, channels, num_layers + 1, *block == UpBlockType::AttnUpBlock2D)
        })
        .collect();
    let padding = i64::from(config.downsample_padding);
    let (first, groups) = (channels[0], config.norm_num_groups.into());
    Ok(Body {
        centers_input: config.center_input_sample,
        conv_in,
        down_blocks: down_blocks(root, &channels, &down_levels, padding)?,
        mid_block: mid_block(root, config)?,
        up_blocks: up_blocks(root, &channels, &up_levels)?,
        conv_norm_out: GroupNorm::new(root.at("conv_norm_out"), groups, first, config.norm_eps)?,
        last_activation: Activation::Silu,
        conv_out: Conv2d::new(root.at("conv_out"), first, config.out_channels.into(), 3)?,
    })
}

fn mid_block(root: &mut Scope<'_>, config: &UNet2DConfig) -> Result<Option<MidBlock>> {
    let channels = i64::from(config.block_out_channels[config.block_out_channels.len() - 1]);
    let scale = config.mid_block_scale_factor;
    let mut options = level(config, channels, 2, config.add_attention);
    options.resnet.output_scale = scale;
    if let LevelAttention::Pixels(attention) = &mut options.attention {
        attention.output_scale = scale;
        let default = match config.resnet_time_scale_shift {
            TimeScaleShift::Default => Some(config.norm_num_groups),
            TimeScaleShift::ScaleShift => None,
        };
        attention.norm_groups = config.attn_norm_num_groups.or(default).map(i64::from);
    }
    config
        .mid_block_type
        .map(|_| MidBlock::new(root.at("mid_block"), channels, &options))
        .transpose()
}

fn level(config: &UNet2DConfig, channels: i64, num_layers: usize, attends: bool) -> LevelOptions {
    let groups = i64::from(config.norm_num_groups);
    let attention = AttentionOptions {
        channels,
        head_dim: config.attention_head_dim.map_or(channels, i64::from),
        norm_groups: Some(groups),
        eps: config.norm_eps,
        output_scale: 1.0,
    };
    let resnet = ResnetOptions {
        time_width: Some(config.time_width()),
        groups,
        eps: config.norm_eps,
        activation: config.act_fn,
        time_scale_shift: config.resnet_time_scale_shift,
        dropout: config.dropout,
        output_scale: 1.0,
    };
    let attention = if attends { LevelAttention::Pixels(attention) } else { LevelAttention::None };
    LevelOptions { num_layers, resnet, attention }
}
