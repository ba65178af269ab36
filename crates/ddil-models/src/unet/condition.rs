//! The U-Net conditioned on text, with the weight names and numbers of diffusers' `UNet2DConditionModel`.

use ddil_core::Conditioning;
use ddil_files::Invalid;
use ddil_libtorch::{ensure_dense, ensure_real, ensure_shape};
use tch::{Kind, TchError, Tensor};

use crate::config::NetworkConfig;
use crate::error::{Result, ensure_part};
use crate::layers::addition_embedding::{PooledTextEmbedding, TextTimeEmbedding};
use crate::layers::class_embedding::ClassOptions;
use crate::layers::embeddings::{SinusoidalProjection, TimeProjection};
use crate::layers::resnet::ResnetOptions;
use crate::layers::transformer::TransformerOptions;
use crate::layers::{Conv2d, Output};
use crate::network_output::NetworkOutput;
use crate::parameters::{Builder, Parameters, Placement, Scope, Values};
use crate::unet::blocks::LevelAttention;
use crate::unet::body::{Body, BodyOptions, Level};
use crate::unet::condition_config::{AdditionEmbedType, CrossAttention, UNet2DConditionConfig};
use crate::unet::core::{Embedded, Embeddings, Inputs, UNet};

const FORWARD: &str = "UNet2DConditionModel::forward";
/// Added to the scores of tokens that are masked out, as in diffusers.
const MASKED_SCORE: f64 = -10_000.0;

/// The inputs of a [`UNet2DConditionModel`] other than sample and timesteps. The settings of a network determine which
/// parts it requires; other parts are an error.
///
/// # Example
///
/// ```
/// use ddil_core::Conditioning;
/// use ddil_models::UNet2DConditionInputs;
/// use tch::{Tensor, kind};
///
/// let text = Tensor::randn([2, 77, 768], kind::FLOAT_CPU);
/// let inputs = UNet2DConditionInputs::text(&text);
/// assert!(inputs.time_ids.is_none());
///
/// let conditioning = Conditioning::none().with(Conditioning::ENCODER_HIDDEN_STATES, text);
/// assert!(UNet2DConditionInputs::from(&conditioning).encoder_hidden_states.is_some());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct UNet2DConditionInputs<'a> {
    /// Embeddings of the text's tokens, `[batch, tokens, cross_attention_dim]`, floating point; for a network with
    /// cross attention, or one that pools the text.
    pub encoder_hidden_states: Option<&'a Tensor>,
    /// Mask of the valid tokens: `[batch, tokens]`, `Bool` or 1 and 0; `None` is all. It applies to cross attention,
    /// but not to the pooling of a text.
    pub encoder_attention_mask: Option<&'a Tensor>,
    /// The text as a whole, `[batch, width]`, floating point; SDXL's second encoder returns 1280 values.
    pub text_embeds: Option<&'a Tensor>,
    /// Numbers of size and crop, `[batch, numbers]`; SDXL has 6: original height and width, top and left of the crop,
    /// target height and width, in pixels.
    pub time_ids: Option<&'a Tensor>,
    /// As in [`UNet2DModel::forward`](crate::UNet2DModel::forward); `[batch, projection_class_embeddings_input_dim]`
    /// for labels that are projected.
    pub class_labels: Option<&'a Tensor>,
    /// `[batch]`, floating point, guidance scale minus one; for a network with a `time_cond_proj_dim`.
    pub guidance_weight: Option<&'a Tensor>,
}

impl<'a> UNet2DConditionInputs<'a> {
    fn ensure_dense(&self, op: &'static str) -> Result<()> {
        let parts = [
            ("encoder_hidden_states", self.encoder_hidden_states),
            ("encoder_attention_mask", self.encoder_attention_mask),
            ("text_embeds", self.text_embeds),
            ("time_ids", self.time_ids),
            ("class_labels", self.class_labels),
        ];
        let given = parts.into_iter().filter_map(|(name, part)| Some((name, part?)));
        for (name, part) in given {
            ensure_dense(op, name, part)?;
        }
        Ok(())
    }

