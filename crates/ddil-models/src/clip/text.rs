//! The text encoder: from token ids to the conditioning of a denoiser.

use std::path::Path;

use ddil_files::Invalid;
use ddil_libtorch::{ArgumentError, ensure_dense, ensure_kind, ensure_shape};
use tch::{Kind, TchError, Tensor};

use crate::config::{NetworkConfig, UnknownKeys};
use crate::error::{Error, Result, outside};
use crate::layers::{Embedding, LayerNorm, Linear, Output};
use crate::parameters::{Builder, Parameters, Placement, Values};
use crate::transformers_folder;

use super::encoder::{Encoder, Mask};
use super::files;
use super::text_config::{ClipTextConfig, LARGEST_TOKEN};

/// The hidden state of a text encoder that conditions a denoiser.
///
/// # Example
///
/// ```
/// use ddil_models::HiddenState;
///
/// assert_eq!(HiddenState::default(), HiddenState::stable_diffusion(0));
/// let penultimate = HiddenState { skipped_layers: 1, final_norm: false };
/// assert_eq!(HiddenState::stable_diffusion_xl(0), penultimate);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HiddenState {
    /// Number of last layers to skip.
    pub skipped_layers: u32,
    /// Whether the final layer norm is applied.
    pub final_norm: bool,
}

impl HiddenState {
    /// The state for Stable Diffusion 1 and 2: after the final norm.
    ///
    /// `clip_skip` is as in diffusers: the number of last layers to skip; 0 is the same as none.
    pub const fn stable_diffusion(clip_skip: u32) -> Self {
        Self { skipped_layers: clip_skip, final_norm: true }
    }

    /// The state for Stable Diffusion XL, from each of its encoders: before the last layer, without norm.
    ///
    /// `clip_skip` is as in diffusers: the number of layers to skip in addition to the last one.
    pub const fn stable_diffusion_xl(clip_skip: u32) -> Self {
        Self { skipped_layers: clip_skip.saturating_add(1), final_norm: false }
    }
}

impl Default for HiddenState {
    fn default() -> Self {
        Self::stable_diffusion(0)
    }
}

/// The outputs of a text encoder for a batch of prompts.
#[derive(Debug)]
pub struct ClipTextOutput {
    /// After all layers and the final norm; `[batch, tokens, hidden_size]`.
    pub last_hidden_state: Tensor,
    /// The token embeddings, then the output of each layer before the final norm: one more than there are layers.
    pub hidden_states: Vec<Tensor>,
    /// `last_hidden_state` at the end of the prompt; `[batch, hidden_size]`.
    pub pooled: Tensor,
    /// `pooled`, projected, if there is a projection; `[batch, projection_dim]`.
    pub text_embeds: Option<Tensor>,
}

/// The text tower of CLIP ([Radford et al. 2021](https://arxiv.org/abs/2103.00020)); built from a [`ClipTextConfig`] or
/// by [`Self::from_folder`].
///
/// It is transformers' `CLIPTextModel`, or `CLIPTextModelWithProjection`, depending on the settings. Parameters have
/// the names of published files, and outputs agree with transformers' up to rounding.
///
/// The end of a prompt is the first position of `eos_token_id`. If `eos_token_id` is 2, it is the first position of the
/// largest token: published files contain 2 although that token does not end a prompt. In a prompt without the token it
/// is the first position.
///
/// The names in a file may be those of published files (`text_model.encoder...`) or those that transformers 5 writes for
/// a `CLIPTextModel` (`encoder...`). Older files contain `text_model.embeddings.position_ids`, which is not a parameter
/// and is ignored.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipTextConfig, HiddenState, NetworkConfig, Placement};
/// use tch::Tensor;
///
/// let config = ClipTextConfig {
///     vocab_size: 100,
///     hidden_size: 8,
///     intermediate_size: 16,
///     num_hidden_layers: 2,
///     num_attention_heads: 2,
///     eos_token_id: 99,
///     ..ClipTextConfig::default()
/// };
/// let encoder = config.build(Placement::default(), 0)?;
///
/// let input_ids = Tensor::from_slice(&[98_i64, 5, 7, 99, 99]).view([1, 5]);
/// let state = encoder.hidden_state(&input_ids, None, HiddenState::default())?;
/// assert_eq!(state.size(), [1, 5, 8]);
/// assert_eq!(state, encoder.forward(&input_ids, None)?.last_hidden_state);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ClipTextModel {
    config: ClipTextConfig,
    parameters: Parameters,
    token_embedding: Embedding,
    position_embedding: Embedding,
    encoder: Encoder,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
}

