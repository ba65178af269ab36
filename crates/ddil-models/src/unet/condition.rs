//! The U-Net conditioned on text, with the weight names and numbers of diffusers' `UNet2DConditionModel`.

use std::cell::Cell;
use std::path::Path;

use ddil_core::Conditioning;
use ddil_libtorch::ArgumentError;
use tch::{Kind, TchError, Tensor};

use crate::config::Config;
use crate::error::{
    Error, Result, ensure_dense, ensure_guidance_weight, ensure_part, ensure_timesteps, is_float,
};
use crate::layers::addition_embedding::{PooledTextEmbedding, TextTimeEmbedding};
use crate::layers::class_embedding::{ClassEmbedding, ClassOptions};
use crate::layers::embeddings::{
    GuidanceEmbedding, SinusoidalProjection, TimeProjection, TimestepEmbedding, one_per_sample,
};
use crate::layers::recompute::Recompute;
use crate::layers::resnet::{Pass, ResnetOptions, Text};
use crate::layers::transformer::TransformerOptions;
use crate::layers::{Conv2d, GroupNorm, Output};
use crate::network_output::NetworkOutput;
use crate::parameters::{Builder, Parameters, Placement, Scope, Values, build_filled, ensure_room};
use crate::unet::blocks::{LevelAttention, LevelOptions, MidBlock, down_blocks, up_blocks};
use crate::unet::body::Body;
use crate::unet::condition_config::{AdditionEmbedType, CrossAttention, UNet2DConditionConfig};
use crate::weights;

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

/// The embeddings of the inputs, computed before the first convolution.
struct Told {
    time: Tensor,
    text: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Told {
    fn pass<'a>(&'a self, training: bool, recompute: Option<&'a Recompute>) -> Pass<'a> {
        let text = self.text.as_ref().map(|states| Text { states, bias: self.bias.as_ref() });
        Pass { time: Some(&self.time), text, training, recompute }
    }
}

#[derive(Debug)]
enum AdditionEmbedding {
    TextTime(TextTimeEmbedding),
    Text(PooledTextEmbedding),
}

/// The U-Net of [Rombach et al. 2022](https://arxiv.org/abs/2112.10752) as diffusers generalised it, for Stable
/// Diffusion 1 and 2, SDXL, SSD-1B and consistency models distilled from them; built by
/// [`UNet2DConditionConfig::build`].
///
/// Parameters have the names of diffusers' files, and outputs agree with diffusers' up to rounding.
///
/// # Example
///
/// ```
/// use ddil_models::{
///     ConditionDownBlockType, ConditionUpBlockType, PerLevel, Placement, UNet2DConditionConfig,
///     UNet2DConditionInputs,
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
    parameters: Parameters,
    time_proj: TimeProjection,
    guidance_embedding: Option<GuidanceEmbedding>,
    time_embedding: TimestepEmbedding,
    class_embedding: Option<ClassEmbedding>,
    add_embedding: Option<AdditionEmbedding>,
    body: Body,
    training: Cell<bool>,
    recomputes: Cell<bool>,
}

impl UNet2DConditionConfig {
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
    pub fn without_values(&self) -> Result<UNet2DConditionModel> {
        UNet2DConditionModel::new(self, Placement::default(), Values::Sizes)
    }

    /// Checks the settings and builds a network with fresh parameters, initialised as `torch.nn` would; the embedding
    /// of a guidance weight starts at zero.
    ///
    /// The same seed gives the same parameters on every device.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) with every invalid value;
    /// [`Error::Torch`](crate::Error::Torch) if the device is not available or its memory does not suffice.
    pub fn build(&self, placement: Placement, seed: u64) -> Result<UNet2DConditionModel> {
        UNet2DConditionModel::new(self, placement, Values::Seeded(seed))
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
    ) -> Result<UNet2DConditionModel> {
        let path = weights.as_ref();
        build_filled(
            |values| UNet2DConditionModel::new(self, placement, values),
            |unet| weights::ensure_fits(&unet.parameters().named(), path),
            |unet| unet.parameters().load(path),
        )
    }
}

