//! Text encoders and autoencoder of a text-to-image model.

use std::path::Path;

use ddil_core::Conditioning;
use ddil_files::Invalid;
use ddil_libtorch::Generator;
use ddil_models::{
    AutoencoderKL, ClipTextModel, ClipTokenizer, HiddenState, Placement, TokenizedPrompts,
    UnknownKeys,
};
use tch::{Kind, Tensor};

use super::index::{Index, PipelineClass};
use super::published;
use crate::error::{Error, Result};

/// The frozen components of a text-to-image model: tokenizers, text encoders, autoencoder.
///
/// They are needed to encode data and to generate images, but not to train a student.
///
/// # Example
///
/// ```
/// use ddil_core::Conditioning;
/// use ddil_models::Placement;
/// use ddil_pipelines::Pipeline;
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-text-to-image"));
/// let model = Pipeline::open_without_weights(path)?;
/// let components = model.parts.text_to_image(Placement::default())?;
/// let encoded = components.encode(&["a sneaker", "a dress"])?;
/// let states = encoded.conditioning.get(Conditioning::ENCODER_HIDDEN_STATES);
/// assert_eq!(states.map(|states| states.size()[0]), Some(2));
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
#[derive(Debug)]
pub struct TextToImageComponents {
    /// One, or two for Stable Diffusion XL.
    encoders: Vec<TextEncoder>,
    vae: AutoencoderKL,
    family: Family,
}

#[derive(Debug)]
struct TextEncoder {
    tokenizer: ClipTokenizer,
    model: ClipTextModel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    StableDiffusion,
    StableDiffusionXl {
        /// Whether the unconditional input of guidance is zeros instead of the encoded empty text.
        zeros_for_empty_prompt: bool,
    },
}

/// Encoded prompts.
#[derive(Debug)]
pub struct EncodedPrompts {
    /// The network input, one row per prompt; without `time_ids`, which depend on the image size.
    pub conditioning: Conditioning,
    /// For each prompt, the part that was cut off because it exceeds the context of the text encoders.
    pub truncated: Vec<Option<String>>,
}

impl TextToImageComponents {
    /// Reads the components of a pipeline folder.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it is not a text-to-image pipeline or a component is missing; otherwise the error of a
    /// component.
    pub(super) fn read(folder: &Path, index: &Index, placement: Placement) -> Result<Self> {
        let (names, family): (&[_], _) = match index.class {
            PipelineClass::StableDiffusion | PipelineClass::LatentConsistency => {
                (&[("tokenizer", "text_encoder")], Family::StableDiffusion)
            }
            PipelineClass::StableDiffusionXl => {
                let zeros_for_empty_prompt = index.is_on_by_default("force_zeros_for_empty_prompt");
                let names = &[("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")];
                (names, Family::StableDiffusionXl { zeros_for_empty_prompt })
            }
            PipelineClass::Ddim | PipelineClass::Ddpm => {
                return Err(invalid(folder, index.class.as_str(), "a text-to-image pipeline"));
            }
        };
        let required = names.iter().flat_map(|(tokenizer, encoder)| [*tokenizer, *encoder]);
        let missing: Vec<&str> = required.chain(["vae"]).filter(|name| !index.has(name)).collect();
        if !missing.is_empty() {
            let expected = format!("a pipeline with {}", missing.join(", "));
            return Err(invalid(folder, "without them", &expected));
        }
        let encoders = names.iter().map(|(tokenizer, encoder)| {
            let (tokenizer, model) = (folder.join(tokenizer), folder.join(encoder));
            TextEncoder::read(&tokenizer, &model, placement)
        });
        let vae = published::autoencoder(folder, index.class, placement)?;
        Ok(Self { encoders: encoders.collect::<Result<_>>()?, vae, family })
    }