    fn common(self, timesteps: &'a Tensor) -> Inputs<'a> {
        let Self { class_labels, guidance_weight, .. } = self;
        Inputs { timesteps, class_labels, guidance_weight }
    }

    /// Only the embeddings of a text's tokens.
    pub fn text(encoder_hidden_states: &'a Tensor) -> Self {
        Self { encoder_hidden_states: Some(encoder_hidden_states), ..Self::default() }
    }
}

impl<'a> From<&'a Conditioning> for UNet2DConditionInputs<'a> {
    /// Every part that is present, without a mask.
    fn from(conditioning: &'a Conditioning) -> Self {
        Self {
            encoder_hidden_states: conditioning.get(Conditioning::ENCODER_HIDDEN_STATES),
            encoder_attention_mask: None,
            text_embeds: conditioning.get(Conditioning::TEXT_EMBEDS),
            time_ids: conditioning.get(Conditioning::TIME_IDS),
            class_labels: conditioning.get(Conditioning::CLASS_LABELS),
            guidance_weight: conditioning.get(Conditioning::GUIDANCE_WEIGHT),
        }
    }
}

#[derive(Debug)]
enum AdditionEmbedding {
    TextTime(TextTimeEmbedding),
    Text(PooledTextEmbedding),
}

/// The U-Net of [Rombach et al. 2022](https://arxiv.org/abs/2112.10752) as diffusers generalised it, for Stable
/// Diffusion 1 and 2, SDXL, SSD-1B and consistency models distilled from them; built
/// from a [`UNet2DConditionConfig`]. The embedding of a guidance weight starts at zero.
///
/// Parameters have the names of diffusers' files, and outputs agree with diffusers' up to rounding.
///
/// # Example
///
/// ```
/// use ddil_models::{
///     ConditionDownBlockType, ConditionUpBlockType, NetworkConfig, PerLevel, Placement,
///     UNet2DConditionConfig, UNet2DConditionInputs,
/// };
/// use tch::{Tensor, kind};
///
/// let config = UNet2DConditionConfig {
///     down_block_types: vec![
///         ConditionDownBlockType::CrossAttnDownBlock2D,
///         ConditionDownBlockType::DownBlock2D,
///     ],
///     up_block_types: vec![
///         ConditionUpBlockType::UpBlock2D,
///         ConditionUpBlockType::CrossAttnUpBlock2D,
///     ],
///     block_out_channels: vec![8, 16],
///     norm_num_groups: 4,
///     attention_head_dim: PerLevel::All(2),
///     cross_attention_dim: PerLevel::All(12),
///     ..UNet2DConditionConfig::sd15()
/// };
/// let unet = config.build(Placement::default(), 0)?;
///
/// let (x_t, t) = (Tensor::randn([2, 4, 8, 8], kind::FLOAT_CPU), Tensor::from_slice(&[999_i64, 4]));
/// let text = Tensor::randn([2, 7, 12], kind::FLOAT_CPU);
/// let output = unet.forward(&x_t, &t, UNet2DConditionInputs::text(&text))?;
/// assert_eq!(output.size(), [2, 4, 8, 8]);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct UNet2DConditionModel {
    config: UNet2DConditionConfig,
    add_embedding: Option<AdditionEmbedding>,
    unet: UNet,
}

impl NetworkConfig for UNet2DConditionConfig {
    type Network = UNet2DConditionModel;

    const CLASS_NAME: &'static str = "UNet2DConditionModel";

    fn problems(&self) -> Vec<Invalid> {
        self.check()
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<UNet2DConditionModel> {
        UNet2DConditionModel::new(self, placement, values)
    }

    fn parameters_of(network: &UNet2DConditionModel) -> &Parameters {
        network.parameters()
    }
}

impl UNet2DConditionModel {
    fn new(config: &UNet2DConditionConfig, placement: Placement, values: Values) -> Result<Self> {
        let first = i64::from(config.block_out_channels[0]);
        let mut builder = Builder::new(placement, values);
        let mut root = builder.root();
        let kernel = config.conv_in_kernel.into();
        let conv_in = Conv2d::new(root.at("conv_in"), config.in_channels.into(), first, kernel)?;
        let time_proj = TimeProjection::Positional(sinusoids(config, first));
        let embeddings = Embeddings::new(
            &mut root,
            time_proj,
            config.time_cond_proj_dim,
            class_options(config),
            config.timestep_post_act,
        )?;
        let add_embedding = add_embedding(root.at("add_embedding"), config)?;
        let body = Body::new(&mut root, conv_in, body_options(config))?;
        let unet = UNet::new(builder.finish(), embeddings, body);
        Ok(Self { config: config.clone(), add_embedding, unet })
    }