impl UNet2DConditionModel {
    pub(crate) fn new(
        config: &UNet2DConditionConfig,
        placement: Placement,
        values: Values,
    ) -> Result<Self> {
        config.ensure_valid()?;
        ensure_room(values, placement, || {
            Ok(Self::new(config, placement, Values::Sizes)?.parameters)
        })?;
        let (first, width) = (config.channels()[0], config.time_width());
        let mut builder = Builder::new(placement, values);
        let mut root = builder.root();

        let kernel = config.conv_in_kernel.into();
        let conv_in = Conv2d::new(root.at("conv_in"), config.in_channels.into(), first, kernel)?;
        let time_proj = TimeProjection::Positional(sinusoids(config, first));
        let guidance_embedding = config
            .time_cond_proj_dim
            .map(|width| {
                let scope = root.at("time_embedding.cond_proj");
                GuidanceEmbedding::new(scope, width.into(), &time_proj)
            })
            .transpose()?;
        let time_embedding = TimestepEmbedding::new(root.at("time_embedding"), &time_proj, width)?
            .with_activations(config.act_fn, config.timestep_post_act);
        let class_embedding =
            ClassEmbedding::new(root.at("class_embedding"), class_options(config), &time_proj)?;
        let add_embedding = add_embedding(root.at("add_embedding"), config)?;
        let body = body(&mut root, config, conv_in)?;
        Ok(Self {
            config: config.clone(),
            parameters: builder.finish(),
            time_proj,
            guidance_embedding,
            time_embedding,
            class_embedding,
            add_embedding,
            body,
            training: Cell::new(false),
            recomputes: Cell::new(false),
        })
    }

    /// The settings from which the network was built.
    pub fn config(&self) -> &UNet2DConditionConfig {
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

    /// The state to record at the start of a pass that will be recomputed.
    fn recompute(&self) -> Option<Recompute> {
        self.recomputes.get().then(|| Recompute::of(&self.parameters))
    }

    /// Names of the parts of a [`Conditioning`] that the network requires.
    pub fn conditioning_fields(&self) -> Vec<&'static str> {
        let text_time = matches!(self.add_embedding, Some(AdditionEmbedding::TextTime(_)));
        let fields = [
            ("class_labels", self.class_embedding.is_some()),
            ("encoder_hidden_states", self.text_width().is_some()),
            ("text_embeds", text_time),
            ("time_ids", text_time),
            ("guidance_weight", self.guidance_embedding.is_some()),
        ];
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
    /// [`Error::MissingPart`] and [`Error::UnexpectedPart`] for a part that is missing or not taken;
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind), [`Error::ClassLabelOutOfRange`]; [`Error::Torch`]
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
        let sample = &self.parameters.placement().arrange(sample)?;
        let run = || {
            let told = self.told(timesteps, sample.size()[0], inputs)?;
            let recompute = self.recompute();
            let pass = told.pass(self.training.get(), recompute.as_ref());
            let (features, skips) = self.body.down(sample, pass)?;
            Ok(NetworkOutput { sample: self.body.up(&features, skips, pass)?, features })
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
        inputs: UNet2DConditionInputs<'_>,
    ) -> Result<Tensor> {
        self.ensure_inputs(sample, timesteps, inputs)?;
        let sample = &self.parameters.placement().arrange(sample)?;
        let run = || {
            let told = self.told(timesteps, sample.size()[0], inputs)?;
            let recompute = self.recompute();
            Ok(self.body.down(sample, told.pass(self.training.get(), recompute.as_ref()))?.0)
        };
        run().map_err(Error::torch("UNet2DConditionModel::features"))
    }

