//! Transformers whose tokens are the pixels of a feature map, with cross attention to a text.

use tch::Tensor;

use crate::error::Result;
use crate::layers::attention::{MultiHeadAttention, MultiHeadOptions};
use crate::layers::recompute::{Part, Recompute};
use crate::layers::resnet::Text;
use crate::layers::{Conv2d, GroupNorm, LayerNorm, Linear, Output};
use crate::parameters::{Joined, Scope, Share};

/// The epsilon of the first group norm; the network's setting applies only to residual blocks.
const GROUP_NORM_EPS: f64 = 1e-6;
const LAYER_NORM_EPS: f64 = 1e-5;
/// Width of the feed-forward layer, as a multiple of the channels.
const WIDENING: i64 = 4;

/// Sizes and settings of a [`TextTransformer`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct TransformerOptions {
    /// A multiple of `heads` and of `norm_groups`.
    pub(crate) channels: i64,
    pub(crate) heads: i64,
    pub(crate) text_width: i64,
    pub(crate) norm_groups: i64,
    /// Whether the input and output projections are linear layers instead of 1x1 convolutions; they differ only in the
    /// shape of their weights.
    pub(crate) linear_projection: bool,
    /// Whether the first attention of a block attends to the text, like the second, instead of the pixels.
    pub(crate) only_cross_attention: bool,
}

/// `x + out(blocks(in(norm(x))))`, every pixel a token.
#[derive(Debug)]
pub(crate) struct TextTransformer {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<Part<TransformerBlock>>,
    proj_out: Projection,
}

impl TextTransformer {
    pub(crate) fn new(
        mut scope: Scope<'_>,
        options: TransformerOptions,
        num_blocks: usize,
    ) -> Result<Self> {
        let TransformerOptions { channels, norm_groups, linear_projection, .. } = options;
        let norm = GroupNorm::new(scope.at("norm"), norm_groups, channels, GROUP_NORM_EPS)?;
        let proj_in = Projection::new(scope.at("proj_in"), channels, linear_projection)?;
        let blocks = (0..num_blocks)
            .map(|i| {
                let scope = scope.at(&format!("transformer_blocks.{i}"));
                Ok(Part::new(TransformerBlock::new(scope, options)?))
            })
            .collect::<Result<_>>()?;
        let proj_out = Projection::new(scope.at("proj_out"), channels, linear_projection)?;
        Ok(Self { norm, proj_in, blocks, proj_out })
    }

    pub(crate) fn forward(
        &self,
        x: &Tensor,
        text: Text<'_>,
        recompute: Option<&Recompute>,
    ) -> Output {
        let mut tokens = self.proj_in.to_tokens(&self.norm.forward(x)?)?;
        for block in &self.blocks {
            tokens = block.forward_with_text(&tokens, text, recompute)?;
        }
        // `x` comes first: if the memory formats differ, the sum has that of the map.
        x.f_add(&self.proj_out.to_map(&tokens, &x.size())?)
    }
}

/// Mixes channels, before a map becomes tokens or after tokens become a map.
#[derive(Debug)]
enum Projection {
    Linear(Linear),
    Conv(Conv2d),
}

impl Projection {
    fn new(scope: Scope<'_>, channels: i64, linear: bool) -> Result<Self> {
        Ok(if linear {
            Self::Linear(Linear::new(scope, channels, channels)?)
        } else {
            Self::Conv(Conv2d::new(scope, channels, channels, 1)?)
        })
    }

    fn to_tokens(&self, map: &Tensor) -> Output {
        match self {
            Self::Linear(linear) => linear.forward(&tokens_of(map)?),
            Self::Conv(conv) => tokens_of(&conv.forward(map)?),
        }
    }

    fn to_map(&self, tokens: &Tensor, size: &[i64]) -> Output {
        match self {
            Self::Linear(linear) => map_of(&linear.forward(tokens)?, size),
            Self::Conv(conv) => conv.forward(&map_of(tokens, size)?),
        }
    }
}