    /// The settings from which the network was built.
    pub fn config(&self) -> &UNet2DConditionConfig {
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

    /// Switches activation checkpointing on or off; see
    /// [`UNet2DModel::set_activation_checkpointing`](crate::UNet2DModel::set_activation_checkpointing).
    pub fn set_activation_checkpointing(&self, on: bool) {
        self.unet.recomputes.set(on);
    }

    /// Whether the backward pass recomputes activations.
    pub fn activation_checkpointing(&self) -> bool {
        self.unet.recomputes.get()
    }

    /// Names of the parts of a [`Conditioning`] that the network requires.
    pub fn conditioning_fields(&self) -> Vec<&'static str> {
        let text_time = matches!(self.add_embedding, Some(AdditionEmbedding::TextTime(_)));
        let [class, weight] = self.unet.embeddings.parts();
        let text = ("encoder_hidden_states", self.text_width().is_some());
        let fields = [class, text, ("text_embeds", text_time), ("time_ids", text_time), weight];
        fields.into_iter().filter_map(|(name, needed)| needed.then_some(name)).collect()
    }

    /// The output for noisy samples; its meaning (epsilon, x0, v) depends on the training.
    ///
    /// # Shapes and units
    ///
    /// - `sample`: `[batch, in_channels, height, width]`, kind of the parameters; any height and width
    /// - `timesteps`: `[batch]` or `[]`, `Int64` or floating point, counted from 0
    /// - `inputs`: see [`UNet2DConditionInputs`]; floating point parts are cast to the kind of the parameters
    /// - returns: `[batch, out_channels, height, width]`
    ///
    /// # Errors
    ///
    /// [`Error::MissingPart`](crate::Error::MissingPart) and [`Error::UnexpectedPart`](crate::Error::UnexpectedPart) for a part that is missing or not taken;
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind), [`Error::ClassLabelOutOfRange`](crate::Error::ClassLabelOutOfRange); [`Error::Torch`](crate::Error::Torch)
    /// if memory runs out or an input is on another device.
    pub fn forward(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        inputs: UNet2DConditionInputs<'_>,
    ) -> Result<Tensor> {
        Ok(self.forward_with_features(sample, timesteps, inputs)?.sample)
    }

    /// As [`Self::forward`], with the output of the bottom level as features for a discriminator.
    ///
    /// # Shapes and units
    ///
    /// - returns: as `sample` the output; as `features` `[batch, channels, height / 2^n, width / 2^n]`, with the last
    ///   of `block_out_channels`, n one less than its length, and halves rounded up; both from one pass
    ///
    /// # Errors
    ///
    /// As [`Self::forward`].
    pub fn forward_with_features(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        inputs: UNet2DConditionInputs<'_>,
    ) -> Result<NetworkOutput> {
        self.ensure_inputs(sample, timesteps, inputs)?;
        let embed = || self.embed(timesteps, sample.size()[0], inputs);
        self.unet.pass(FORWARD, sample, embed, Body::forward)
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
        inputs: UNet2DConditionInputs<'_>,
    ) -> Result<Tensor> {
        self.ensure_inputs(sample, timesteps, inputs)?;
        let embed = || self.embed(timesteps, sample.size()[0], inputs);
        self.unet.pass("UNet2DConditionModel::features", sample, embed, Body::features)
    }

