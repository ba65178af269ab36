//! The vision tower: from images to embeddings in the space of captions.

use std::path::Path;

use ddil_files::Invalid;
use ddil_libtorch::{ensure_real, ensure_shape};
use tch::{Kind, TchError, Tensor};

use crate::config::{NetworkConfig, UnknownKeys};
use crate::error::{Error, Result};
use crate::layers::{Embedding, LayerNorm, Linear, Output};
use crate::parameters::{Builder, Init, Parameters, Placement, Scope, Values};
use crate::transformers_folder;

use super::encoder::{Encoder, Mask};
use super::files;
use super::vision_config::ClipVisionConfig;

const FORWARD: &str = "ClipVisionModel::forward";

/// The outputs of the vision tower for a batch of images.
#[derive(Debug)]
pub struct ClipVisionOutput {
    /// After all layers, without norm; `[batch, 1 + patches, hidden_size]`.
    pub last_hidden_state: Tensor,
    /// The first token of `last_hidden_state`, the class token, after the final norm;
    /// `[batch, hidden_size]`.
    pub pooled: Tensor,
    /// `pooled`, projected, if there is a projection; `[batch, projection_dim]`.
    pub image_embeds: Option<Tensor>,
}

/// The vision tower of CLIP ([Radford et al. 2021](https://arxiv.org/abs/2103.00020)), a transformer over patches;
/// built from a [`ClipVisionConfig`] or by [`Self::from_folder`].
///
/// It is transformers' `CLIPVisionModel`, or `CLIPVisionModelWithProjection`, depending on the settings.
///
/// # Example
///
/// ```
/// use ddil_models::{ClipVisionClass, ClipVisionConfig, NetworkConfig, Placement};
/// use tch::{Tensor, kind};
///
/// let config = ClipVisionConfig {
///     architectures: [ClipVisionClass::VisionModelWithProjection],
///     hidden_size: 8,
///     intermediate_size: 16,
///     projection_dim: 4,
///     num_hidden_layers: 2,
///     num_attention_heads: 2,
///     image_size: 16,
///     patch_size: 8,
///     ..ClipVisionConfig::default()
/// };
/// let tower = config.build(Placement::default(), 0)?;
///
/// let output = tower.forward(&Tensor::randn([3, 3, 16, 16], kind::FLOAT_CPU))?;
/// assert_eq!(output.last_hidden_state.size(), [3, 5, 8]);
/// assert_eq!(output.image_embeds.map(|embeds| embeds.size()), Some(vec![3, 4]));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ClipVisionModel {
    config: ClipVisionConfig,
    parameters: Parameters,
    embeddings: Embeddings,
    pre_layrnorm: LayerNorm,
    encoder: Encoder,
    post_layernorm: LayerNorm,
    visual_projection: Option<Linear>,
}

impl NetworkConfig for ClipVisionConfig {
    type Network = ClipVisionModel;

    const CLASS_NAME: &'static str = "CLIPVisionModel";
    const MODEL_TYPE: Option<&'static str> = Some("clip_vision_model");

    fn problems(&self) -> Vec<Invalid> {
        self.check()
    }

    fn assemble(&self, placement: Placement, values: Values) -> Result<ClipVisionModel> {
        ClipVisionModel::new(self, placement, values)
    }

    fn parameters_of(network: &ClipVisionModel) -> &Parameters {
        network.parameters()
    }

    fn load(network: &mut ClipVisionModel, path: &Path) -> Result<()> {
        files::load(network.parameters(), path)
    }

    fn read(network: &ClipVisionModel, path: &Path) -> Result<Vec<(String, Tensor)>> {
        files::read(network.parameters(), path)
    }
}

impl ClipVisionModel {
    fn new(config: &ClipVisionConfig, place: Placement, values: Values) -> Result<Self> {
        let (width, eps) = (i64::from(config.hidden_size), config.layer_norm_eps);
        let mut builder = Builder::new(place, values);
        let mut root = builder.root();
        let mut scope = root.at("vision_model");
        let embeddings = Embeddings::new(scope.at("embeddings"), config)?;
        // Spelt like this in every published file.
        let pre_layrnorm = LayerNorm::new(scope.at("pre_layrnorm"), width, eps)?;
        let encoder = Encoder::new(scope.at("encoder"), config.encoder())?;
        let post_layernorm = LayerNorm::new(scope.at("post_layernorm"), width, eps)?;
        let outputs = config.projection_dim.into();
        let visual_projection = config
            .projects()
            .then(|| Linear::without_bias(root.at("visual_projection"), width, outputs))
            .transpose()?;
        let config = config.clone();
        let parameters = builder.finish();
        Ok(Self {
            config,
            parameters,
            embeddings,
            pre_layrnorm,
            encoder,
            post_layernorm,
            visual_projection,
        })
    }