    fn told(
        &self,
        timesteps: &Tensor,
        batch: i64,
        inputs: UNet2DConditionInputs<'_>,
    ) -> std::result::Result<Told, TchError> {
        let kind = self.parameters.placement().kind;
        let text = inputs.encoder_hidden_states.map(|text| text.f_to_kind(kind)).transpose()?;
        let bias = inputs.encoder_attention_mask.map(|mask| score_bias(mask, kind)).transpose()?;
        let timesteps = &one_per_sample(timesteps, batch)?;
        let time = self.embed(timesteps, text.as_ref(), inputs)?;
        Ok(Told { time, text, bias })
    }

    /// The embedding of timestep, guidance, class and text, after the activation that every block would apply to it.
    fn embed(
        &self,
        timesteps: &Tensor,
        text: Option<&Tensor>,
        inputs: UNet2DConditionInputs<'_>,
    ) -> Output {
        let kind = self.parameters.placement().kind;
        let mut features = self.time_proj.forward(timesteps)?.f_to_kind(kind)?;
        if let (Some(embedding), Some(weight)) = (&self.guidance_embedding, inputs.guidance_weight)
        {
            features = embedding.forward(&features, weight)?;
        }
        let mut time = self.time_embedding.forward(&features)?;
        if let (Some(embedding), Some(labels)) = (&self.class_embedding, inputs.class_labels) {
            time = time.f_add(&embedding.forward(labels, &self.time_proj, kind)?)?;
        }
        time = match (&self.add_embedding, text, inputs.text_embeds, inputs.time_ids) {
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
        self.config.act_fn.forward(&time)
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
        let op = FORWARD;
        ensure_dense(op, "sample", sample)?;
        inputs.ensure_dense(op)?;
        let channels = i64::from(self.config.in_channels);
        let fits = matches!(sample.size()[..], [_, c, height, width]
            if c == channels && height > 0 && width > 0);
        if !fits {
            let expected = format!("[batch, {channels}, height, width]");
            return Err(Error::Argument(ArgumentError::Shape {
                op,
                name: "sample",
                shape: sample.size(),
                expected,
            }));
        }
        ensure_float("sample", sample)?;
        let batch = sample.size()[0];
        ensure_timesteps(op, timesteps, batch)?;
        self.ensure_text(inputs, batch)?;
        self.ensure_text_time(inputs, batch)?;
        ClassEmbedding::ensure(op, self.class_embedding.as_ref(), inputs.class_labels, batch)?;
        let takes_weight = self.guidance_embedding.is_some();
        ensure_guidance_weight(op, inputs.guidance_weight, batch, takes_weight)
    }

    fn ensure_text(&self, inputs: UNet2DConditionInputs<'_>, batch: i64) -> Result<()> {
        let (op, name) = (FORWARD, "encoder_hidden_states");
        let width = self.text_width();
        ensure_part(op, name, inputs.encoder_hidden_states, width.is_some())?;
        let (Some(text), Some(width)) = (inputs.encoder_hidden_states, width) else {
            return ensure_part(op, "encoder_attention_mask", inputs.encoder_attention_mask, false);
        };
        let found = text.size();
        let fits = matches!(found[..], [n, tokens, c] if n == batch && tokens > 0 && c == width);
        if !fits {
            let expected = format!("[{batch}, tokens, {width}]");
            return Err(Error::Argument(ArgumentError::Shape { op, name, shape: found, expected }));
        }
        ensure_float(name, text)?;
        let Some(mask) = inputs.encoder_attention_mask else { return Ok(()) };
        let name = "encoder_attention_mask";
        ensure_part(op, name, Some(mask), self.config.text_width().is_some())?;
        if mask.size() != found[..2] {
            let expected = format!("{:?}, one per token", &found[..2]);
            return Err(Error::Argument(ArgumentError::Shape {
                op,
                name,
                shape: mask.size(),
                expected,
            }));
        }
        Ok(())
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
            if !matches!(part.size()[..], [n, _] if n == batch) {
                let expected = format!("[{batch}, width]");
                return Err(Error::Argument(ArgumentError::Shape {
                    op,
                    name,
                    shape: part.size(),
                    expected,
                }));
            }
        }
        ensure_float("text_embeds", text)?;
        let features = numbers.size()[1] * embedding.projection.width;
        if text.size()[1] + features != embedding.inputs {
            let expected = format!(
                "[{batch}, width] with width and {features} features of `time_ids` together {}",
                embedding.inputs
            );
            let (name, found) = ("text_embeds", text.size());
            return Err(Error::Argument(ArgumentError::Shape { op, name, shape: found, expected }));
        }
        Ok(())
    }
}

