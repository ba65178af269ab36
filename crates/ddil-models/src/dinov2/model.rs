//! The network.

use std::path::Path;

use ddil_files::{Invalid, JsonSettings};
use ddil_libtorch::{ensure_real, ensure_shape};
use serde_json::json;
use tch::{Kind, TchError, Tensor};

use crate::config::{NetworkConfig, UnknownKeys, all_problems, read_keys};
use crate::error::{Error, Result};
use crate::layers::{Activation, LayerNorm, Linear, Output};
use crate::parameters::{Builder, Init, Parameters, Placement, Scope, Values};
use crate::{transformers_folder, transformers_json};

use super::config::Dinov2Config;

const FORWARD: &str = "Dinov2Model::forward";
/// Keys of a `config.json` that concern `Dinov2Backbone`, another class of these files.
const BACKBONE_KEYS: [&str; 5] =
    ["apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names"];

/// The outputs of a [`Dinov2Model`] for a batch of images.
#[derive(Debug)]
pub struct Dinov2Output {
    /// All tokens after the final norm, the class token first; `[batch, 1 + patches, hidden_size]`.
    pub last_hidden_state: Tensor,
    /// The class token after the final norm, which represents an image; `[batch, hidden_size]`.
    pub pooled: Tensor,
}

/// `DINOv2` ([Oquab et al. 2023](https://arxiv.org/abs/2304.07193)), a transformer over patches; built from a
/// [`Dinov2Config`] or by [`Self::from_folder`].
///
/// It is transformers' `Dinov2Model`. Images may have another size than `image_size`: position embeddings are
/// interpolated, bicubic without antialiasing to the number of patches, as in transformers; the networks' first
/// implementation interpolates by a factor and differs slightly.
///
/// # Example
///
/// ```
/// use ddil_models::{Dinov2Config, NetworkConfig, Placement};
/// use tch::{Tensor, kind};
///
/// let config = Dinov2Config {
///     hidden_size: 8,
///     num_hidden_layers: 2,
///     num_attention_heads: 2,
///     image_size: 42,
///     ..Dinov2Config::default()
/// };
/// let network = config.build(Placement::default(), 0)?;
///
/// let output = network.forward(&Tensor::randn([3, 3, 28, 56], kind::FLOAT_CPU))?;
/// assert_eq!(output.last_hidden_state.size(), [3, 1 + 2 * 4, 8]);
/// assert_eq!(output.pooled.size(), [3, 8]);
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct Dinov2Model {
    config: Dinov2Config,
    parameters: Parameters,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    layernorm: LayerNorm,
}

impl NetworkConfig for Dinov2Config {
    type Network = Dinov2Model;

    const CLASS_NAME: &'static str = "Dinov2Model";
    const MODEL_TYPE: Option<&'static str> = Some("dinov2");

    fn problems(&self) -> Vec<Invalid> {
        self.check()
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<Dinov2Model> {
        Dinov2Model::new(self, placement, values)
    }

    fn parameters_of(network: &Dinov2Model) -> &Parameters {
        network.parameters()
    }

    fn from_settings(
        what: &str,
        mut file: JsonSettings,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        let mut problems = transformers_json::prepare(&mut file, "dinov2");
        let keys = file.object_mut();
        if let Some(classes) = keys.remove("architectures")
            && classes != json!([Self::CLASS_NAME])
        {
            let expected = format!("[\"{}\"]", Self::CLASS_NAME);
            problems.push(Invalid::new("architectures", classes, expected));
        }
        keys.retain(|key, _| !BACKBONE_KEYS.contains(&key.as_str()));
        let config = read_keys(&file, &Self::default(), unknown_keys, &mut problems);
        problems.extend(config.iter().flat_map(all_problems));
        match config {
            Some(config) if problems.is_empty() => Ok(config),
            _ => Err(Error::InvalidConfig { what: what.to_owned(), problems }),
        }
    }

    fn to_json(&self) -> String {
        let mut file = JsonSettings::of(self);
        file.object_mut().insert("architectures".into(), json!([Self::CLASS_NAME]));
        transformers_json::complete(file, "dinov2").to_string()
    }
}

impl Dinov2Model {
    fn new(config: &Dinov2Config, place: Placement, values: Values) -> Result<Self> {
        let (width, eps) = (i64::from(config.hidden_size), config.layer_norm_eps);
        let mut builder = Builder::new(place, values);
        let mut root = builder.root();
        let embeddings = Embeddings::new(root.at("embeddings"), config)?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| Layer::new(root.at(&format!("encoder.layer.{i}")), config))
            .collect::<Result<_>>()?;
        let layernorm = LayerNorm::new(root.at("layernorm"), width, eps)?;
        let parameters = builder.finish();
        Ok(Self { config: config.clone(), parameters, embeddings, layers, layernorm })
    }

