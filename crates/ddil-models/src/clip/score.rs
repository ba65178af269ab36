//! The CLIP score: how well images match their captions.

use ddil_libtorch::{ArgumentError, ensure_dense, ensure_real, ensure_shape};
use tch::{Kind, TchError, Tensor};

use crate::error::{Error, Result};
use crate::layers::Output;

use super::model::ClipModel;

const PREPROCESS: &str = "ClipScore::preprocess";
/// Mean and standard deviation of the channels of CLIP's training images, which are in `[0, 1]`.
const MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// The cosine between the embeddings of an image and of its caption
/// ([Hessel et al. 2021](https://arxiv.org/abs/2104.08718)), neither scaled nor clipped at 0.
///
/// Published scores are often 100 times, or 2.5 times, the positive part of it.
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
/// let score = ClipScore::new(config.build(Placement::default(), 0)?)?;
///
/// let images = Tensor::rand([2, 3, 20, 30], kind::FLOAT_CPU) * 2.0 - 1.0;
/// let input_ids = Tensor::from_slice(&[98_i64, 5, 99, 98, 7, 99]).view([2, 3]);
/// let mean = score.score(&images, &input_ids, None)?;
/// assert!((-1.0..=1.0).contains(&mean));
/// # Ok::<_, ddil_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ClipScore {
    model: ClipModel,
}

impl ClipScore {
    /// A score that uses that network.
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) unless the network takes images of 3 channels.
    pub fn new(model: ClipModel) -> Result<Self> {
        let channels = model.vision().config().num_channels;
        if channels != 3 {
            return Err(
                ArgumentError::value("ClipScore::new", "num_channels", channels, "3").into()
            );
        }
        Ok(Self { model })
    }

    /// The network of the score.
    pub fn model(&self) -> &ClipModel {
        &self.model
    }

    /// Preprocesses images for the vision tower: resizes the shorter side to `image_size` by antialiased bicubic
    /// interpolation, crops the centre, normalises the channels.
    ///
    /// The result is that of CLIP's preprocessing except for its rounding to 8 bits: width first, then height, each
    /// followed by clipping to the range of pixels, which the interpolation can exceed.
    ///
    /// # Shapes and units
    ///
    /// - `images`: `[batch, 3, height, width]`, floating point, in `[-1, 1]`
    /// - returns: `[batch, 3, image_size, image_size]`, `Float`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape),
    /// [`ArgumentError::Kind`](ddil_libtorch::ArgumentError::Kind) and [`Error::Torch`].
    pub fn preprocess(&self, images: &Tensor) -> Result<Tensor> {
        ensure_real(PREPROCESS, "images", images)?;
        let fits = matches!(images.size()[..], [_, 3, height, width] if height > 0 && width > 0);
        let expected = || "[batch, 3, height, width]".to_owned();
        ensure_shape(PREPROCESS, "images", images, fits, expected)?;
        let size = i64::from(self.model.vision().config().image_size);
        normalise(images, size).map_err(Error::torch(PREPROCESS))
    }

    /// Embeddings of images, each of length 1; `[batch, projection_dim]`, `Float`.
    ///
    /// # Errors
    ///
    /// As [`Self::preprocess`].
    pub fn image_embeds(&self, images: &Tensor) -> Result<Tensor> {
        let output = self.model.vision().forward(&self.preprocess(images)?)?;
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
    /// - `images`: `[batch, 3, height, width]`, floating point, in `[-1, 1]`
    /// - `input_ids`, `attention_mask`: `[batch, tokens]`, as [`ClipTextModel::forward`](super::ClipTextModel::forward)
    ///
    /// # Errors
    ///
    /// As [`Self::image_embeds`] and [`Self::text_embeds`];
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) unless there are as many images as captions.
    pub fn similarities(
        &self,
        images: &Tensor,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "ClipScore::similarities";
        ensure_dense(OP, "images", images)?;
        ensure_dense(OP, "input_ids", input_ids)?;
        if let (Some(&count), Some(&captions)) = (images.size().first(), input_ids.size().first()) {
            let expected = || format!("[{count}, tokens], one caption per image");
            ensure_shape(OP, "input_ids", input_ids, captions == count, expected)?;
        }
        let text = self.text_embeds(input_ids, attention_mask)?;
        let cosines = || self.image_embeds(images)?.f_mul(&text).map_err(Error::torch(OP));
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
        images: &Tensor,
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
    ) -> Result<f64> {
        const OP: &str = "ClipScore::score";
        ensure_dense(OP, "images", images)?;
        let any = images.size().first() != Some(&0);
        ensure_shape(OP, "images", images, any, || "at least one image".to_owned())?;
        let cosines = self.similarities(images, input_ids, attention_mask)?;
        cosines
            .f_mean(Kind::Double)
            .and_then(|mean| mean.f_double_value(&[]))
            .map_err(Error::torch(OP))
    }
}

fn normalise(images: &Tensor, size: i64) -> Output {
    let [height, width] = [images.size()[2], images.size()[3]];
    let (resized_height, resized_width) =
        if height <= width { (size, size * width / height) } else { (size * height / width, size) };
    let images = images.f_to_kind(Kind::Float)?.f_add_scalar(1.0)?.f_div_scalar(2.0)?;
    let resized = images
        .f_internal_upsample_bicubic2d_aa([height, resized_width], false, None, None)?
        .f_clamp(0.0, 1.0)?
        .f_internal_upsample_bicubic2d_aa([resized_height, resized_width], false, None, None)?
        .f_clamp(0.0, 1.0)?
        .f_narrow(2, (resized_height - size) / 2, size)?
        .f_narrow(3, (resized_width - size) / 2, size)?;
    let per_channel = |values: &[f64; 3]| -> Output {
        let values = Tensor::f_from_slice(values)?.f_to_kind(Kind::Float)?;
        values.f_to_device(resized.device())?.f_view([1, 3, 1, 1])
    };
    resized.f_sub(&per_channel(&MEAN)?)?.f_div(&per_channel(&STD)?)
}

/// Normalises rows to length 1.
fn unit(embeds: &Tensor) -> std::result::Result<Tensor, TchError> {
    let embeds = embeds.f_to_kind(Kind::Float)?;
    let squares = embeds.f_square()?.f_sum_dim_intlist([-1_i64].as_slice(), true, Kind::Float)?;
    embeds.f_div(&squares.f_sqrt()?)
}
