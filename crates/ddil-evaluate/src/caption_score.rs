//! The CLIP score of images and their captions.

use std::path::Path;

use ddil_files::Invalid;
use ddil_metrics::ImageInput;
use ddil_models::{ClipModel, ClipScore, ClipTokenizer, Placement, UnknownKeys};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::network_folder::{NetworkClass, sha256_of_weights};
use crate::preprocessor;

/// CLIP with its tokenizer and its conversion of images, from a transformers folder: embeddings of images and captions,
/// each of length 1, whose product is the cosine of the CLIP score.
///
/// # Example
///
/// ```no_run
/// use ddil_evaluate::CaptionScorer;
/// use tch::{Device, Kind, Tensor};
///
/// let clip = CaptionScorer::from_folder("clip-vit-large-patch14", Device::Cpu)?;
/// let images = Tensor::zeros([1, 3, 512, 512], (Kind::Uint8, Device::Cpu));
/// let images = clip.image_embeds(&clip.input().prepare(&images)?)?;
/// let cosine = (images * clip.text_embeds(&["a photo of a cat"])?.embeds).sum(Kind::Float);
/// # Ok::<(), ddil_evaluate::Error>(())
/// ```
#[derive(Debug)]
pub struct CaptionScorer {
    score: ClipScore,
    tokenizer: ClipTokenizer,
    input: ImageInput,
    id: String,
    device: Device,
}

/// Embeddings of captions.
#[derive(Debug)]
pub struct CaptionEmbeds {
    /// `[captions, projection_dim]`, each of length 1, `Float`.
    pub embeds: Tensor,
    /// For each caption, whether it was longer than the text encoder's input and truncated.
    pub truncated: Vec<bool>,
}

impl CaptionScorer {
    /// Loads CLIP from the folder of a transformers `CLIPModel` with its tokenizer, in single precision. Images are
    /// converted as `preprocessor_config.json` describes, or else as published for CLIP.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the setting `clip` for a folder of another network, or of a vision tower without text
    /// encoder; errors of the files.
    pub fn from_folder(folder: impl AsRef<Path>, device: Device) -> Result<Self> {
        let folder = folder.as_ref();
        let class = NetworkClass::in_folder(folder, "clip")?;
        if class != NetworkClass::Clip {
            let what = match class {
                NetworkClass::ClipVision => "CLIP's vision tower alone",
                _ => "DINOv2",
            };
            let found = format!("{}, {what}", folder.display());
            let expected =
                "both towers of CLIP (model_type `clip`): the score compares images with captions";
            return Err(Invalid::new("clip", found, expected).into());
        }
        let place = Placement { device, ..Placement::default() };
        let tokenizer = ClipTokenizer::from_folder(folder)?;
        let model = ClipModel::from_folder(folder, place, UnknownKeys::Refuse)?;
        let vision = model.vision().config();
        let (channels, side) = (i64::from(vision.num_channels), i64::from(vision.image_size));
        let own = preprocessor::input_in(folder, channels, "clip")?;
        let input = own.unwrap_or_else(|| ImageInput::clip(side));
        if input.channels != channels || input.resize.size() != Some([side; 2]) {
            let found =
                format!("an input of {} channels, resize `{}`", input.channels, input.resize);
            let expected =
                format!("{channels} channels and {side}x{side} pixels, as in config.json");
            return Err(Invalid::new("clip", found, expected).into());
        }
        let id = format!("clip-{}", sha256_of_weights(folder)?);
        Ok(Self { score: ClipScore::new(model), tokenizer, input, id, device })
    }

    /// The conversion of images.
    pub fn input(&self) -> &ImageInput {
        &self.input
    }

    /// Width of an embedding.
    pub fn dim(&self) -> i64 {
        self.score.model().vision().config().projection_dim.into()
    }

    /// `clip-` and the SHA-256 of the weights.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Embeddings of converted images, each of length 1, `[n, projection_dim]`, `Float`.
    ///
    /// # Errors
    ///
    /// Those of the network.
    pub fn image_embeds(&self, prepared: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let pixels = prepared.f_to_device(self.device);
        Ok(self
            .score
            .image_embeds(&pixels.map_err(Error::torch("CaptionScorer::image_embeds"))?)?)
    }

    /// Embeddings of captions. A caption that is too long is truncated, with its end token kept.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer and of the network.
    pub fn text_embeds(&self, captions: &[&str]) -> Result<CaptionEmbeds> {
        let _no_grad = tch::no_grad_guard();
        let tokens = self.tokenizer.encode(captions)?;
        let on_device = |ids: &Tensor| {
            ids.f_to_device(self.device).map_err(Error::torch("CaptionScorer::text_embeds"))
        };
        let (ids, mask) = (on_device(&tokens.input_ids)?, on_device(&tokens.attention_mask)?);
        let embeds = self.score.text_embeds(&ids, Some(&mask))?.to_kind(Kind::Float);
        Ok(CaptionEmbeds {
            embeds,
            truncated: tokens.truncated.iter().map(Option::is_some).collect(),
        })
    }
}