fn ensure_float(name: &'static str, tensor: &Tensor) -> Result<()> {
    if is_float(tensor.kind()) {
        return Ok(());
    }
    let (op, found) = (FORWARD, tensor.kind());
    Err(Error::Argument(ArgumentError::Kind { op, name, kind: found, expected: "floating point" }))
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

fn body(root: &mut Scope<'_>, config: &UNet2DConditionConfig, conv_in: Conv2d) -> Result<Body> {
    let channels = config.channels();
    let levels = channels.len();
    let down_levels: Vec<_> = (0..levels)
        .map(|i| level(config, i, config.num_layers(i) as usize, config.cross_down(i)))
        .collect();
    let up_levels: Vec<_> = (0..levels)
        .map(|i| {
            let finest_first = levels - 1 - i;
            let num_layers = config.num_layers(finest_first) as usize + 1;
            level(config, finest_first, num_layers, config.cross_up(i))
        })
        .collect();
    let padding = i64::from(config.downsample_padding);
    let (first, groups) = (channels[0], config.norm_num_groups.into());
    let kernel = config.conv_out_kernel.into();
    Ok(Body {
        centers_input: config.center_input_sample,
        conv_in,
        down_blocks: down_blocks(root, &channels, &down_levels, padding)?,
        mid_block: mid_block(root, config)?,
        up_blocks: up_blocks(root, &channels, &up_levels)?,
        conv_norm_out: GroupNorm::new(root.at("conv_norm_out"), groups, first, config.norm_eps)?,
        last_activation: config.act_fn,
        conv_out: Conv2d::new(root.at("conv_out"), first, config.out_channels.into(), kernel)?,
    })
}

fn mid_block(root: &mut Scope<'_>, config: &UNet2DConditionConfig) -> Result<Option<MidBlock>> {
    let last = config.block_out_channels.len() - 1;
    let cross = config.cross_mid();
    let num_layers = if cross.is_some() { 2 } else { 1 };
    let mut options = level(config, last, num_layers, cross);
    options.resnet.output_scale = config.mid_block_scale_factor;
    if let LevelAttention::Text { options, .. } = &mut options.attention {
        // diffusers does not pass the setting to this level.
        options.only_cross_attention = false;
    }
    let channels = i64::from(config.block_out_channels[last]);
    let scope = root.at("mid_block");
    config.mid_block_type.map(|_| MidBlock::new(scope, channels, &options)).transpose()
}

fn level(
    config: &UNet2DConditionConfig,
    level: usize,
    num_layers: usize,
    cross: Option<CrossAttention>,
) -> LevelOptions {
    let groups = i64::from(config.norm_num_groups);
    let channels = i64::from(config.block_out_channels[level]);
    let resnet = ResnetOptions {
        time_width: Some(config.time_width()),
        groups,
        eps: config.norm_eps,
        activation: config.act_fn,
        time_scale_shift: config.resnet_time_scale_shift,
        dropout: config.dropout,
        output_scale: 1.0,
    };
    let attention = match cross.and_then(|cross| cross.depth) {
        None => LevelAttention::None,
        Some(depth) => {
            let options = TransformerOptions {
                channels,
                heads: config.attention_head_dim.at(level).map_or(1, i64::from),
                text_width: config.cross_attention_dim.at(level).map_or(0, i64::from),
                norm_groups: groups,
                linear_projection: config.use_linear_projection,
                only_cross_attention: config.only_cross_attention.at(level).unwrap_or(false),
            };
            LevelAttention::Text { options, depth }
        }
    };
    LevelOptions { num_layers, resnet, attention }
}
