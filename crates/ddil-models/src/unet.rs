//! The U-Net for pixels, with the weight names and numbers of diffusers' `UNet2DModel`.

use std::cell::Cell;

use tch::{TchError, Tensor};

use crate::attention::AttentionOptions;
use crate::config::Config;
use crate::embeddings::{
    FourierProjection, GuidanceEmbedding, SinusoidalProjection, TimeProjection, TimestepEmbedding,
    one_per_sample,
};
use crate::error::{
    Error, Result, ensure_guidance_weight, ensure_labels, ensure_timesteps, is_float,
};
use crate::layers::{Conv2d, Embedding, GroupNorm, Output};
use crate::model::NetworkOutput;
use crate::parameters::{Builder, Parameters, Placement, Scope, Values};
use crate::resnet::{Pass, ResnetOptions};
use crate::unet_blocks::{DownBlock, LevelOptions, MidBlock, UpBlock, UpChannels};
use crate::unet_config::{
    ClassEmbedType, DownBlockType, TimeEmbeddingType, TimeScaleShift, UNet2DConfig, UpBlockType,
};

const FORWARD: &str = "UNet2DModel::forward";

/// What the network is told beside the sample.
#[derive(Clone, Copy, Debug)]
struct Told<'a> {
    timesteps: &'a Tensor,
    class_labels: Option<&'a Tensor>,
    guidance_weight: Option<&'a Tensor>,
}

#[derive(Debug)]
enum ClassEmbedding {
    Table { table: Embedding, len: i64 },
    Timestep(TimestepEmbedding),
    Identity,
}

/// The U-Net of [Ho et al. 2020](https://arxiv.org/abs/2006.11239) as diffusers generalised it; made by
/// [`UNet2DConfig::build`].
///
/// Parameters have the names they have in diffusers' files, and outputs agree with diffusers' up to rounding.
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
    conv_in: Conv2d,
    time_proj: TimeProjection,
    guidance_embedding: Option<GuidanceEmbedding>,
    time_embedding: TimestepEmbedding,
    class_embedding: Option<ClassEmbedding>,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    training: Cell<bool>,
}

impl UNet2DModel {
    pub(crate) fn new(config: &UNet2DConfig, placement: Placement, values: Values) -> Result<Self> {
        config.ensure_valid()?;
        let channels = config.channels();
        let first = channels[0];
        let mut builder = Builder::new(placement, values);
        let mut root = builder.root();

        let conv_in = Conv2d::new(root.at("conv_in"), config.in_channels.into(), first, 3)?;
        let time_proj = time_projection(&mut root, config)?;
        let width = config.time_width();
        let guidance_embedding = guidance_embedding(&mut root, config, &time_proj)?;
        let time_embedding = TimestepEmbedding::new(root.at("time_embedding"), &time_proj, width)?;
        let class_embedding = class_embedding(&mut root, config, &time_proj)?;
        let down_blocks = down_blocks(&mut root, config)?;
        let mid_block = mid_block(&mut root, config)?;
        let up_blocks = up_blocks(&mut root, config)?;
        let groups = config.norm_num_groups.into();
        let conv_norm_out =
            GroupNorm::new(root.at("conv_norm_out"), groups, first, config.norm_eps)?;
        let conv_out = Conv2d::new(root.at("conv_out"), first, config.out_channels.into(), 3)?;
        Ok(Self {
            config: config.clone(),
            parameters: builder.finish(),
            conv_in,
            time_proj,
            guidance_embedding,
            time_embedding,
            class_embedding,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out,
            conv_out,
            training: Cell::new(false),
        })
    }

    /// The settings the network was built from.
    pub fn config(&self) -> &UNet2DConfig {
        &self.config
    }

    /// The parameters, under the names they have in diffusers' files.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Switches dropout on or off; it is off in a new network.
    pub fn set_training(&self, training: bool) {
        self.training.set(training);
    }

