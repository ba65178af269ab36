//! The transformer of both towers of CLIP.

use tch::Tensor;

use crate::error::Result;
use crate::layers::{LayerNorm, Linear, Output};
use crate::parameters::Scope;

use super::settings::{ClipActivation, EncoderSettings};

/// The tokens that a token attends to.
#[derive(Debug)]
pub(super) enum Mask {
    /// All tokens.
    All,
    /// The token itself and those before it.
    Causal,
    /// Those that are true in a mask `[batch, 1, tokens, tokens]`.
    Given(Tensor),
}

#[derive(Debug)]
pub(super) struct Encoder {
    layers: Vec<EncoderLayer>,
}

impl Encoder {
    pub(super) fn new(mut scope: Scope<'_>, settings: EncoderSettings) -> Result<Self> {
        let layers = (0..settings.num_hidden_layers)
            .map(|i| EncoderLayer::new(scope.at(&format!("layers.{i}")), settings))
            .collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    pub(super) fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// The output of layer `num_layers`, `[batch, tokens, width]`; `visit` receives the input of each layer.
    pub(super) fn forward(
        &self,
        tokens: Tensor,
        mask: &Mask,
        num_layers: usize,
        mut visit: impl FnMut(&Tensor),
    ) -> Output {
        let mut state = tokens;
        for layer in &self.layers[..num_layers] {
            visit(&state);
            state = layer.forward(&state, mask)?;
        }
        Ok(state)
    }
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug)]
struct EncoderLayer {
    self_attn: Attention,
    layer_norm1: LayerNorm,
    mlp: FeedForward,
    layer_norm2: LayerNorm,
}

impl EncoderLayer {
    fn new(mut scope: Scope<'_>, settings: EncoderSettings) -> Result<Self> {
        let (width, eps) = (settings.hidden_size.into(), settings.layer_norm_eps);
        Ok(Self {
            self_attn: Attention::new(scope.at("self_attn"), settings)?,
            layer_norm1: LayerNorm::new(scope.at("layer_norm1"), width, eps)?,
            mlp: FeedForward::new(scope.at("mlp"), settings)?,
            layer_norm2: LayerNorm::new(scope.at("layer_norm2"), width, eps)?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Mask) -> Output {
        let attended = self.self_attn.forward(&self.layer_norm1.forward(x)?, mask)?;
        let x = x.f_add(&attended)?;
        x.f_add(&self.mlp.forward(&self.layer_norm2.forward(&x)?)?)
    }
}

#[derive(Debug)]
struct Attention {
    k_proj: Linear,
    v_proj: Linear,
    q_proj: Linear,
    out_proj: Linear,
    heads: i64,
}

impl Attention {
    fn new(mut scope: Scope<'_>, settings: EncoderSettings) -> Result<Self> {
        let width = i64::from(settings.hidden_size);
        let out_std = settings.initializer_factor / (width as f64).sqrt();
        let in_std = out_std * depth_scale(settings);
        Ok(Self {
            k_proj: Linear::normal(scope.at("k_proj"), width, width, in_std)?,
            v_proj: Linear::normal(scope.at("v_proj"), width, width, in_std)?,
            q_proj: Linear::normal(scope.at("q_proj"), width, width, in_std)?,
            out_proj: Linear::normal(scope.at("out_proj"), width, width, out_std)?,
            heads: settings.num_attention_heads.into(),
        })
    }

    fn forward(&self, tokens: &Tensor, mask: &Mask) -> Output {
        let query = self.split_heads(&self.q_proj.forward(tokens)?)?;
        let key = self.split_heads(&self.k_proj.forward(tokens)?)?;
        let value = self.split_heads(&self.v_proj.forward(tokens)?)?;
        let given = if let Mask::Given(given) = mask { Some(given) } else { None };
        let causal = matches!(mask, Mask::Causal);
        let attended = Tensor::f_scaled_dot_product_attention(
            &query, &key, &value, given, 0.0, causal, None, false,
        )?;
        self.out_proj.forward(&attended.f_transpose(1, 2)?.f_reshape(tokens.size())?)
    }

    fn split_heads(&self, tokens: &Tensor) -> Output {
        let size = tokens.size();
        tokens.f_reshape([size[0], size[1], self.heads, size[2] / self.heads])?.f_transpose(1, 2)
    }
}

#[derive(Debug)]
struct FeedForward {
    fc1: Linear,
    fc2: Linear,
    activation: ClipActivation,
}

impl FeedForward {
    fn new(mut scope: Scope<'_>, settings: EncoderSettings) -> Result<Self> {
        let EncoderSettings { hidden_act: activation, initializer_factor, .. } = settings;
        let [width, inner] = [settings.hidden_size, settings.intermediate_size].map(i64::from);
        let std = initializer_factor / (2.0 * width as f64).sqrt();
        let out_std = initializer_factor / (width as f64).sqrt() * depth_scale(settings);
        Ok(Self {
            fc1: Linear::normal(scope.at("fc1"), width, inner, std)?,
            fc2: Linear::normal(scope.at("fc2"), inner, width, out_std)?,
            activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Output {
        self.fc2.forward(&self.activation.forward(&self.fc1.forward(x)?)?)
    }
}

/// The factor of the initialisation that keeps the variance of the sum over all layers at that of one.
fn depth_scale(settings: EncoderSettings) -> f64 {
    1.0 / (2.0 * f64::from(settings.num_hidden_layers)).sqrt()
}