impl NetworkConfig for ClipTextConfig {
    type Network = ClipTextModel;

    const CLASS_NAME: &'static str = "CLIPTextModel";
    const MODEL_TYPE: Option<&'static str> = Some("clip_text_model");

    fn problems(&self) -> Vec<Invalid> {
        self.check()
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<ClipTextModel> {
        ClipTextModel::new(self, placement, values)
    }

    fn parameters_of(network: &ClipTextModel) -> &Parameters {
        network.parameters()
    }

    fn load(network: &mut ClipTextModel, path: &Path) -> Result<()> {
        files::load(network.parameters(), path)
    }

    fn read(network: &ClipTextModel, path: &Path) -> Result<Vec<(String, Tensor)>> {
        files::read(network.parameters(), path)
    }
}

impl ClipTextModel {
    fn new(config: &ClipTextConfig, place: Placement, values: Values) -> Result<Self> {
        let width = i64::from(config.hidden_size);
        let std = 0.02 * config.initializer_factor;
        let mut builder = Builder::new(place, values);
        let mut root = builder.root();
        let mut scope = root.at("text_model");
        let (vocab, positions) = (config.vocab_size.into(), config.max_position_embeddings.into());
        let token_embedding =
            Embedding::normal(scope.at("embeddings.token_embedding"), vocab, width, std)?;
        let position_embedding =
            Embedding::normal(scope.at("embeddings.position_embedding"), positions, width, std)?;
        let encoder = Encoder::new(scope.at("encoder"), config.encoder())?;
        let final_layer_norm =
            LayerNorm::new(scope.at("final_layer_norm"), width, config.layer_norm_eps)?;
        let text_projection = config
            .projection_dim
            .filter(|_| config.projects())
            .map(|outputs| Linear::without_bias(root.at("text_projection"), width, outputs.into()))
            .transpose()?;
        let config = config.clone();
        let parameters = builder.finish();
        Ok(Self {
            config,
            parameters,
            token_embedding,
            position_embedding,
            encoder,
            final_layer_norm,
            text_projection,
        })
    }

    /// Loads an encoder from a transformers folder, such as `text_encoder` of a pipeline: `config.json` and
    /// `model.safetensors`, or the index of its shards, or either of them in half precision
    /// (`model.fp16.safetensors`).
    ///
    /// # Errors
    ///
    /// As [`NetworkConfig::from_file`] and [`NetworkConfig::build_from`]; [`Error::NoWeights`] if there are no
    /// weights, [`Error::Pickle`] if there are only pickled ones.
    pub fn from_folder(
        folder: impl AsRef<Path>,
        placement: Placement,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        transformers_folder::open::<ClipTextConfig>(folder.as_ref(), placement, unknown_keys)
    }

    /// Writes the encoder to a folder that transformers loads, creating it if needed.
    ///
    /// # Errors
    ///
    /// As [`weights::save`](crate::weights::save).
    pub fn save_to_folder(&self, folder: impl AsRef<Path>) -> Result<()> {
        transformers_folder::save(folder.as_ref(), &self.parameters, &self.config)
    }