    /// What the network makes of noisy samples; what that is (epsilon, x0, v) depends on its training.
    ///
    /// # Shapes and units
    ///
    /// - `sample`: `[batch, in_channels, height, width]`, kind of the parameters; height and width multiples of
    ///   2 to the number of levels less one
    /// - `timesteps`: `[batch]` or `[]`, `Int64` or floating point, counted from 0; for a Fourier time embedding noise
    ///   levels above 0
    /// - `class_labels`: `[batch]`, `Int64` for a table of classes (their range is checked on the CPU alone); any
    ///   timestep kind for [`ClassEmbedType::Timestep`]; `[batch, time_embedding_dim]` for [`ClassEmbedType::Identity`]
    /// - `guidance_weight`: `[batch]`, floating point, guidance scale less one; there for a network with a
    ///   `time_cond_proj_dim` and for no other
    /// - returns: `[batch, out_channels, height, width]`
    ///
    /// # Errors
    ///
    /// [`Error::InvalidShape`], [`Error::InvalidKind`]; [`Error::MissingClassLabels`],
    /// [`Error::UnexpectedClassLabels`], [`Error::ClassLabelOutOfRange`], [`Error::GuidanceWeight`]; [`Error::Torch`]
    /// if memory runs out or an input is on another device.
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

    /// As [`Self::forward`], with what left the bottom level beside it, for a discriminator that looks at features.
    ///
    /// # Shapes and units
    ///
    /// - returns: as `sample` the output; as `features` `[batch, channels, height / 2^n, width / 2^n]`, with the last of
    ///   `block_out_channels` and n one less than its length; both of one graph
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
        let sample = &self.in_memory_format(sample)?;
        let run = || {
            let timesteps = &one_per_sample(timesteps, sample.size()[0])?;
            let time = self.embed(Told { timesteps, ..told })?;
            let pass = Pass { time: Some(&time), training: self.training.get() };
            let (features, skips) = self.down(sample, pass)?;
            let sample = self.up(&features, skips, pass)?;
            Ok(NetworkOutput { sample: self.scale_output(sample, timesteps)?, features })
        };
        run().map_err(Error::torch(FORWARD))
    }

    /// What leaves the bottom level, without the way up: the features of [`Self::forward_with_features`].
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
        let sample = &self.in_memory_format(sample)?;
        let run = || {
            let timesteps = &one_per_sample(timesteps, sample.size()[0])?;
            let time = self.embed(Told { timesteps, ..told })?;
            let pass = Pass { time: Some(&time), training: self.training.get() };
            Ok(self.down(sample, pass)?.0)
        };
        run().map_err(Error::torch("UNet2DModel::features"))
    }

    fn in_memory_format(&self, sample: &Tensor) -> Result<Tensor> {
        Ok(if self.parameters.placement().channels_last {
            ddil_libtorch::channels_last(sample)?
        } else {
            sample.shallow_clone()
        })
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
            let class = match embedding {
                ClassEmbedding::Table { table, .. } => table.forward(labels)?,
                ClassEmbedding::Timestep(embedding) => {
                    let labels = one_per_sample(labels, timesteps.size()[0])?;
                    embedding.forward(&self.time_proj.forward(&labels)?.f_to_kind(kind)?)?
                }
                ClassEmbedding::Identity => labels.shallow_clone(),
            };
            time = time.f_add(&class.f_to_kind(kind)?)?;
        }
        self.config.act_fn.forward(&time)
    }

    /// Down to and through the bottom level, and what the levels on the way up will need.
    fn down(
        &self,
        sample: &Tensor,
        pass: Pass<'_>,
    ) -> std::result::Result<(Tensor, Vec<Tensor>), TchError> {
        let mut sample = sample.shallow_clone();
        if self.config.center_input_sample {
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
        self.conv_out.forward(&self.conv_norm_out.forward(&hidden)?.f_silu()?)
    }

    fn scale_output(&self, sample: Tensor, timesteps: &Tensor) -> Output {
        match self.config.time_embedding_type {
            TimeEmbeddingType::Positional => Ok(sample),
            TimeEmbeddingType::Fourier => sample.f_div(&timesteps.f_reshape([-1, 1, 1, 1])?),
        }
    }

    fn ensure_inputs(&self, sample: &Tensor, told: Told<'_>) -> Result<()> {
        let op = FORWARD;
        let channels = i64::from(self.config.in_channels);
        let step = 1 << (self.config.block_out_channels.len() - 1);
        let fits = matches!(sample.size()[..], [_, c, height, width]
            if c == channels && height > 0 && width > 0 && height % step == 0 && width % step == 0);
        if !fits {
            let expected = format!(
                "[batch, {channels}, height, width] with height and width multiples of {step}"
            );
            return Err(Error::InvalidShape { op, name: "sample", found: sample.size(), expected });
        }
        if !is_float(sample.kind()) {
            let (name, found) = ("sample", sample.kind());
            return Err(Error::InvalidKind { op, name, found, expected: "floating point" });
        }
        let batch = sample.size()[0];
        ensure_timesteps(op, told.timesteps, batch)?;
        self.ensure_class_labels(told.class_labels, batch)?;
        ensure_guidance_weight(op, told.guidance_weight, batch, self.guidance_embedding.is_some())
    }

    fn ensure_class_labels(&self, class_labels: Option<&Tensor>, batch: i64) -> Result<()> {
        let op = FORWARD;
        let (embedding, labels) = match (&self.class_embedding, class_labels) {
            (None, None) => return Ok(()),
            (None, Some(_)) => return Err(Error::UnexpectedClassLabels { op }),
            (Some(_), None) => return Err(Error::MissingClassLabels { op }),
            (Some(embedding), Some(labels)) => (embedding, labels),
        };
        match embedding {
            ClassEmbedding::Table { len, .. } => ensure_labels(op, labels, batch, len - 1),
            ClassEmbedding::Timestep(_) if labels.size() == [batch] => Ok(()),
            ClassEmbedding::Identity if labels.size() == [batch, self.config.time_width()] => {
                Ok(())
            }
            ClassEmbedding::Timestep(_) | ClassEmbedding::Identity => Err(Error::InvalidShape {
                op,
                name: "class_labels",
                found: labels.size(),
                expected: match embedding {
                    ClassEmbedding::Identity => format!("[{batch}, {}]", self.config.time_width()),
                    _ => format!("[{batch}], one per sample"),
                },
            }),
        }
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

fn class_embedding(
    root: &mut Scope<'_>,
    config: &UNet2DConfig,
    features: &TimeProjection,
) -> Result<Option<ClassEmbedding>> {
    let width = config.time_width();
    let scope = root.at("class_embedding");
    Ok(match (config.class_embed_type, config.num_class_embeds) {
        (Some(ClassEmbedType::Timestep), _) => {
            Some(ClassEmbedding::Timestep(TimestepEmbedding::new(scope, features, width)?))
        }
        (Some(ClassEmbedType::Identity), _) => Some(ClassEmbedding::Identity),
        (None, Some(len)) => {
            let len = i64::from(len);
            Some(ClassEmbedding::Table { table: Embedding::new(scope, len, width)?, len })
        }
        (None, None) => None,
    })
}

fn down_blocks(root: &mut Scope<'_>, config: &UNet2DConfig) -> Result<Vec<DownBlock>> {
    let channels = config.channels();
    let last = channels.len() - 1;
    let levels = config.down_block_types.iter().enumerate();
    levels
        .map(|(i, block_type)| {
            let attends = *block_type == DownBlockType::AttnDownBlock2D;
            let options = level(config, channels[i], config.layers_per_block as usize, attends);
            let padding = (i < last).then_some(i64::from(config.downsample_padding));
            let inputs = channels[i.saturating_sub(1)];
            let scope = root.at(&format!("down_blocks.{i}"));
            DownBlock::new(scope, [inputs, channels[i]], &options, padding)
        })
        .collect()
}

fn mid_block(root: &mut Scope<'_>, config: &UNet2DConfig) -> Result<Option<MidBlock>> {
    let channels = i64::from(config.block_out_channels[config.block_out_channels.len() - 1]);
    let scale = config.mid_block_scale_factor;
    let mut options = level(config, channels, 1, config.add_attention);
    options.resnet.output_scale = scale;
    if let Some(attention) = &mut options.attention {
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

fn up_blocks(root: &mut Scope<'_>, config: &UNet2DConfig) -> Result<Vec<UpBlock>> {
    let channels: Vec<i64> = config.channels().into_iter().rev().collect();
    let last = channels.len() - 1;
    let levels = config.up_block_types.iter().enumerate();
    levels
        .map(|(i, block_type)| {
            let attends = *block_type == UpBlockType::AttnUpBlock2D;
            let options = level(config, channels[i], config.layers_per_block as usize + 1, attends);
            let up_channels = UpChannels {
                below: channels[i.saturating_sub(1)],
                last_skip: channels[(i + 1).min(last)],
                outputs: channels[i],
            };
            UpBlock::new(root.at(&format!("up_blocks.{i}")), up_channels, &options, i < last)
        })
        .collect()
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
    LevelOptions { num_layers, resnet, attention: attends.then_some(attention) }
}