    /// Loads a network from a transformers folder; see [`ClipTextModel::from_folder`](crate::ClipTextModel::from_folder).
    ///
    /// # Errors
    ///
    /// As [`ClipTextModel::from_folder`](crate::ClipTextModel::from_folder).
    pub fn from_folder(
        folder: impl AsRef<Path>,
        placement: Placement,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        transformers_folder::open::<Dinov2Config>(folder.as_ref(), placement, unknown_keys)
    }

    /// Writes the network to a folder that transformers loads, creating it if needed.
    ///
    /// # Errors
    ///
    /// As [`weights::save`](crate::weights::save).
    pub fn save_to_folder(&self, folder: impl AsRef<Path>) -> Result<()> {
        transformers_folder::save(folder.as_ref(), &self.parameters, &self.config)
    }

    /// The settings from which the network was built.
    pub fn config(&self) -> &Dinov2Config {
        &self.config
    }

    /// The parameters, under their names in files.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// All outputs for a batch of images.
    ///
    /// # Shapes and units
    ///
    /// - `pixel_values`: `[batch, num_channels, height, width]`, floating point, normalised with the mean and deviation
    ///   of `ImageNet`; at least one patch high and wide; rows and columns beyond the last whole patch are ignored; cast to
    ///   the kind of the parameters
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind) and [`Error::Torch`].
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Dinov2Output> {
        self.ensure_images(pixel_values)?;
        let run = || -> std::result::Result<_, TchError> {
            let mut tokens = self.embeddings.forward(pixel_values)?;
            for layer in &self.layers {
                tokens = layer.forward(&tokens)?;
            }
            let last_hidden_state = self.layernorm.forward(&tokens)?;
            let pooled = last_hidden_state.f_select(1, 0)?;
            Ok(Dinov2Output { last_hidden_state, pooled })
        };
        run().map_err(Error::torch(FORWARD))
    }

    fn ensure_images(&self, pixel_values: &Tensor) -> Result<()> {
        let (op, name) = (FORWARD, "pixel_values");
        let [channels, least] = [self.config.num_channels, self.config.patch_size].map(i64::from);
        ensure_real(op, name, pixel_values)?;
        let fits = matches!(pixel_values.size()[..], [_, c, height, width]
            if c == channels && height >= least && width >= least);
        let expected = || format!("[batch, {channels}, {least} or more, {least} or more]");
        Ok(ensure_shape(op, name, pixel_values, fits, expected)?)
    }
}

/// The class token and one token per patch, with position embeddings.
#[derive(Debug)]
struct Embeddings {
    cls_token: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor,
    patch_size: i64,
    /// Patches along a side of the images whose position embeddings are stored.
    side: i64,
}

impl Embeddings {
    fn new(mut scope: Scope<'_>, config: &Dinov2Config) -> Result<Self> {
        let [width, channels, patch_size, image_size] =
            [config.hidden_size, config.num_channels, config.patch_size, config.image_size]
                .map(i64::from);
        let side = image_size / patch_size;
        // transformers truncates at -2 and 2, far beyond any value of a usual deviation.
        let init = Init::Normal { std: config.initializer_range };
        let cls_token = scope.parameter("cls_token", &[1, 1, width], init)?;
        if config.use_mask_token {
            let _ = scope.parameter("mask_token", &[1, width], Init::Constant(0.0))?;
        }
        let positions =
            scope.parameter("position_embeddings", &[1, 1 + side * side, width], init)?;
        let mut projection = scope.at("patch_embeddings.projection");
        let shape = [width, channels, patch_size, patch_size];
        let weight = projection.parameter("weight", &shape, init)?;
        let bias = projection.parameter("bias", &[width], Init::Constant(0.0))?;
        Ok(Self { cls_token, positions, weight, bias, patch_size, side })
    }

    fn forward(&self, pixel_values: &Tensor) -> Output {
        let stride = [self.patch_size; 2];
        let patches = pixel_values.f_to_kind(self.weight.kind())?.f_conv2d(
            &self.weight,
            Some(&self.bias),
            stride,
            [0, 0],
            [1, 1],
            1,
        )?;
        let size = patches.size();
        let class = self.cls_token.f_expand([size[0], 1, size[1]], false)?;
        let tokens = Tensor::f_cat(&[class, patches.f_flatten(2, -1)?.f_transpose(1, 2)?], 1)?;
        tokens.f_add(&self.positions_of([size[2], size[3]])?)
    }

    /// The position embeddings of an image of `patches` patches, rows and columns.
    fn positions_of(&self, patches: [i64; 2]) -> Output {
        if patches == [self.side; 2] {
            return Ok(self.positions.shallow_clone());
        }
        let (kind, width) = (self.positions.kind(), self.cls_token.size()[2]);
        let class = self.positions.f_narrow(1, 0, 1)?;
        let stored = self.positions.f_narrow(1, 1, self.side * self.side)?;
        let interpolated = stored
            .f_reshape([1, self.side, self.side, width])?
            .f_permute([0, 3, 1, 2])?
            .f_to_kind(Kind::Float)?
            .f_upsample_bicubic2d(patches, false, None, None)?
            .f_to_kind(kind)?
            .f_permute([0, 2, 3, 1])?
            .f_reshape([1, -1, width])?;
        Tensor::f_cat(&[class, interpolated], 1)
    }
}

