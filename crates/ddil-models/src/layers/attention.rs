//! Attention: self-attention and cross-attention of tokens, and self-attention of the pixels of a feature map.

use ddil_libtorch::Autocast;
use tch::{Device, Kind, TchError, Tensor};

use crate::error::Result;
use crate::layers::{GroupNorm, Linear, Output};
use crate::parameters::Scope;

/// Sizes and scales of an [`AttentionBlock`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionOptions {
    pub(crate) channels: i64,
    /// Channels of one head; `channels` is a multiple of it.
    pub(crate) head_dim: i64,
    /// Groups of the input normalisation; `None` omits it.
    pub(crate) norm_groups: Option<i64>,
    pub(crate) eps: f64,
    pub(crate) output_scale: f64,
}

/// Sizes of a [`MultiHeadAttention`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct MultiHeadOptions {
    /// Channels of the queries and of the output; a multiple of `heads`.
    pub(crate) channels: i64,
    /// Channels of the context (keys and values).
    pub(crate) context_channels: i64,
    pub(crate) heads: i64,
    /// Whether queries, keys and values have a bias; the output projection always has one.
    pub(crate) biased: bool,
}

/// `out(softmax(Q K^T / sqrt(channels of a head)) V)`, section 3.2 of
/// [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762).
#[derive(Debug)]
pub(crate) struct MultiHeadAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: i64,
}

impl MultiHeadAttention {
    pub(crate) fn new(mut scope: Scope<'_>, options: MultiHeadOptions) -> Result<Self> {
        let MultiHeadOptions { channels, context_channels, heads, biased } = options;
        let linear = if biased { Linear::new } else { Linear::without_bias };
        Ok(Self {
            to_q: linear(scope.at("to_q"), channels, channels)?,
            to_k: linear(scope.at("to_k"), context_channels, channels)?,
            to_v: linear(scope.at("to_v"), context_channels, channels)?,
            to_out: Linear::new(scope.at("to_out.0"), channels, channels)?,
            heads,
        })
    }

    /// `[batch, tokens, channels]` from those and `[batch, others, context_channels]`; `bias` is added to the scores
    /// and broadcasts to `[batch, heads, tokens, others]`.
    pub(crate) fn forward(
        &self,
        tokens: &Tensor,
        context: &Tensor,
        bias: Option<&Tensor>,
    ) -> Output {
        let (query, key) = (self.to_q.forward(tokens)?, self.to_k.forward(context)?);
        let value = self.to_v.forward(context)?;
        self.to_out.forward(&attend([&query, &key, &value], self.heads, bias)?)
    }
}

/// Up to this number of scores per head, `BFloat16` is computed in `Float` on the CPU; beyond, libtorch's gradient in
/// `BFloat16` is faster.
const MAX_SCORES_IN_FLOAT: i64 = 1 << 19;

/// Scaled dot-product attention with `heads` heads: `[batch, tokens, channels]` as the queries, from queries, keys and
/// values of that many channels.
///
/// On the CPU, 16-bit kinds are computed in `Float`, for which libtorch has faster kernels, especially for gradients:
/// `Half` always, `BFloat16` for small maps.
pub(crate) fn attend(query_key_value: [&Tensor; 3], heads: i64, bias: Option<&Tensor>) -> Output {
    let [query, key, _] = query_key_value;
    if !is_faster_in_float(query, key) {
        return attend_as_given(query_key_value, heads, bias);
    }
    // Autocast would cast them back to 16 bits.
    let _full = Autocast::disabled(query.device()).map_err(|e| TchError::Torch(e.to_string()))?;
    let float = |t: &Tensor| t.f_to_kind(Kind::Float);
    let [q, k, v] = query_key_value.map(float);
    let bias = bias.map(float).transpose()?;
    attend_as_given([&q?, &k?, &v?], heads, bias.as_ref())?.f_to_kind(query.kind())
}

fn is_faster_in_float(query: &Tensor, key: &Tensor) -> bool {
    let tokens = |t: &Tensor| t.size().get(1).copied().unwrap_or_default();
    query.device() == Device::Cpu
        && match query.kind() {
            Kind::Half => true,
            Kind::BFloat16 => tokens(query).saturating_mul(tokens(key)) <= MAX_SCORES_IN_FLOAT,
            _ => false,
        }
}

fn attend_as_given([query, key, value]: [&Tensor; 3], heads: i64, bias: Option<&Tensor>) -> Output {
    let split = |tokens: &Tensor| {
        let size = tokens.size();
        tokens.f_reshape([size[0], size[1], heads, size[2] / heads])?.f_transpose(1, 2)
    };
    Tensor::f_scaled_dot_product_attention(
        &split(query)?,
        &split(key)?,
        &split(value)?,
        bias,
        0.0,
        false,
        None,
        false,
    )?
    .f_transpose(1, 2)?
    .f_reshape(query.size())
}

/// Layers of an [`AttentionBlock`] in files of 2022, and now.
const OLD_NAMES: [(&str, &str); 4] =
    [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];

