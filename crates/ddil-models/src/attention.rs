//! Self-attention over the pixels of a feature map.

use tch::Tensor;

use crate::error::Result;
use crate::layers::{GroupNorm, Linear, Output};
use crate::parameters::Scope;

/// Sizes and scales of an [`AttentionBlock`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionOptions {
    pub(crate) channels: i64,
    /// Channels of one head; `channels` is a multiple of it.
    pub(crate) head_dim: i64,
    /// Groups of the normalisation in front; none leaves it out.
    pub(crate) norm_groups: Option<i64>,
    pub(crate) eps: f64,
    pub(crate) output_scale: f64,
}

/// `(x + out(attention(norm(x)))) / output_scale`, every pixel a token.
#[derive(Debug)]
pub(crate) struct AttentionBlock {
    group_norm: Option<GroupNorm>,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: i64,
    output_scale: f64,
}

impl AttentionBlock {
    pub(crate) fn new(mut scope: Scope<'_>, options: AttentionOptions) -> Result<Self> {
        let AttentionOptions { channels, head_dim, norm_groups, eps, output_scale } = options;
        let group_norm = norm_groups
            .map(|groups| GroupNorm::new(scope.at("group_norm"), groups, channels, eps))
            .transpose()?;
        Ok(Self {
            group_norm,
            to_q: Linear::new(scope.at("to_q"), channels, channels)?,
            to_k: Linear::new(scope.at("to_k"), channels, channels)?,
            to_v: Linear::new(scope.at("to_v"), channels, channels)?,
            to_out: Linear::new(scope.at("to_out.0"), channels, channels)?,
            heads: channels / head_dim,
            output_scale,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Output {
        let size = x.size();
        // The norm comes first: in channels-last order the tokens are then a view, not a copy.
        let normed = match &self.group_norm {
            Some(group_norm) => group_norm.forward(x)?,
            None => x.shallow_clone(),
        };
        let tokens = normed.f_flatten(2, -1)?.f_transpose(1, 2)?;
        let attended = self.attend(&tokens)?;
        let residual = self.to_out.forward(&attended)?.f_transpose(1, 2)?.f_reshape(&size)?;
        rescale(x.f_add(&residual)?, self.output_scale)
    }

    /// `[batch, tokens, channels]` to the same.
    fn attend(&self, tokens: &Tensor) -> Output {
        let query = self.split_heads(&self.to_q.forward(tokens)?)?;
        let key = self.split_heads(&self.to_k.forward(tokens)?)?;
        let value = self.split_heads(&self.to_v.forward(tokens)?)?;
        let no_mask = None::<&Tensor>;
        Tensor::f_scaled_dot_product_attention(
            &query, &key, &value, no_mask, 0.0, false, None, false,
        )?
        .f_transpose(1, 2)?
        .f_reshape(tokens.size())
    }

    fn split_heads(&self, tokens: &Tensor) -> Output {
        let size = tokens.size();
        tokens.f_reshape([size[0], size[1], self.heads, size[2] / self.heads])?.f_transpose(1, 2)
    }
}

/// `x / scale`, without a pass over memory where `scale` is 1.
#[expect(
    clippy::float_cmp,
    reason = "a shortcut for the exact value; any other takes the division"
)]
pub(crate) fn rescale(x: Tensor, scale: f64) -> Output {
    if scale == 1.0 { Ok(x) } else { x.f_div_scalar(scale) }
}