    /// Loads a tower from a transformers folder; see [`ClipTextModel::from_folder`](super::ClipTextModel::from_folder).
    ///
    /// # Errors
    ///
    /// As [`ClipTextModel::from_folder`](super::ClipTextModel::from_folder).
    pub fn from_folder(
        folder: impl AsRef<Path>,
        placement: Placement,
        unknown_keys: UnknownKeys,
    ) -> Result<Self> {
        transformers_folder::open::<ClipVisionConfig>(folder.as_ref(), placement, unknown_keys)
    }

    /// Writes the tower to a folder that transformers loads, creating it if needed.
    ///
    /// # Errors
    ///
    /// As [`weights::save`](crate::weights::save).
    pub fn save_to_folder(&self, folder: impl AsRef<Path>) -> Result<()> {
        transformers_folder::save(folder.as_ref(), &self.parameters, &self.config)
    }

    /// The settings from which the tower was built.
    pub fn config(&self) -> &ClipVisionConfig {
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
    /// - `pixel_values`: `[batch, num_channels, image_size, image_size]`, floating point, with CLIP's mean and
    ///   standard deviation subtracted and divided by (`ddil_metrics::ImageInput::clip`); cast to the kind of the parameters
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind) and [`Error::Torch`].
    pub fn forward(&self, pixel_values: &Tensor) -> Result<ClipVisionOutput> {
        self.ensure_images(pixel_values)?;
        let run = || -> std::result::Result<_, TchError> {
            let tokens = self.embeddings.forward(pixel_values)?;
            let tokens = self.pre_layrnorm.forward(&tokens)?;
            let last_hidden_state =
                self.encoder.forward(tokens, &Mask::All, self.encoder.num_layers(), |_| {})?;
            let pooled = self.post_layernorm.forward(&last_hidden_state.f_select(1, 0)?)?;
            let image_embeds =
                self.visual_projection.as_ref().map(|p| p.forward(&pooled)).transpose()?;
            Ok(ClipVisionOutput { last_hidden_state, pooled, image_embeds })
        };
        run().map_err(Error::torch(FORWARD))
    }

    fn ensure_images(&self, pixel_values: &Tensor) -> Result<()> {
        let (op, name) = (FORWARD, "pixel_values");
        let [channels, side] = [self.config.num_channels, self.config.image_size].map(i64::from);
        ensure_real(op, name, pixel_values)?;
        let fits = matches!(pixel_values.size()[..], [_, c, height, width]
            if (c, height, width) == (channels, side, side));
        let expected = || format!("[batch, {channels}, {side}, {side}]");
        Ok(ensure_shape(op, name, pixel_values, fits, expected)?)
    }
}

/// The class token and one token per patch, with position embeddings.
#[derive(Debug)]
struct Embeddings {
    class_embedding: Tensor,
    patch_embedding: Tensor,
    position_embedding: Embedding,
    patch_size: i64,
    kind: Kind,
}

impl Embeddings {
    fn new(mut scope: Scope<'_>, config: &ClipVisionConfig) -> Result<Self> {
        let [width, channels, patch_size, image_size] =
            [config.hidden_size, config.num_channels, config.patch_size, config.image_size]
                .map(i64::from);
        let class_std = config.initializer_factor / (width as f64).sqrt();
        let std = config.initializer_range * config.initializer_factor;
        let class_embedding =
            scope.parameter("class_embedding", &[width], Init::Normal { std: class_std })?;
        let patch_embedding = scope.at("patch_embedding").parameter(
            "weight",
            &[width, channels, patch_size, patch_size],
            Init::Normal { std },
        )?;
        let tokens = 1 + (image_size / patch_size).pow(2);
        let position_embedding =
            Embedding::normal(scope.at("position_embedding"), tokens, width, std)?;
        let kind = class_embedding.kind();
        Ok(Self { class_embedding, patch_embedding, position_embedding, patch_size, kind })
    }

    fn forward(&self, pixel_values: &Tensor) -> Output {
        let stride = [self.patch_size; 2];
        let patches = pixel_values.f_to_kind(self.kind)?.f_conv2d(
            &self.patch_embedding,
            None::<&Tensor>,
            stride,
            [0, 0],
            [1, 1],
            1,
        )?;
        let patches = patches.f_flatten(2, -1)?.f_transpose(1, 2)?;
        let size = patches.size();
        let class = self.class_embedding.f_expand([size[0], 1, size[2]], false)?;
        let tokens = Tensor::f_cat(&[class, patches], 1)?;
        let positions = Tensor::f_arange(size[1] + 1, (Kind::Int64, tokens.device()))?;
        tokens.f_add(&self.position_embedding.forward(&positions)?)
    }
}