    /// Encodes prompts.
    ///
    /// Stable Diffusion uses the last hidden state of its encoder. XL uses the penultimate hidden states of both
    /// encoders, concatenated, and the second encoder's pooled projection as `text_embeds`.
    ///
    /// # Shapes and units
    ///
    /// - returns: `encoder_hidden_states` `[prompts, tokens, width]`, for XL `text_embeds` `[prompts, width]`; `Float`
    ///
    /// # Errors
    ///
    /// The errors of tokenizers and encoders.
    pub fn encode(&self, prompts: &[&str]) -> Result<EncodedPrompts> {
        let _no_grad = tch::no_grad_guard();
        let mut truncated: Vec<Option<String>> = vec![None; prompts.len()];
        let mut states = Vec::with_capacity(self.encoders.len());
        let mut text_embeds = None;
        for (i, encoder) in self.encoders.iter().enumerate() {
            let tokens = encoder.tokenizer.encode(prompts)?;
            let TokenizedPrompts { input_ids, truncated: cut, .. } = tokens;
            for (kept, cut) in truncated.iter_mut().zip(cut) {
                // The part that every encoder ignores is the shortest one.
                *kept = shorter(kept.take(), cut, i == 0);
            }
            let ids = input_ids.to_device(encoder.model.parameters().placement().device);
            let state = match self.family {
                Family::StableDiffusion => {
                    encoder.model.hidden_state(&ids, None, HiddenState::stable_diffusion(0))?
                }
                Family::StableDiffusionXl { .. } => {
                    let which = HiddenState::stable_diffusion_xl(0);
                    if i + 1 < self.encoders.len() {
                        encoder.model.hidden_state(&ids, None, which)?
                    } else {
                        let (state, pooled) =
                            encoder.model.hidden_state_and_text_embeds(&ids, None, which)?;
                        text_embeds = Some(pooled.to_kind(Kind::Float));
                        state
                    }
                }
            };
            states.push(state.to_kind(Kind::Float));
        }
        let states =
            Tensor::f_cat(&states, -1).map_err(Error::torch("TextToImageComponents::encode"))?;
        let conditioning = Conditioning::none()
            .with(Conditioning::ENCODER_HIDDEN_STATES, states)
            .with_some(Conditioning::TEXT_EMBEDS, text_embeds);
        Ok(EncodedPrompts { conditioning, truncated })
    }

