//! The embedding of a whole text that a U-Net adds to the embedding of the timestep.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::layers::attention::attend;
use crate::layers::embeddings::{SinusoidalProjection, TimestepEmbedding};
use crate::layers::{LayerNorm, Linear, Output};
use crate::parameters::{Init, Scope};

const NORM_EPS: f64 = 1e-5;

/// `embedding([text, sines and cosines of each number])`: SDXL's pooled text and numbers of size and crop, section 2.2
/// of [Podell et al. 2023](https://arxiv.org/abs/2307.01952).
#[derive(Debug)]
pub(crate) struct TextTimeEmbedding {
    /// Width of the features of one number.
    pub(crate) projection: SinusoidalProjection,
    embedding: TimestepEmbedding,
    /// Width of the text and the features of all numbers together.
    pub(crate) inputs: i64,
}

impl TextTimeEmbedding {
    pub(crate) fn new(
        scope: Scope<'_>,
        projection: SinusoidalProjection,
        inputs: i64,
        width: i64,
    ) -> Result<Self> {
        let embedding = TimestepEmbedding::of_features(scope, inputs, width)?;
        Ok(Self { projection, embedding, inputs })
    }

    /// `[batch, width]` from `[batch, text]` and `[batch, numbers]`; `kind` is that of the parameters.
    pub(crate) fn forward(&self, text: &Tensor, numbers: &Tensor, kind: Kind) -> Output {
        let features = self.projection.forward(&numbers.f_reshape([-1])?)?;
        let features = features.f_reshape([text.size()[0], -1])?.f_to_kind(kind)?;
        self.embedding.forward(&Tensor::f_cat(&[text.f_to_kind(kind)?, features], 1)?)
    }
}

/// `norm2(proj(pool(norm1(text))))`, where pooling is attention of the mean token to all, itself included.
#[derive(Debug)]
pub(crate) struct PooledTextEmbedding {
    norm1: LayerNorm,
    pool: AttentionPooling,
    proj: Linear,
    norm2: LayerNorm,
}

impl PooledTextEmbedding {
    pub(crate) fn new(
        mut scope: Scope<'_>,
        text_width: i64,
        heads: i64,
        width: i64,
    ) -> Result<Self> {
        Ok(Self {
            norm1: LayerNorm::new(scope.at("norm1"), text_width, NORM_EPS)?,
            pool: AttentionPooling::new(scope.at("pool"), text_width, heads)?,
            proj: Linear::new(scope.at("proj"), text_width, width)?,
            norm2: LayerNorm::new(scope.at("norm2"), width, NORM_EPS)?,
        })
    }

    /// `[batch, width]` from `[batch, tokens, text_width]`.
    pub(crate) fn forward(&self, text: &Tensor) -> Output {
        let pooled = self.pool.forward(&self.norm1.forward(text)?)?;
        self.norm2.forward(&self.proj.forward(&pooled)?)
    }
}

#[derive(Debug)]
struct AttentionPooling {
    positional_embedding: Tensor,
    k_proj: Linear,
    q_proj: Linear,
    v_proj: Linear,
    heads: i64,
}

impl AttentionPooling {
    fn new(mut scope: Scope<'_>, width: i64, heads: i64) -> Result<Self> {
        let init = Init::Normal { std: 1.0 / (width as f64).sqrt() };
        Ok(Self {
            positional_embedding: scope.parameter("positional_embedding", &[1, width], init)?,
            k_proj: Linear::new(scope.at("k_proj"), width, width)?,
            q_proj: Linear::new(scope.at("q_proj"), width, width)?,
            v_proj: Linear::new(scope.at("v_proj"), width, width)?,
            heads,
        })
    }

    /// `[batch, width]` from `[batch, tokens, width]`.
    fn forward(&self, tokens: &Tensor) -> Output {
        let mean = tokens.f_mean_dim([1].as_slice(), true, None::<Kind>)?;
        let mean = mean.f_add(&self.positional_embedding)?;
        let all = Tensor::f_cat(&[&mean, tokens], 1)?;
        let (query, key) = (self.q_proj.forward(&mean)?, self.k_proj.forward(&all)?);
        let value = self.v_proj.forward(&all)?;
        attend([&query, &key, &value], self.heads, None)?.f_squeeze_dim(1)
    }
}