    fn embed(
        &self,
        timesteps: &Tensor,
        batch: i64,
        inputs: UNet2DConditionInputs<'_>,
    ) -> Result<Embedded, TchError> {
        let kind = self.unet.parameters.placement().kind;
        let text = inputs.encoder_hidden_states.map(|text| text.f_to_kind(kind)).transpose()?;
        let bias = inputs.encoder_attention_mask.map(|mask| score_bias(mask, kind)).transpose()?;
        let mut time = self.unet.embeddings.forward(inputs.common(timesteps), batch, kind)?;
        time = match (&self.add_embedding, &text, inputs.text_embeds, inputs.time_ids) {
            (Some(AdditionEmbedding::Text(embedding)), Some(text), ..) => {
                time.f_add(&embedding.forward(text)?)?
            }
            (Some(AdditionEmbedding::TextTime(embedding)), _, Some(text), Some(numbers)) => {
                time.f_add(&embedding.forward(text, numbers, kind)?)?
            }
            _ => time,
        };
        if let Some(activation) = self.config.time_embedding_act_fn {
            time = activation.forward(&time)?;
        }
        Ok(Embedded { time: self.config.act_fn.forward(&time)?, text, bias })
    }

    /// Width of the text, if the network uses one.
    fn text_width(&self) -> Option<i64> {
        let pooled = match self.add_embedding {
            Some(AdditionEmbedding::Text(_)) => self.config.cross_attention_dim.at(0),
            _ => None,
        };
        self.config.text_width().or(pooled).map(i64::from)
    }

    fn ensure_inputs(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        inputs: UNet2DConditionInputs<'_>,
    ) -> Result<()> {
        ensure_real(FORWARD, "sample", sample)?;
        inputs.ensure_dense(FORWARD)?;
        let channels = i64::from(self.config.in_channels);
        let fits = matches!(sample.size()[..], [_, c, height, width]
            if c == channels && height > 0 && width > 0);
        let expected = || format!("[batch, {channels}, height, width]");
        ensure_shape(FORWARD, "sample", sample, fits, expected)?;
        let batch = sample.size()[0];
        self.ensure_text(inputs, batch)?;
        self.ensure_text_time(inputs, batch)?;
        self.unet.embeddings.ensure(FORWARD, inputs.common(timesteps), batch)
    }

    fn ensure_text(&self, inputs: UNet2DConditionInputs<'_>, batch: i64) -> Result<()> {
        let (op, name, mask_name) = (FORWARD, "encoder_hidden_states", "encoder_attention_mask");
        let width = self.text_width();
        ensure_part(op, name, inputs.encoder_hidden_states, width.is_some())?;
        let (Some(text), Some(width)) = (inputs.encoder_hidden_states, width) else {
            return ensure_part(op, mask_name, inputs.encoder_attention_mask, false);
        };
        ensure_real(op, name, text)?;
        let size = text.size();
        let fits = matches!(size[..], [n, tokens, c] if n == batch && tokens > 0 && c == width);
        ensure_shape(op, name, text, fits, || format!("[{batch}, tokens, {width}]"))?;
        let Some(mask) = inputs.encoder_attention_mask else { return Ok(()) };
        ensure_part(op, mask_name, Some(mask), self.config.text_width().is_some())?;
        let expected = || format!("{:?}, one per token", &size[..2]);
        Ok(ensure_shape(op, mask_name, mask, mask.size() == size[..2], expected)?)
    }

    fn ensure_text_time(&self, inputs: UNet2DConditionInputs<'_>, batch: i64) -> Result<()> {
        let op = FORWARD;
        let (text, numbers) = (inputs.text_embeds, inputs.time_ids);
        let Some(AdditionEmbedding::TextTime(embedding)) = &self.add_embedding else {
            ensure_part(op, "text_embeds", text, false)?;
            return ensure_part(op, "time_ids", numbers, false);
        };
        ensure_part(op, "text_embeds", text, true)?;
        ensure_part(op, "time_ids", numbers, true)?;
        let (Some(text), Some(numbers)) = (text, numbers) else { return Ok(()) };
        for (name, part) in [("text_embeds", text), ("time_ids", numbers)] {
            let fits = matches!(part.size()[..], [n, _] if n == batch);
            ensure_shape(op, name, part, fits, || format!("[{batch}, width]"))?;
        }
        ensure_real(op, "text_embeds", text)?;
        let (features, inputs) = (numbers.size()[1] * embedding.projection.width, embedding.inputs);
        let fits = text.size()[1] + features == inputs;
        let expected = || {
            format!(
                "[{batch}, width] with width and {features} features of `time_ids` together {inputs}"
            )
        };
        Ok(ensure_shape(op, "text_embeds", text, fits, expected)?)
    }
}