    /// The unconditional input of classifier-free guidance, one row: the encoded empty text, or zeros if the pipeline
    /// is configured so, as Stable Diffusion XL is.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn empty(&self) -> Result<Conditioning> {
        let EncodedPrompts { conditioning, .. } = self.encode(&[""])?;
        if self.family != (Family::StableDiffusionXl { zeros_for_empty_prompt: true }) {
            return Ok(conditioning);
        }
        let zeros = conditioning.parts().map(|(name, part)| (name.to_owned(), part.zeros_like()));
        Ok(zeros.collect())
    }

    /// The `time_ids` of images of the given height and width that were neither scaled nor cropped, `[batch, 6]`;
    /// `None` for a model without this input.
    pub fn time_ids(&self, [height, width]: [i64; 2], batch: i64) -> Option<Tensor> {
        match self.family {
            Family::StableDiffusion => None,
            Family::StableDiffusionXl { .. } => {
                let [height, width] = [height, width].map(|side| side as f32);
                let row = Tensor::from_slice(&[height, width, 0.0, 0.0, height, width]);
                let device = self.vae.parameters().placement().device;
                Some(row.to_device(device).repeat([batch, 1]))
            }
        }
    }

    /// Pixels per latent in each direction.
    pub fn pixels_per_latent(&self) -> i64 {
        1 << (self.vae.config().block_out_channels.len() - 1)
    }

    /// Channels of an image.
    pub fn image_channels(&self) -> i64 {
        self.vae.config().out_channels.into()
    }

    /// Channels, height and width of the latents of images of the given height and width.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for sides that are not multiples of [`pixels_per_latent`](Self::pixels_per_latent).
    pub fn latent_shape(&self, [height, width]: [i64; 2]) -> Result<[i64; 3]> {
        let factor = self.pixels_per_latent();
        if [height, width].iter().any(|side| *side <= 0 || side % factor != 0) {
            return Err(Error::Invalid(Invalid::new(
                "height, width",
                format!("{height}, {width}"),
                format!("positive multiples of {factor}"),
            )));
        }
        let channels = i64::from(self.vae.config().latent_channels);
        Ok([channels, height / factor, width / factor])
    }

    /// Encodes images to latents, drawn from the autoencoder's distribution and scaled for the U-Net.
    ///
    /// # Shapes and units
    ///
    /// - `images`: `[batch, channels, height, width]` in `[-1, 1]`
    /// - returns: `[batch, latent_channels, height / factor, width / factor]`, scaled
    ///
    /// # Errors
    ///
    /// The errors of the autoencoder.
    pub fn encode_images(&self, images: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        Ok(self.vae.encode_scaled(images, generator)?)
    }

    /// Mean and standard deviation of the latents that [`encode_images`](Self::encode_images) draws.
    ///
    /// # Shapes and units
    ///
    /// - as [`encode_images`](Self::encode_images), both
    ///
    /// # Errors
    ///
    /// The errors of the autoencoder.
    pub fn latent_distribution(&self, images: &Tensor) -> Result<[Tensor; 2]> {
        const OP: &str = "TextToImageComponents::latent_distribution";
        let _no_grad = tch::no_grad_guard();
        let device = self.vae.parameters().placement().device;
        let images = images.f_to_device(device).map_err(Error::torch(OP))?;
        let latents = self.vae.encode(&images)?;
        let std = (latents.logvar * 0.5).exp();
        // Scaling is affine; the shift does not apply to a standard deviation.
        let shift = self.vae.scale(&std.zeros_like())?;
        Ok([self.vae.scale(&latents.mean)?, self.vae.scale(&std)? - shift])
    }

    /// Decodes latents to images.
    ///
    /// # Shapes and units
    ///
    /// - `latents`: as returned by [`encode_images`](Self::encode_images)
    /// - returns: `[batch, channels, height, width]`, about `[-1, 1]`
    ///
    /// # Errors
    ///
    /// The errors of the autoencoder.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        Ok(self.vae.decode_scaled(latents)?)
    }
}

impl TextEncoder {
    fn read(tokenizer: &Path, model: &Path, placement: Placement) -> Result<Self> {
        let tokenizer = ClipTokenizer::from_folder(tokenizer)?;
        let model = ClipTextModel::from_folder(model, placement, UnknownKeys::Refuse)?;
        model.parameters().set_trainable(false);
        Ok(Self { tokenizer, model })
    }
}

/// The shorter of two cut-off parts; `None` is the shortest.
fn shorter(kept: Option<String>, cut: Option<String>, is_first: bool) -> Option<String> {
    match (kept, cut) {
        (None, cut) if is_first => cut,
        (Some(kept), Some(cut)) => Some(if cut.len() < kept.len() { cut } else { kept }),
        _ => None,
    }
}

fn invalid(folder: &Path, value: &str, expected: &str) -> Error {
    Error::Invalid(Invalid::new(folder.display().to_string(), value.to_owned(), expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part that one of two encoders reads does not count as cut off.
    #[test]
    fn the_encoder_with_the_longer_context_counts() {
        let cut = |text: &str| Some(text.to_owned());
        assert_eq!(shorter(None, cut("end"), true), cut("end"));
        assert_eq!(shorter(None, None, true), None);
        assert_eq!(shorter(cut("the end"), cut("end"), false), cut("end"));
        assert_eq!(shorter(cut("end"), cut("the end"), false), cut("end"));
        assert_eq!(shorter(cut("end"), None, false), None);
        assert_eq!(shorter(None, cut("end"), false), None);
    }
}
