use ddil_pipelines::{
    Guidance, Pipeline, SamplePlan, TextToImageComponents, generate, initial_noise,
};
use tch::{Device, Tensor};

use crate::Result;

/// How images of prompts are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Number of steps; the model's own by default.
    pub steps: Option<u32>,
    /// Guidance scale; the model's own by default, which for a teacher is 1, no guidance.
    pub guidance_scale: Option<f64>,
    /// Seed of the noise.
    pub seed: u64,
}

/// Images and the noise they were drawn from.
#[derive(Debug)]
pub struct Drawn {
    /// `[prompts, channels, height, width]`, unit normal.
    pub noise: Tensor,
    /// `[prompts, 3, height, width]`, about `[-1, 1]`.
    pub images: Tensor,
    /// How they were drawn.
    pub plan: SamplePlan,
}

/// Draws an image of every prompt with the model's own sampler: a teacher with DDIM, a student as it was
/// distilled.
///
/// # Errors
///
/// A prompt that is too long; errors of the networks.
pub fn draw(
    pipeline: &Pipeline,
    parts: &TextToImageComponents,
    prompts: &[&str],
    sampling: Sampling,
) -> Result<Drawn> {
    let encoded = parts.encode(prompts)?;
    if let Some(cut) = encoded.truncated.iter().flatten().next() {
        return Err(format!("a prompt is too long: {cut:?} would be cut off").into());
    }
    let own = SamplePlan::of(pipeline, sampling.steps);
    let guidance_scale = sampling.guidance_scale.unwrap_or(own.guidance_scale);
    let plan = SamplePlan { guidance_scale, seed: sampling.seed, ..own };
    let guidance = Guidance::of_prompts(&pipeline.card, parts.empty()?);
    let shape = pipeline.card.image_shape;
    let noise = initial_noise(plan.seed, prompts.len() as u32, shape, Device::Cpu)?;

    let _no_grad = tch::no_grad_guard();
    let latents = generate(&pipeline.network, &plan, &guidance, &noise, &encoded.conditioning)?;
    Ok(Drawn { noise, images: parts.decode(&latents)?, plan })
}