/// `[batch, channels, height, width]` to `[batch, height * width, channels]`; a view of a channels-last map.
fn tokens_of(map: &Tensor) -> Output {
    // Contiguous, as layer norms require and matrix products prefer.
    map.f_flatten(2, -1)?.f_transpose(1, 2)?.f_contiguous()
}

/// The inverse, a view in channels-last order.
fn map_of(tokens: &Tensor, size: &[i64]) -> Output {
    tokens.f_transpose(1, 2)?.f_reshape(size)
}

/// Self-attention of the pixels, cross attention to the text, feed-forward, each after a norm and with a residual
/// connection.
#[derive(Debug)]
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: MultiHeadAttention,
    norm2: LayerNorm,
    attn2: MultiHeadAttention,
    norm3: LayerNorm,
    ff: FeedForward,
    only_cross_attention: bool,
}

impl TransformerBlock {
    fn new(mut scope: Scope<'_>, options: TransformerOptions) -> Result<Self> {
        let TransformerOptions { channels, heads, text_width, only_cross_attention, .. } = options;
        let attention = |scope: Scope<'_>, context_channels: i64| {
            let options = MultiHeadOptions { channels, context_channels, heads, biased: false };
            MultiHeadAttention::new(scope, options)
        };
        let first = if only_cross_attention { text_width } else { channels };
        Ok(Self {
            norm1: LayerNorm::new(scope.at("norm1"), channels, LAYER_NORM_EPS)?,
            attn1: attention(scope.at("attn1"), first)?,
            norm2: LayerNorm::new(scope.at("norm2"), channels, LAYER_NORM_EPS)?,
            attn2: attention(scope.at("attn2"), text_width)?,
            norm3: LayerNorm::new(scope.at("norm3"), channels, LAYER_NORM_EPS)?,
            ff: FeedForward::new(scope.at("ff"), channels)?,
            only_cross_attention,
        })
    }

    fn forward(&self, tokens: &Tensor, text: Text<'_>) -> Output {
        let normed = self.norm1.forward(tokens)?;
        // The mask of the text applies only to the second attention, as in diffusers.
        let context = if self.only_cross_attention { text.states } else { &normed };
        let tokens = tokens.f_add(&self.attn1.forward(&normed, context, None)?)?;
        let normed = self.norm2.forward(&tokens)?;
        let tokens = tokens.f_add(&self.attn2.forward(&normed, text.states, text.bias)?)?;
        tokens.f_add(&self.ff.forward(&self.norm3.forward(&tokens)?)?)
    }
}

impl Part<TransformerBlock> {
    fn forward_with_text(
        &self,
        tokens: &Tensor,
        text: Text<'_>,
        recompute: Option<&Recompute>,
    ) -> Output {
        let inputs: Vec<&Tensor> = [tokens, text.states].into_iter().chain(text.bias).collect();
        self.forward(&inputs, recompute, |block, inputs| {
            block.forward(inputs[0], Text { states: inputs[1], bias: inputs.get(2).copied() })
        })
    }
}

/// `W2 (a * gelu(b))` with `(a, b) = W1 x`, GEGLU of [Shazeer 2020](https://arxiv.org/abs/2002.05202).
#[derive(Debug)]
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn new(mut scope: Scope<'_>, channels: i64) -> Result<Self> {
        let inner = WIDENING * channels;
        let proj = Linear::new(scope.at("net.0.proj"), channels, 2 * inner)?;
        for name in ["net.0.proj.weight", "net.0.proj.bias"] {
            scope.mark(name, Joined { axis: 0, parts: vec![inner; 2], share: Share::First });
        }
        Ok(Self { proj, out: Linear::new(scope.at("net.2"), inner, channels)? })
    }

    fn forward(&self, tokens: &Tensor) -> Output {
        let halves = self.proj.forward(tokens)?.f_chunk(2, -1)?;
        self.out.forward(&halves[0].f_mul(&halves[1].f_gelu("none")?)?)
    }
}
