//! The CLIP score: how well images match their captions.

use ddil_libtorch::{ensure_dense, ensure_shape};
use tch::{Kind, TchError, Tensor};

use crate::error::{Error, Result};

use super::model::ClipModel;

/// The cosine between the embeddings of an image and of its caption
/// ([Hessel et al. 2021](https://arxiv.org/abs/2104.08718)), neither scaled nor clipped at 0.
///
/// Published scores are often 100 times, or 2.5 times, the positive part of it. `ddil_metrics::ImageInput::clip` converts
/// images to the input of the vision tower.
///
/// # Example
///
/// ```
/// use ddil_models::{
///     ClipConfig, ClipScore, ClipTextConfig, ClipVisionConfig, NetworkConfig, Placement,
/// };
/// use tch::{Tensor, kind};
///
/// let text = ClipTextConfig {
///     vocab_size: 100,
///     hidden_size: 8,
///     intermediate_size: 16,
///     num_hidden_layers: 1,
///     num_attention_heads: 2,
///     eos_token_id: 99,
///     ..ClipTextConfig::default()
/// };
/// let vision = ClipVisionConfig {
///     hidden_size: 12,
///     intermediate_size: 16,
///     num_hidden_layers: 1,
///     num_attention_heads: 2,
///     image_size: 16,
///     patch_size: 8,
///     ..ClipVisionConfig::default()
/// };
/// let config = ClipConfig { text, vision, projection_dim: 4, ..ClipConfig::default() };
/// let score = ClipScore::new(config.build(Placement::default(), 0)?);
///
/// let pixel_values = Tensor::randn([2, 3, 16, 16], kind::FLOAT_CPU);
/// let input_ids = Tensor::from_slice(&[98_i64, 5, 99, 98, 7, 99]).view([2, 3]);
/// let mean = score.score(&pixel_values, &input_ids, None)?;
/// assert!((-1.0..=1.0).contains(&mean));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ClipScore {
    model: ClipModel,
}

impl ClipScore {
    /// A score that uses that network.
    pub fn new(model: ClipModel) -> Self {
        Self { model }
    }

    /// The network of the score.
    pub fn model(&self) -> &ClipModel {
        &self.model
    }

    /// Embeddings of images, each of length 1; `[batch, projection_dim]`, `Float`.
    ///
    /// # Errors
    ///
    /// As [`ClipVisionModel::forward`](super::ClipVisionModel::forward).
    pub fn image_embeds(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let output = self.model.vision().forward(pixel_values)?;
        let op = "ClipScore::image_embeds";
        let embeds = output.image_embeds.ok_or(Error::NoProjection { op })?;
        unit(&embeds).map_err(Error::torch(op))
    }

    /// Embeddings of captions, each of length 1; `[batch, projection_dim]`, `Float`.
    ///
    /// # Errors
    ///
    /// As [`ClipTextModel::forward`](super::ClipTextModel::forward).
    pub fn text_embeds(
        &self,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let embeds = self.model.text().text_embeds(input_ids, attention_mask)?;
        unit(&embeds).map_err(Error::torch("ClipScore::text_embeds"))
    }

    /// The cosine of each image with the caption of the same index; `[batch]`, `Float`.
    ///
    /// # Shapes and units
    ///
    /// - `pixel_values`: `[batch, num_channels, image_size, image_size]`, as
    ///   [`ClipVisionModel::forward`](super::ClipVisionModel::forward)
    /// - `input_ids`, `attention_mask`: `[batch, tokens]`, as [`ClipTextModel::forward`](super::ClipTextModel::forward)
    ///
    /// # Errors
    ///
    /// As [`Self::image_embeds`] and [`Self::text_embeds`];
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) unless there are as many images as captions.
    pub fn similarities(
        &self,
        pixel_values: &Tensor,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "ClipScore::similarities";
        ensure_dense(OP, "pixel_values", pixel_values)?;
        ensure_dense(OP, "input_ids", input_ids)?;
        if let (Some(&count), Some(&captions)) =
            (pixel_values.size().first(), input_ids.size().first())
        {
            let expected = || format!("[{count}, tokens], one caption per image");
            ensure_shape(OP, "input_ids", input_ids, captions == count, expected)?;
        }
        let text = self.text_embeds(input_ids, attention_mask)?;
        let cosines = || self.image_embeds(pixel_values)?.f_mul(&text).map_err(Error::torch(OP));
        cosines()?
            .f_sum_dim_intlist([-1_i64].as_slice(), false, Kind::Float)
            .map_err(Error::torch(OP))
    }

    /// The mean of [`Self::similarities`].
    ///
    /// # Errors
    ///
    /// As [`Self::similarities`]; [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if there are no images.
    pub fn score(
        &self,
        pixel_values: &Tensor,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<f64> {
        const OP: &str = "ClipScore::score";
        ensure_dense(OP, "pixel_values", pixel_values)?;
        let any = pixel_values.size().first() != Some(&0);
        ensure_shape(OP, "pixel_values", pixel_values, any, || "at least one image".to_owned())?;
        let cosines = self.similarities(pixel_values, input_ids, attention_mask)?;
        cosines
            .f_mean(Kind::Double)
            .and_then(|mean| mean.f_double_value(&[]))
            .map_err(Error::torch(OP))
    }
}

/// Normalises rows to length 1.
fn unit(embeds: &Tensor) -> std::result::Result<Tensor, TchError> {
    let embeds = embeds.f_to_kind(Kind::Float)?;
    let squares = embeds.f_square()?.f_sum_dim_intlist([-1_i64].as_slice(), true, Kind::Float)?;
    embeds.f_div(&squares.f_sqrt()?)
}
