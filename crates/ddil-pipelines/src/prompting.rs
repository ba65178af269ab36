//! Images from prompts.

use ddil_core::{Conditioning, RandomStreams, Stream};
use ddil_files::Invalid;
use ddil_schedulers::{PreviousTimestep, SamplerConfig, SchedulerConfig, TimestepSpacing};
use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::guidance::Guidance;
use crate::pipeline::{EncodedPrompts, Pipeline, TextToImageComponents};
use crate::sampling::{SamplePlan, WithCallback, generate, generate_with, initial_noise};

/// A request for images from prompts, for step-by-step sampling; [`TextToImage`](crate::TextToImage) is simpler.
///
/// # Example
///
/// ```
/// use ddil_models::Placement;
/// use ddil_pipelines::{Pipeline, Precision, PromptRequest, SamplePlan, decode, sample_latents};
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-text-to-image"));
/// let model = Pipeline::open(path, Placement::default(), Precision::Float32)?;
/// let components = model.parts.text_to_image(Placement::default())?;
/// let plan = SamplePlan::of(&model, Some(1));
///
/// let request = PromptRequest {
///     prompts: vec!["a sneaker".to_owned()],
///     negative_prompt: None,
///     size: [None; 2],
///     per_prompt: 1,
/// };
/// let encoded = request.encode(&model, &components, &plan)?;
/// let latents = sample_latents(&model, &plan, &encoded, &|| ())?;
/// assert_eq!(decode(&components, &latents, 1)?.size()[0], 1);
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptRequest {
    /// The prompts.
    pub prompts: Vec<String>,
    /// The negative prompt of guidance; `None` uses the model's empty prompt.
    pub negative_prompt: Option<String>,
    /// Height and width in pixels; `None` is the size that the model was trained on.
    pub size: [Option<u32>; 2],
    /// Images per prompt.
    pub per_prompt: u32,
}

/// A [`PromptRequest`] as network input.
#[derive(Debug)]
pub struct EncodedRequest {
    /// One row per image; the images of a prompt are consecutive.
    pub conditioning: Conditioning,
    /// Guidance away from the negative or empty prompt.
    pub guidance: Guidance,
    /// Channels, height and width of the latents.
    pub latent_shape: [i64; 3],
    /// The prompts that were truncated, each with the part that was cut off; the negative prompt is the last.
    pub truncated: Vec<(String, String)>,
    /// Whether the last of them is the negative prompt.
    pub is_negative_truncated: bool,
}

impl PromptRequest {
    /// Height and width in pixels.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if neither the request nor the model specifies a size.
    pub fn pixels(&self, pipeline: &Pipeline, text: &TextToImageComponents) -> Result<[i64; 2]> {
        // The size in the card, not in the network's config: an adapter may have been trained at another size.
        let [_, trained_height, trained_width] = pipeline.card.image_shape;
        let trained = [trained_height, trained_width].map(|side| side * text.pixels_per_latent());
        let mut pixels = [0; 2];
        for (i, side) in pixels.iter_mut().enumerate() {
            let requested = self.size[i].map(i64::from);
            *side = requested.or(Some(trained[i]).filter(|side| *side > 0)).ok_or_else(|| {
                Error::Invalid(Invalid::new(
                    ["height", "width"][i],
                    "not set",
                    "a number of pixels: the config of the network has no sample_size",
                ))
            })?;
        }
        Ok(pixels)
    }

    /// Encodes the prompts.
    ///
    /// Without a negative prompt, guidance uses the model's empty prompt: an encoded empty text, or zeros if the
    /// pipeline is configured so, as Stable Diffusion XL is. A negative prompt, also an empty one, is always encoded.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] without prompts or images, for an invalid size, and for a negative prompt that has no effect:
    /// without guidance, or if the network has a guidance embedding.
    pub fn encode(
        &self,
        pipeline: &Pipeline,
        text: &TextToImageComponents,
        plan: &SamplePlan,
    ) -> Result<EncodedRequest> {
        self.ensure(pipeline, plan)?;
        let size = self.pixels(pipeline, text)?;
        let latent_shape = text.latent_shape(size)?;
        let with_sizes = |conditioning: Conditioning| {
            let rows = conditioning.parts().next().map_or(0, |(_, part)| part.size()[0]);
            conditioning.with_some(Conditioning::TIME_IDS, text.time_ids(size, rows))
        };
        let prompts: Vec<&str> = self.prompts.iter().map(String::as_str).collect();
        let encoded = text.encode(&prompts)?;
        let mut truncated = truncations(&prompts, &encoded);
        let num_prompts = truncated.len();
        let empty = match &self.negative_prompt {
            None => text.empty()?,
            Some(negative) => {
                let encoded = text.encode(&[negative])?;
                truncated.extend(truncations(&[negative], &encoded));
                encoded.conditioning
            }
        };
        let rows: Vec<i64> = (0..prompts.len() as i64)
            .flat_map(|prompt| std::iter::repeat_n(prompt, self.per_prompt as usize))
            .collect();
        let conditioning = encoded.conditioning.index_select(&Tensor::from_slice(&rows))?;
        let guidance = Guidance::of_prompts(&pipeline.card, with_sizes(empty));
        Ok(EncodedRequest {
            conditioning: with_sizes(conditioning),
            guidance,
            latent_shape,
            is_negative_truncated: truncated.len() > num_prompts,
            truncated,
        })
    }