/// `[batch, 1, 1, tokens]` from `[batch, tokens]`: 0 for valid tokens.
fn score_bias(mask: &Tensor, kind: Kind) -> Output {
    let absent = mask.f_to_kind(kind)?.f_mul_scalar(-1.0)?.f_add_scalar(1.0)?;
    absent.f_mul_scalar(MASKED_SCORE)?.f_unsqueeze(1)?.f_unsqueeze(1)
}

fn sinusoids(config: &UNet2DConditionConfig, width: i64) -> SinusoidalProjection {
    let (cosines_first, freq_shift) = (config.flip_sin_to_cos, config.freq_shift);
    SinusoidalProjection { width, cosines_first, freq_shift }
}

fn class_options(config: &UNet2DConditionConfig) -> ClassOptions {
    ClassOptions {
        embed_type: config.class_embed_type,
        num_classes: config.num_class_embeds,
        label_width: config.projection_class_embeddings_input_dim.unwrap_or(0),
        width: config.time_width(),
        activation: config.act_fn,
    }
}

fn add_embedding(
    scope: Scope<'_>,
    config: &UNet2DConditionConfig,
) -> Result<Option<AdditionEmbedding>> {
    let width = config.time_width();
    Ok(match config.addition_embed_type {
        None => None,
        Some(AdditionEmbedType::TextTime) => {
            let features = config.addition_time_embed_dim.unwrap_or(0);
            let inputs = config.projection_class_embeddings_input_dim.unwrap_or(0);
            let projection = sinusoids(config, features.into());
            let embedding = TextTimeEmbedding::new(scope, projection, inputs.into(), width)?;
            Some(AdditionEmbedding::TextTime(embedding))
        }
        Some(AdditionEmbedType::Text) => {
            let text_width = config.cross_attention_dim.at(0).unwrap_or(0).into();
            let heads = config.addition_embed_type_num_heads.into();
            let embedding = PooledTextEmbedding::new(scope, text_width, heads, width)?;
            Some(AdditionEmbedding::Text(embedding))
        }
    })
}

fn body_options(config: &UNet2DConditionConfig) -> BodyOptions {
    let channels = config.channels();
    let levels = channels.len();
    let down = (0..levels).map(|level| {
        (config.num_layers(level) as usize, attention(config, level, config.cross_down(level)))
    });
    let up = (0..levels).map(|i| {
        let level = levels - 1 - i;
        (config.num_layers(level) as usize + 1, attention(config, level, config.cross_up(i)))
    });
    BodyOptions {
        channels,
        down: down.collect(),
        mid: config.mid_block_type.map(|_| mid_level(config)),
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
        last_activation: config.act_fn,
        out_channels: config.out_channels.into(),
        out_kernel: config.conv_out_kernel.into(),
    }
}

fn mid_level(config: &UNet2DConditionConfig) -> Level {
    let cross = config.cross_mid();
    let num_layers = if cross.is_some() { 2 } else { 1 };
    let mut attention = attention(config, config.block_out_channels.len() - 1, cross);
    if let LevelAttention::Text { options, .. } = &mut attention {
        // diffusers does not pass the setting to this level.
        options.only_cross_attention = false;
    }
    (num_layers, attention)
}

fn attention(
    config: &UNet2DConditionConfig,
    level: usize,
    cross: Option<CrossAttention>,
) -> LevelAttention {
    let Some(depth) = cross.and_then(|cross| cross.depth) else { return LevelAttention::None };
    let options = TransformerOptions {
        channels: config.block_out_channels[level].into(),
        heads: config.attention_head_dim.at(level).map_or(1, i64::from),
        text_width: config.cross_attention_dim.at(level).map_or(0, i64::from),
        norm_groups: config.norm_num_groups.into(),
        linear_projection: config.use_linear_projection,
        only_cross_attention: config.only_cross_attention.at(level).unwrap_or(false),
    };
    LevelAttention::Text { options, depth }
}