    /// The settings from which the encoder was built.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// The parameters, under their names in files.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// All outputs for a batch of prompts.
    ///
    /// # Shapes and units
    ///
    /// - `input_ids`: `[batch, tokens]`, `Int64`, at most `max_position_embeddings` tokens, each less than `vocab_size`
    /// - `attention_mask`: `[batch, tokens]`, integer or `Bool`, 0 for tokens that are not attended to; Stable
    ///   Diffusion passes none
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind),
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) for a token outside of the vocabulary (checked
    /// only on the CPU), and [`Error::Torch`].
    pub fn forward(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<ClipTextOutput> {
        const OP: &str = "ClipTextModel::forward";
        self.ensure_tokens(OP, input_ids, attention_mask)?;
        let mut hidden_states = Vec::with_capacity(self.encoder.num_layers() + 1);
        let run = || {
            let keep = |state: &Tensor| hidden_states.push(state.shallow_clone());
            let last = self.encode(input_ids, attention_mask, 0, keep)?;
            hidden_states.push(last.shallow_clone());
            let last_hidden_state = self.final_layer_norm.forward(&last)?;
            let pooled = self.pool(&last_hidden_state, input_ids)?;
            let text_embeds = self.text_projection.as_ref().map(|p| p.forward(&pooled)).transpose();
            Ok((last_hidden_state, pooled, text_embeds?))
        };
        let (last_hidden_state, pooled, text_embeds) = wrap(OP, run)?;
        Ok(ClipTextOutput { last_hidden_state, hidden_states, pooled, text_embeds })
    }

    /// One hidden state, `[batch, tokens, hidden_size]`, without computing the other outputs.
    ///
    /// # Shapes and units
    ///
    /// As [`Self::forward`].
    ///
    /// # Errors
    ///
    /// As [`Self::forward`]; [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) if more layers are to be
    /// skipped than there are.
    pub fn hidden_state(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
        which: HiddenState,
    ) -> Result<Tensor> {
        const OP: &str = "ClipTextModel::hidden_state";
        self.ensure_tokens(OP, input_ids, attention_mask)?;
        let skipped = self.ensure_layers(OP, which)?;
        wrap(OP, || {
            let state = self.encode(input_ids, attention_mask, skipped, |_| {})?;
            if which.final_norm { self.final_layer_norm.forward(&state) } else { Ok(state) }
        })
    }

    /// One hidden state and `text_embeds`, `[batch, projection_dim]`, from one pass: the outputs that Stable Diffusion
    /// XL uses of its second encoder.
    ///
    /// # Shapes and units
    ///
    /// As [`Self::forward`].
    ///
    /// # Errors
    ///
    /// As [`Self::hidden_state`]; [`Error::NoProjection`] for an encoder without one.
    pub fn hidden_state_and_text_embeds(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
        which: HiddenState,
    ) -> Result<(Tensor, Tensor)> {
        const OP: &str = "ClipTextModel::hidden_state_and_text_embeds";
        let projection = self.text_projection.as_ref().ok_or(Error::NoProjection { op: OP })?;
        self.ensure_tokens(OP, input_ids, attention_mask)?;
        let skipped = self.ensure_layers(OP, which)?;
        let (mut layer, mut wanted) = (0, None);
        wrap(OP, || {
            let keep = |state: &Tensor| {
                if layer + skipped == self.encoder.num_layers() {
                    wanted = Some(state.shallow_clone());
                }
                layer += 1;
            };
            let last = self.encode(input_ids, attention_mask, 0, keep)?;
            let normed = self.final_layer_norm.forward(&last)?;
            let state = match wanted {
                Some(state) if which.final_norm => self.final_layer_norm.forward(&state)?,
                Some(state) => state,
                None if which.final_norm => normed.shallow_clone(),
                None => last,
            };
            Ok((state, projection.forward(&self.pool(&normed, input_ids)?)?))
        })
    }

    /// `text_embeds` alone, `[batch, projection_dim]`.
    ///
    /// # Shapes and units
    ///
    /// As [`Self::forward`].
    ///
    /// # Errors
    ///
    /// As [`Self::forward`]; [`Error::NoProjection`] for an encoder without one.
    pub fn text_embeds(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let last = HiddenState { skipped_layers: 0, final_norm: false };
        Ok(self.hidden_state_and_text_embeds(input_ids, attention_mask, last)?.1)
    }

    /// The output of the last layer before the `skipped` ones; `visit` receives the input of each layer.
    fn encode(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
        skipped: usize,
        visit: impl FnMut(&Tensor),
    ) -> Output {
        let (len, device) = (input_ids.size()[1], input_ids.device());
        let positions = Tensor::f_arange(len, (Kind::Int64, device))?;
        let tokens = self.token_embedding.forward(input_ids)?;
        let tokens = tokens.f_add(&self.position_embedding.forward(&positions)?)?;
        let mask = attention_mask.map_or(Ok(Mask::Causal), |mask| causal(mask).map(Mask::Given))?;
        self.encoder.forward(tokens, &mask, self.encoder.num_layers() - skipped, visit)
    }

    /// `state` at the end of each prompt.
    fn pool(&self, state: &Tensor, input_ids: &Tensor) -> Output {
        let end = match self.config.eos_token_id {
            LARGEST_TOKEN => input_ids.f_argmax(-1, false)?,
            eos => input_ids.f_eq(eos)?.f_to_kind(Kind::Int)?.f_argmax(-1, false)?,
        };
        let (batch, width) = (state.size()[0], state.size()[2]);
        let end = end.f_view([batch, 1, 1])?.f_expand([batch, 1, width], false)?;
        state.f_gather(1, &end, false)?.f_squeeze_dim(1)
    }

    fn ensure_layers(&self, op: &'static str, which: HiddenState) -> Result<usize> {
        let (skipped, layers) = (which.skipped_layers, self.config.num_hidden_layers);
        if skipped <= layers {
            return Ok(skipped as usize);
        }
        let expected = format!("at most {layers}, the number of layers");
        Err(ArgumentError::value(op, "skipped_layers", skipped, expected).into())
    }

    fn ensure_tokens(
        &self,
        op: &'static str,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<()> {
        let (name, max) = ("input_ids", self.config.max_position_embeddings);
        ensure_dense(op, name, input_ids)?;
        let size = input_ids.size();
        let fits = matches!(size[..], [_, tokens] if (1..=i64::from(max)).contains(&tokens));
        let expected = || format!("[batch, tokens] with 1 to {max} tokens");
        ensure_shape(op, name, input_ids, fits, expected)?;
        ensure_kind(op, name, input_ids, input_ids.kind() == Kind::Int64, "Int64")?;
        if let Some(mask) = attention_mask {
            let name = "attention_mask";
            ensure_dense(op, name, mask)?;
            let expected = || format!("{size:?}, the shape of `input_ids`");
            ensure_shape(op, name, mask, mask.size() == size, expected)?;
            let fits = matches!(mask.kind(), Kind::Int64 | Kind::Int | Kind::Bool);
            ensure_kind(op, name, mask, fits, "Int64, Int or Bool")?;
        }
        let vocab = i64::from(self.config.vocab_size);
        if let Some(found) = outside(input_ids, 0..vocab) {
            let expected = format!("tokens from 0 to {}", vocab - 1);
            return Err(ArgumentError::value(op, name, found, expected).into());
        }
        Ok(())
    }
}

/// `[batch, tokens]` to a causal mask `[batch, 1, tokens, tokens]`.
fn causal(mask: &Tensor) -> Output {
    let (batch, len) = (mask.size()[0], mask.size()[1]);
    let earlier = Tensor::f_ones([len, len], (Kind::Bool, mask.device()))?.f_tril(0)?;
    mask.f_ne(0)?.f_view([batch, 1, 1, len])?.f_logical_and(&earlier)
}

fn wrap<T>(op: &'static str, run: impl FnOnce() -> std::result::Result<T, TchError>) -> Result<T> {
    run().map_err(Error::torch(op))
}
