//! Images that a model draws from prompts.

use ddil_core::{RandomStreams, Stream};
use ddil_files::Invalid;
use ddil_pipelines::{
    Pipeline, PromptRequest, SamplePlan, TextToImageComponents, decode, sample_latents_seeded,
    with_published_timesteps,
};
use tch::Tensor;

use ddil_data::Prompt;

use crate::error::{Error, Result};
use crate::prompts::{EvaluationPrompts, PromptSet};

/// Bits of a stream's step that are the number of a prompt; the others are the number of its image.
const PROMPT_BITS: u32 = 20;

/// An error of a request, whose settings are those of a measurement.
fn as_setting(error: ddil_pipelines::Error) -> Error {
    match error {
        ddil_pipelines::Error::Invalid(invalid) => invalid.into(),
        error => error.into(),
    }
}

/// What did not fit into the input of the text encoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Truncated {
    /// The number of prompts that were truncated.
    pub prompts: u32,
    /// Whether the negative prompt was.
    pub negative: bool,
}

/// Draws the images of prompts, in parts, so that memory does not grow with their number.
///
/// Image `k` of prompt `p` depends on the plan's seed, `p` and `k` alone, up to rounding: it is the same whatever the size
/// of a batch, the number of prompts and of images per prompt.
pub struct PromptDrawing<'a> {
    pipeline: &'a Pipeline,
    text: &'a TextToImageComponents,
    plan: SamplePlan,
    size: [Option<u32>; 2],
    image_shape: [i64; 3],
    prompts: &'a EvaluationPrompts,
}

impl<'a> PromptDrawing<'a> {
    /// Prepares to draw from a text-to-image model; `size` is height and width in pixels, by default the model's own.
    ///
    /// # Errors
    ///
    /// Errors of the plan: an invalid number of steps; of the size; and a negative prompt that has no effect.
    pub fn new(
        pipeline: &'a Pipeline,
        text: &'a TextToImageComponents,
        plan: &SamplePlan,
        size: [Option<u32>; 2],
        prompts: &'a EvaluationPrompts,
    ) -> Result<Self> {
        if !pipeline.parts.class().is_text_to_image() {
            let expected = "a text-to-image model; this one takes no prompts";
            return Err(Invalid::new("prompts", "set", expected).into());
        }
        let plan = with_published_timesteps(pipeline, plan.clone())?;
        let mut drawing = Self { pipeline, text, plan, size, image_shape: [0; 3], prompts };
        let first = prompts.prompts.get(..1).unwrap_or_default();
        drawing.request(first).ensure(pipeline, &drawing.plan).map_err(as_setting)?;
        let size = drawing.request(first).pixels(pipeline, text).map_err(as_setting)?;
        let [height, width] = size;
        let _ = text.latent_shape([height, width])?;
        drawing.image_shape = [text.image_channels(), height, width];
        Ok(drawing)
    }

    /// The plan, with the timesteps of the model's scheduler file.
    pub fn plan(&self) -> &SamplePlan {
        &self.plan
    }

    /// Channels, height and width of an image.
    pub fn image_shape(&self) -> [i64; 3] {
        self.image_shape
    }

    /// The number of images.
    pub fn num_images(&self) -> u64 {
        self.prompts.num_images()
    }

    /// What identifies the prompts.
    pub fn prompts(&self) -> &PromptSet {
        &self.prompts.set
    }

    /// The number of calls of the network for the images of all prompts after the first `done`.
    pub fn num_calls(&self, done: u64) -> u64 {
        let k = self.prompts.set.images_per_prompt;
        let parts = self.after(done).chunks(self.prompts_at_once());
        parts.map(|part| self.plan.num_calls(part.len() as u32 * k)).sum()
    }

    fn after(&self, done: u64) -> &[Prompt] {
        self.prompts.prompts.get(done as usize..).unwrap_or_default()
    }

    /// Draws the images of all prompts after the first `done`, and calls `consume` with some prompts and their images, `[prompts * images_per_prompt, channels,
    /// height, width]` on the CPU, about `[-1, 1]`, those of a prompt one after the other; `on_call` is called after each
    /// call of the network. Returns what was truncated.
    ///
    /// # Errors
    ///
    /// Errors of the networks, and of `consume`.
    pub fn for_each<E: From<Error>>(
        &self,
        done: u64,
        on_call: &dyn Fn(),
        mut consume: impl FnMut(&[Prompt], &Tensor) -> std::result::Result<(), E>,
    ) -> std::result::Result<Truncated, E> {
        let (mut truncated, mut first) = (Truncated::default(), done);
        for part in self.after(done).chunks(self.prompts_at_once()) {
            let images = self.draw(part, first, on_call, &mut truncated)?;
            consume(part, &images)?;
            first += part.len() as u64;
        }
        Ok(truncated)
    }

    fn draw(
        &self,
        part: &[Prompt],
        first: u64,
        on_call: &dyn Fn(),
        truncated: &mut Truncated,
    ) -> Result<Tensor> {
        let encoded = self.request(part).encode(self.pipeline, self.text, &self.plan)?;
        let negative = encoded.is_negative_truncated;
        truncated.prompts += (encoded.truncated.len() - usize::from(negative)) as u32;
        truncated.negative |= negative;
        let streams = RandomStreams::new(self.plan.seed, 0);
        let per_prompt = u64::from(self.prompts.set.images_per_prompt);
        let seeds: Vec<u64> = (first..first + part.len() as u64)
            .flat_map(|prompt| (0..per_prompt).map(move |k| (k << PROMPT_BITS) | prompt))
            .map(|step| streams.seed_of(step, Stream::Sample))
            .collect();
        let latents = sample_latents_seeded(self.pipeline, &self.plan, &encoded, &seeds, on_call)?;
        Ok(decode(self.text, &latents, self.plan.batch_size)?)
    }

    /// Prompts whose images fill a batch of the network, or one.
    fn prompts_at_once(&self) -> usize {
        (self.plan.batch_size / self.prompts.set.images_per_prompt.max(1)).max(1) as usize
    }

    fn request(&self, prompts: &[Prompt]) -> PromptRequest {
        PromptRequest {
            prompts: prompts.iter().map(|prompt| self.prompts.set.text_of(prompt)).collect(),
            negative_prompt: self.prompts.set.negative_prompt.clone(),
            size: self.size,
            per_prompt: self.prompts.set.images_per_prompt,
        }
    }
}