/// The current name of a parameter of an [`AttentionBlock`] that has a name of 2022: `path` and what follows it.
pub(crate) fn new_name(path: &str, rest: &str) -> Option<String> {
    let (layer, part) = rest.split_once('.')?;
    let (_, new) = OLD_NAMES.iter().find(|(old, _)| *old == layer)?;
    matches!(part, "weight" | "bias").then(|| format!("{path}{new}.{part}"))
}

/// `(x + attention(norm(x))) / output_scale`, every pixel a token.
#[derive(Debug)]
pub(crate) struct AttentionBlock {
    group_norm: Option<GroupNorm>,
    attention: MultiHeadAttention,
    output_scale: f64,
}

impl AttentionBlock {
    pub(crate) fn new(mut scope: Scope<'_>, options: AttentionOptions) -> Result<Self> {
        let AttentionOptions { channels, head_dim, norm_groups, eps, output_scale } = options;
        let group_norm = norm_groups
            .map(|groups| GroupNorm::new(scope.at("group_norm"), groups, channels, eps))
            .transpose()?;
        let heads = channels / head_dim;
        let options =
            MultiHeadOptions { channels, context_channels: channels, heads, biased: true };
        let attention = MultiHeadAttention::new(scope, options)?;
        Ok(Self { group_norm, attention, output_scale })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Output {
        let size = x.size();
        // The norm comes first, so that in channels-last order the tokens are a view and not a copy.
        let normed = match &self.group_norm {
            Some(group_norm) => group_norm.forward(x)?,
            None => x.shallow_clone(),
        };
        let tokens = normed.f_flatten(2, -1)?.f_transpose(1, 2)?;
        let attended = self.attention.forward(&tokens, &tokens, None)?;
        rescale(x.f_add(&attended.f_transpose(1, 2)?.f_reshape(&size)?)?, self.output_scale)
    }
}

/// `x / scale`, without a pass over memory if `scale` is 1.
#[expect(
    clippy::float_cmp,
    reason = "a shortcut for the exact value; any other takes the division"
)]
pub(crate) fn rescale(x: Tensor, scale: f64) -> Output {
    if scale == 1.0 { Ok(x) } else { x.f_div_scalar(scale) }
}

#[cfg(test)]
mod tests {
    use tch::kind::FLOAT_CPU;

    use super::{MAX_SCORES_IN_FLOAT, attend, attend_as_given};
    use ddil_libtorch::Autocast;
    use tch::{Device, Kind, Tensor};

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    const SIXTEEN_BITS: [Kind; 2] = [Kind::BFloat16, Kind::Half];

    fn query_key_value(tokens: i64, kind: Kind) -> [Tensor; 3] {
        [0; 3].map(|_| Tensor::randn([1, tokens, 8], FLOAT_CPU).to_kind(kind))
    }

    #[test]
    fn numbers_of_16_bits_are_rounded_once_with_and_without_autocast() -> TestResult {
        let bias = Tensor::randn([1, 1, 1, 9], FLOAT_CPU);
        for kind in SIXTEEN_BITS {
            let given = query_key_value(9, kind);
            let floats = given.each_ref().map(|t| t.to_kind(Kind::Float));
            let bias = bias.to_kind(kind);
            for bias in [None, Some(&bias)] {
                let in_float = bias.map(|bias| bias.to_kind(Kind::Float));
                let expected = attend(floats.each_ref(), 2, in_float.as_ref())?.to_kind(kind);
                assert_eq!(attend(given.each_ref(), 2, bias)?, expected, "{kind:?}");
                let _autocast = Autocast::new(Device::Cpu, kind)?;
                assert_eq!(attend(given.each_ref(), 2, bias)?, expected, "{kind:?}");
                // It is on again.
                assert_eq!(floats[0].matmul(&floats[1].transpose(1, 2)).kind(), kind);
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_have_the_kind_of_their_tensors() -> TestResult {
        for kind in SIXTEEN_BITS {
            let leaves = query_key_value(9, kind).map(|t| t.set_requires_grad(true));
            let sum = attend(leaves.each_ref(), 2, None)?.square().sum(Kind::Float);
            for gradient in Tensor::run_backward(&[sum], &leaves.each_ref(), false, false) {
                assert_eq!(gradient.kind(), kind);
                assert!(gradient.abs().max().double_value(&[]) > 0.0);
            }
        }
        Ok(())
    }

    #[test]
    fn many_scores_of_bfloat16_are_libtorchs() -> TestResult {
        let many = query_key_value(MAX_SCORES_IN_FLOAT.isqrt() + 1, Kind::BFloat16);
        assert_eq!(attend(many.each_ref(), 1, None)?, attend_as_given(many.each_ref(), 1, None)?);
        let few = query_key_value(MAX_SCORES_IN_FLOAT.isqrt(), Kind::BFloat16);
        assert_ne!(attend(few.each_ref(), 1, None)?, attend_as_given(few.each_ref(), 1, None)?);
        Ok(())
    }
}
