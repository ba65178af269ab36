//! Latents from recorded noise, for comparison with another implementation's.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use ddil_core::{Denoiser, Rollout};
use ddil_pipelines::{EncodedRequest, Pipeline, SamplePlan, sampling_denoiser};
use ddil_schedulers::{
    Error, Estimate, NoiseSchedule, Sampler, Scale, StepCoefficients, Timesteps,
};
use tch::Tensor;

use crate::Result;

/// Draws latents with a pipeline's sampler from given noise.
///
/// # Shapes and units
///
/// - `noise`: `[images, channels, height, width]`, unit normal; `fresh`: `[steps, images, ..]`, the noise that each
///   step adds, for samplers that do so
///
/// # Errors
///
/// Errors of the network; a sampler that needs noise at more steps than `fresh` has.
pub fn replay(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    timesteps: &Timesteps,
    request: &EncodedRequest,
    (noise, fresh): (&Tensor, Option<&Tensor>),
) -> Result<Tensor> {
    let inner = plan.sampler.build(pipeline.network.schedule())?;
    let fresh = fresh.map_or_else(VecDeque::new, |fresh| fresh.unbind(0).into());
    let sampler = Replayed { inner, fresh: Mutex::new(fresh) };
    let network = sampling_denoiser(&pipeline.network, plan, &request.guidance)?;
    let rollout = Rollout::new(&*network, &sampler, timesteps).conditioning(&request.conditioning);
    Ok(rollout.sample(noise.shallow_clone())?)
}

/// A sampler whose fresh noise is given in advance.
#[derive(Debug)]
struct Replayed {
    inner: Box<dyn Sampler>,
    /// Noise of the remaining steps.
    fresh: Mutex<VecDeque<Tensor>>,
}

impl Replayed {
    /// The noise of the next step, if the sampler adds any there.
    fn next(&self, timestep: i64, prev_timestep: i64) -> ddil_schedulers::Result<Option<Tensor>> {
        if self.inner.coefficients_at(timestep, prev_timestep)?.noise == 0.0 {
            return Ok(None);
        }
        let next = self.fresh.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let missing = || Error::NoiseMissing { op: "replay", argument: "fresh" };
        next.ok_or_else(missing).map(Some)
    }
}

impl Sampler for Replayed {
    fn coefficients(&self, now: Scale, prev: Scale) -> StepCoefficients {
        self.inner.coefficients(now, prev)
    }

    fn needs_noise(&self) -> bool {
        false
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }

    fn end(&self) -> Scale {
        self.inner.end()
    }

    fn step_at(
        &self,
        x_t: Tensor,
        estimate: &Estimate,
        prev_timestep: i64,
        _: Option<&Tensor>,
    ) -> ddil_schedulers::Result<Tensor> {
        let noise = self.next(estimate.timestep(), prev_timestep)?;
        self.inner.step_at(x_t, estimate, prev_timestep, noise.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use ddil_models::Precision;
    use ddil_models::{Lora, Placement, weights};
    use ddil_pipelines::PipelineClass;
    use ddil_pipelines::{PromptRequest, with_published_timesteps};
    use serde::Deserialize;

    use super::*;

    /// The largest difference, relative to the largest value.
    const MAX_ERROR: f64 = 1e-4;

    #[derive(Deserialize)]
    struct How {
        prompts: Vec<String>,
        steps: u32,
        guidance_scale: f64,
    }

    /// A folder written by `tools/record/record_pipelines.py`, and how to sample from it.
    struct Recorded {
        folder: PathBuf,
        tensors: BTreeMap<String, Tensor>,
        how: How,
    }

    impl Recorded {
        fn read(name: &str) -> Result<Self> {
            let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/pipelines");
            let folder = PathBuf::from(root).join(name);
            let file = folder.join("expected.safetensors");
            let how = serde_json::from_str(&weights::read_metadata(&file)?["how"])?;
            Ok(Self { tensors: weights::read_all(&file)?, folder, how })
        }

        /// Latents and images of a pipeline by the method of `ddil sample`, with its own steps.
        fn drawn(&self, pipeline: &Pipeline) -> Result<[Tensor; 2]> {
            let (noise, fresh) = (&self.tensors["noise"], self.tensors.get("fresh"));
            let text = pipeline.parts.text_to_image(Placement::default())?;
            let side = |dim: usize| (noise.size()[dim] * text.pixels_per_latent()) as u32;
            let request = PromptRequest {
                prompts: self.how.prompts.clone(),
                negative_prompt: None,
                size: [2, 3].map(|dim| Some(side(dim))),
                per_prompt: 1,
            };
            let own = SamplePlan::of(pipeline, Some(self.how.steps));
            let plan = SamplePlan { guidance_scale: self.how.guidance_scale, ..own };
            let plan = with_published_timesteps(pipeline, plan)?;
            let request = request.encode(pipeline, &text, &plan)?;
            assert_eq!(request.truncated.len(), 1, "the second prompt is too long");
            let num_train_timesteps = pipeline.network.schedule().num_train_timesteps();
            let timesteps = plan.timesteps(num_train_timesteps as u32)?;
            let latents = replay(pipeline, &plan, &timesteps, &request, (noise, fresh))?;
            let images = text.decode(&latents)?;
            Ok([latents, images])
        }

        #[track_caller]
        fn compare(&self, kind: &str, found: &[Tensor; 2]) {
            for (name, found) in ["latent", "image"].iter().zip(found) {
                let expected = &self.tensors[&format!("{kind}.{name}")];
                let error = (found - expected).abs().max() / expected.abs().max();
                let error = error.double_value(&[]);
                assert!(error < MAX_ERROR, "{}: {kind}.{name}: {error:e}", self.folder.display());
            }
        }
    }

    /// With an adapter, both applied separately and merged into the weights.
    fn are_those_of_diffusers(name: &str, class: PipelineClass) -> Result<()> {
        tch::set_num_threads(1);
        let recorded = Recorded::read(name)?;
        let pipeline = Pipeline::open(&recorded.folder, Placement::default(), Precision::Float32)?;
        assert_eq!(pipeline.parts.class(), class);
        recorded.compare("plain", &recorded.drawn(&pipeline)?);
        let file = recorded.folder.join("lora/pytorch_lora_weights.safetensors");
        let mut lora = Lora::from_file(pipeline.network.parameters(), file)?;
        recorded.compare("apart", &recorded.drawn(&pipeline)?);
        lora.merge()?;
        recorded.compare("merged", &recorded.drawn(&pipeline)?);
        lora.unmerge()?;
        lora.set_scale(0.0)?;
        recorded.compare("plain", &recorded.drawn(&pipeline)?);
        Ok(())
    }

    /// Two text encoders with a pooled output, sizes and crops, zeros without a prompt, DDIM, guidance.
    #[test]
    fn images_of_stable_diffusion_xl_match_diffusers() -> Result<()> {
        are_those_of_diffusers("sdxl", PipelineClass::StableDiffusionXl)
    }

    /// A network conditioned on the guidance scale, and fresh noise at each step.
    #[test]
    fn images_of_a_latent_consistency_model_match_diffusers() -> Result<()> {
        are_those_of_diffusers("lcm", PipelineClass::LatentConsistency)
    }
}
