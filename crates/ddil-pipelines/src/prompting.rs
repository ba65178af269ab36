//! Pictures of prompts.

use ddil_core::Conditioning;
use ddil_files::Invalid;
use ddil_schedulers::{SamplerConfig, SchedulerConfig};
use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::guidance::Guide;
use crate::pipeline::{EncodedPrompts, Pipeline, TextToImageComponents};
use crate::sampling::{Observed, SamplePlan, generate, initial_noise};

/// Which pictures are to be drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptRequest {
    /// What they are to show.
    pub prompts: Vec<String>,
    /// What they are guided away from; none is what the model is told of no prompt.
    pub negative_prompt: Option<String>,
    /// Height and width in pixels; a side that is none is that of the pictures which the model was trained on.
    pub size: [Option<u32>; 2],
    /// Pictures of each prompt.
    pub per_prompt: u32,
}

/// What a network is told of a request.
#[derive(Debug)]
pub struct Told {
    /// A row a picture, those of a prompt one after another.
    pub conditioning: Conditioning,
    /// How it may be guided.
    pub guide: Guide,
    /// Channels, height and width of the latents.
    pub latent_shape: [i64; 3],
    /// Prompts of which a part was cut off, each with that part.
    pub truncated: Vec<(String, String)>,
}

impl PromptRequest {
    /// Height and width in pixels.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if neither the request nor the model says.
    pub fn pixels(&self, pipeline: &Pipeline, text: &TextToImageComponents) -> Result<[i64; 2]> {
        // The card's and not the network's: an adapter may stand on a network that was made for another size.
        let [_, own_height, own_width] = pipeline.card.image_shape;
        let own = [own_height, own_width].map(|side| side * text.pixels_per_latent());
        let mut pixels = [0; 2];
        for (i, side) in pixels.iter_mut().enumerate() {
            let asked = self.size[i].map(i64::from).or(Some(own[i]).filter(|own| *own > 0));
            *side = asked.ok_or_else(|| {
                Error::Invalid(Invalid::new(
                    ["height", "width"][i],
                    "not set",
                    "a number of pixels: the network's settings have no sample_size",
                ))
            })?;
        }
        Ok(pixels)
    }

    /// What the network is told.
    ///
    /// Without a negative prompt that is what the model has for "no prompt": an empty text, or zeros where its pipeline
    /// says so, as Stable Diffusion XL's does. A negative prompt, also an empty one, is encoded as any other.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] without a prompt, for no pictures, for a size that cannot be, and for a negative prompt that
    /// plays no part: without guidance, and where the network is told its guidance.
    pub fn told(
        &self,
        pipeline: &Pipeline,
        text: &TextToImageComponents,
        plan: &SamplePlan,
    ) -> Result<Told> {
        self.ensure(pipeline, plan)?;
        let size = self.pixels(pipeline, text)?;
        let latent_shape = text.latent_shape(size)?;
        let told = |conditioning: Conditioning| {
            let rows = conditioning.parts().next().map_or(0, |(_, part)| part.size()[0]);
            conditioning.with_some(Conditioning::TIME_IDS, text.time_ids(size, rows))
        };
        let prompts: Vec<&str> = self.prompts.iter().map(String::as_str).collect();
        let encoded = text.encode(&prompts)?;
        let mut truncated = cut_off(&prompts, &encoded);
        let empty = match &self.negative_prompt {
            None => text.empty()?,
            Some(negative) => {
                let encoded = text.encode(&[negative])?;
                truncated.extend(cut_off(&[negative], &encoded));
                encoded.conditioning
            }
        };
        let rows: Vec<i64> = (0..prompts.len() as i64)
            .flat_map(|prompt| std::iter::repeat_n(prompt, self.per_prompt as usize))
            .collect();
        let conditioning = encoded.conditioning.index_select(&Tensor::from_slice(&rows))?;
        let guide = Guide::of_prompts(&pipeline.card, told(empty));
        Ok(Told { conditioning: told(conditioning), guide, latent_shape, truncated })
    }

    fn ensure(&self, pipeline: &Pipeline, plan: &SamplePlan) -> Result<()> {
        let invalid = |field: &str, value: &str, expected: &str| {
            Err(Error::Invalid(Invalid::new(field, value.to_owned(), expected)))
        };
        if self.prompts.is_empty() {
            return invalid("prompts", "empty", "at least one prompt");
        }
        if self.per_prompt == 0 {
            return invalid("per_prompt", "0", "at least 1");
        }
        let is_guided = (plan.guidance_scale - 1.0).abs() > f64::EPSILON;
        match (&self.negative_prompt, pipeline.card.guidance_range) {
            (Some(negative), Some(_)) => {
                let expected = "left out: the network is told how strongly to guide itself, and asks for no second answer";
                invalid("negative_prompt", &format!("`{negative}`"), expected)
            }
            (Some(negative), None) if !is_guided => {
                let expected = "left out, or the guidance scale other than 1: without guidance it plays no part";
                invalid("negative_prompt", &format!("`{negative}`"), expected)
            }
            _ => Ok(()),
        }
    }
}

/// Prompts of which a part was cut off, with that part.
fn cut_off(prompts: &[&str], encoded: &EncodedPrompts) -> Vec<(String, String)> {
    let cut = prompts.iter().zip(&encoded.truncated);
    cut.filter_map(|(prompt, cut)| Some(((*prompt).to_owned(), cut.clone()?))).collect()
}

/// The plan with the timesteps that the scheduler's file of a text-to-image model means, where the plan leaves them open.
///
/// # Errors
///
/// [`Error::Scheduler`] for a number of steps that cannot be.
pub fn spaced_as_published(pipeline: &Pipeline, plan: SamplePlan) -> Result<SamplePlan> {
    match (&pipeline.scheduler, plan.sampler) {
        (SchedulerConfig::Ddim(_), SamplerConfig::Ddim { .. }) if plan.timesteps.is_none() => {
            let timesteps = pipeline.scheduler.timesteps(Some(plan.steps))?;
            Ok(SamplePlan { timesteps: Some(timesteps.as_slice().to_vec()), ..plan })
        }
        _ => Ok(plan),
    }
}

/// Draws the latents of a request from the noise of the plan's seed, `[pictures, channels, height, width]`.
///
/// Picture `i` depends on the seed, its prompt and `i`, and but for rounding on nothing else.
///
/// # Errors
///
/// As [`generate`].
pub fn draw_latents(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    told: &Told,
    on_call: &dyn Fn(),
) -> Result<Tensor> {
    let device = pipeline.network.placement().device;
    let rows = told.conditioning.parts().next().map_or(0, |(_, part)| part.size()[0]);
    let noise = initial_noise(plan.seed, rows as u32, told.latent_shape, device)?;
    let network = Observed::new(&pipeline.network, on_call);
    generate(&network, plan, &told.guide, &noise, &told.conditioning)
}

/// Pictures of latents on the CPU, `batch_size` at a time.
///
/// # Errors
///
/// What the autoencoder refuses.
pub fn decode(text: &TextToImageComponents, latents: &Tensor, batch_size: u32) -> Result<Tensor> {
    let batches = latents.f_split(i64::from(batch_size.max(1)), 0);
    let pictures = batches.map_err(Error::torch("decode"))?;
    let pictures = pictures.iter().map(|batch| Ok(text.decode(batch)?.to_device(Device::Cpu)));
    Tensor::f_cat(&pictures.collect::<Result<Vec<_>>>()?, 0).map_err(Error::torch("decode"))
}