/// `x + scale1 * attention(norm1(x))`, then `x + scale2 * mlp(norm2(x))`.
#[derive(Debug)]
struct Layer {
    norm1: LayerNorm,
    attention: Attention,
    scale1: Tensor,
    norm2: LayerNorm,
    mlp: FeedForward,
    scale2: Tensor,
}

impl Layer {
    fn new(mut scope: Scope<'_>, config: &Dinov2Config) -> Result<Self> {
        let (width, eps) = (i64::from(config.hidden_size), config.layer_norm_eps);
        let scale = Init::Constant(config.layerscale_value);
        Ok(Self {
            norm1: LayerNorm::new(scope.at("norm1"), width, eps)?,
            attention: Attention::new(scope.at("attention"), config)?,
            scale1: scope.at("layer_scale1").parameter("lambda1", &[width], scale)?,
            norm2: LayerNorm::new(scope.at("norm2"), width, eps)?,
            mlp: FeedForward::new(scope.at("mlp"), config)?,
            scale2: scope.at("layer_scale2").parameter("lambda1", &[width], scale)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Output {
        let attended = self.attention.forward(&self.norm1.forward(x)?)?;
        let x = x.f_add(&attended.f_mul(&self.scale1)?)?;
        let changed = self.mlp.forward(&self.norm2.forward(&x)?)?;
        x.f_add(&changed.f_mul(&self.scale2)?)
    }
}

#[derive(Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    heads: i64,
}

impl Attention {
    fn new(mut scope: Scope<'_>, config: &Dinov2Config) -> Result<Self> {
        let (width, std) = (i64::from(config.hidden_size), config.initializer_range);
        let mut projection = |name: &str| {
            let scope = scope.at(&format!("attention.{name}"));
            if config.qkv_bias {
                Linear::normal(scope, width, width, std)
            } else {
                Linear::normal_without_bias(scope, width, width, std)
            }
        };
        Ok(Self {
            query: projection("query")?,
            key: projection("key")?,
            value: projection("value")?,
            dense: Linear::normal(scope.at("output.dense"), width, width, std)?,
            heads: config.num_attention_heads.into(),
        })
    }

    fn forward(&self, tokens: &Tensor) -> Output {
        let size = tokens.size();
        let split = |tokens: Tensor| {
            let per_head = [size[0], size[1], self.heads, size[2] / self.heads];
            tokens.f_reshape(per_head)?.f_transpose(1, 2)
        };
        let [query, key, value] = [
            split(self.query.forward(tokens)?)?,
            split(self.key.forward(tokens)?)?,
            split(self.value.forward(tokens)?)?,
        ];
        let attended = Tensor::f_scaled_dot_product_attention(
            &query,
            &key,
            &value,
            None::<&Tensor>,
            0.0,
            false,
            None,
            false,
        )?;
        self.dense.forward(&attended.f_transpose(1, 2)?.f_reshape(&size)?)
    }
}

/// The layers that follow attention.
#[derive(Debug)]
enum FeedForward {
    Plain {
        fc1: Linear,
        fc2: Linear,
        activation: Activation,
    },
    /// `weights_in` returns gates and values, one after the other.
    Gated {
        weights_in: Linear,
        weights_out: Linear,
    },
}

impl FeedForward {
    fn new(mut scope: Scope<'_>, config: &Dinov2Config) -> Result<Self> {
        let (width, std) = (i64::from(config.hidden_size), config.initializer_range);
        let inner = config.inner_width();
        if config.use_swiglu_ffn {
            return Ok(Self::Gated {
                weights_in: Linear::normal(scope.at("weights_in"), width, 2 * inner, std)?,
                weights_out: Linear::normal(scope.at("weights_out"), inner, width, std)?,
            });
        }
        Ok(Self::Plain {
            fc1: Linear::normal(scope.at("fc1"), width, inner, std)?,
            fc2: Linear::normal(scope.at("fc2"), inner, width, std)?,
            activation: config.hidden_act,
        })
    }

    fn forward(&self, x: &Tensor) -> Output {
        match self {
            Self::Plain { fc1, fc2, activation } => {
                fc2.forward(&activation.forward(&fc1.forward(x)?)?)
            }
            Self::Gated { weights_in, weights_out } => {
                let both = weights_in.forward(x)?.f_chunk(2, -1)?;
                weights_out.forward(&both[0].f_silu()?.f_mul(&both[1])?)
            }
        }
    }
}