    /// Checks everything that can be checked without encoding: that there are prompts and images, and that a negative
    /// prompt has an effect.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], as [`encode`](Self::encode).
    pub fn ensure(&self, pipeline: &Pipeline, plan: &SamplePlan) -> Result<()> {
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
                let expected = "left out: the network has a guidance embedding and makes no unconditional prediction";
                invalid("negative_prompt", &format!("`{negative}`"), expected)
            }
            (Some(negative), None) if !is_guided => {
                let expected =
                    "left out, or a guidance scale other than 1: without guidance it has no effect";
                invalid("negative_prompt", &format!("`{negative}`"), expected)
            }
            _ => Ok(()),
        }
    }
}

/// The prompts that were truncated, with the part that was cut off.
fn truncations(prompts: &[&str], encoded: &EncodedPrompts) -> Vec<(String, String)> {
    let cut = prompts.iter().zip(&encoded.truncated);
    cut.filter_map(|(prompt, cut)| Some(((*prompt).to_owned(), cut.clone()?))).collect()
}

/// The plan with the timesteps defined by the scheduler file of a text-to-image model, if the plan has neither explicit
/// ones nor a solver, which has its own.
///
/// Those of `DDIMScheduler` are diffusers', with its rule for the end of each step, so that the samples are diffusers'
/// too: linspace and trailing grids are rounded as there, and a step ends `num_train_timesteps / n` lower. Where DDIM
/// replaces another solver, and for one step of linspace, which is timestep 0 in diffusers, steps follow the grid.
///
/// # Errors
///
/// [`Error::Scheduler`] for an invalid number of steps.
pub fn with_published_timesteps(pipeline: &Pipeline, plan: SamplePlan) -> Result<SamplePlan> {
    match (&pipeline.scheduler, plan.sampler) {
        (SchedulerConfig::Ddim(common), SamplerConfig::Ddim { .. })
            if plan.timesteps.is_none() && plan.solver.is_none() =>
        {
            let starts_clean =
                plan.steps == 1 && common.timestep_spacing == TimestepSpacing::Linspace;
            let (timesteps, previous) = if starts_clean || pipeline.replaced_solver().is_some() {
                (pipeline.scheduler.timesteps(Some(plan.steps))?, PreviousTimestep::NextInGrid)
            } else {
                let timesteps = pipeline.scheduler.compatible_timesteps(plan.steps)?;
                (timesteps, PreviousTimestep::Stride)
            };
            Ok(SamplePlan { timesteps: Some(timesteps.as_slice().to_vec()), previous, ..plan })
        }
        _ => Ok(plan),
    }
}

/// The plan with the solver of the scheduler file (Euler, DPM-Solver++, UniPC), if the file has one and the plan neither
/// explicit timesteps nor a solver.
///
/// # Errors
///
/// As [`Pipeline::published_solver`].
pub fn with_published_solver(pipeline: &Pipeline, plan: SamplePlan) -> Result<SamplePlan> {
    if plan.timesteps.is_some() || plan.solver.is_some() || plan.sampler.boundary().is_some() {
        return Ok(plan);
    }
    Ok(SamplePlan { solver: pipeline.published_solver()?, ..plan })
}

/// Generates the latents of a request, `[images, channels, height, width]`; `on_call` runs after each network call.
///
/// Up to rounding, image `i` depends only on the seed, its prompt and `i`.
///
/// # Errors
///
/// As [`generate`].
pub fn sample_latents(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    request: &EncodedRequest,
    on_call: &dyn Fn(),
) -> Result<Tensor> {
    let device = pipeline.network.placement().device;
    let rows = request.conditioning.parts().next().map_or(0, |(_, part)| part.size()[0]);
    let noise = initial_noise(plan.seed, rows as u32, request.latent_shape, device)?;
    let network = WithCallback::new(&pipeline.network, on_call);
    generate(&network, plan, &request.guidance, &noise, &request.conditioning)
}

/// As [`sample_latents`], with one seed per image: image `i` is the first one of a plan with the seed `seeds[i]`, up to
/// rounding, whatever the other images are. So a large set can be drawn in parts.
///
/// # Errors
///
/// As [`generate`]; [`Error::Invalid`] unless there are as many seeds as images.
pub fn sample_latents_seeded(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    request: &EncodedRequest,
    seeds: &[u64],
    on_call: &dyn Fn(),
) -> Result<Tensor> {
    let device = pipeline.network.placement().device;
    let rows = request.conditioning.parts().next().map_or(0, |(_, part)| part.size()[0]);
    if rows != seeds.len() as i64 || seeds.is_empty() {
        let expected = format!("{rows}, one for each image, and at least one");
        return Err(Invalid::new("seeds", format!("{} numbers", seeds.len()), expected).into());
    }
    let noise: Result<Vec<Tensor>> =
        seeds.iter().map(|&seed| initial_noise(seed, 1, request.latent_shape, device)).collect();
    let noise = Tensor::f_cat(&noise?, 0).map_err(Error::torch("sample_latents_seeded"))?;
    let network = WithCallback::new(&pipeline.network, on_call);
    let generator = |row: i64| {
        // As of the first sample of that seed.
        RandomStreams::new(seeds[row as usize], 0).generator(1, Stream::Sample, Device::Cpu)
    };
    generate_with(&network, plan, &request.guidance, &noise, &request.conditioning, &generator)
}

/// Decodes latents to images on the CPU, `batch_size` at a time.
///
/// # Errors
///
/// The errors of the autoencoder.
pub fn decode(text: &TextToImageComponents, latents: &Tensor, batch_size: u32) -> Result<Tensor> {
    let batches = latents.f_split(i64::from(batch_size.max(1)), 0);
    let batches = batches.map_err(Error::torch("decode"))?;
    let images = batches.iter().map(|batch| Ok(text.decode(batch)?.to_device(Device::Cpu)));
    Tensor::f_cat(&images.collect::<Result<Vec<_>>>()?, 0).map_err(Error::torch("decode"))
}
