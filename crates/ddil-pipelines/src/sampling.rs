//! Samples of a model, the same ones for the same seed.

use ddil_core::{
    Conditioning, Denoiser, RandomStreams, Rollout, Stream, Thresholded, with_boundary,
};
use ddil_files::Invalid;
use ddil_libtorch::ensure_real;
use ddil_schedulers::{
    Estimate, NoiseSchedule, Prediction, SamplerConfig, Thresholding, Timesteps,
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::guide::Guide;
use crate::picture::{Layout, Picture};
use crate::pipeline::{Card, Pipeline};

/// How samples are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplePlan {
    /// Number of steps; not read where `timesteps` are given.
    pub steps: u32,
    /// Guidance scale; 1 is none.
    pub guidance_scale: f64,
    /// How the model steps.
    pub sampler: SamplerConfig,
    /// What is done with clean data beyond their range.
    pub thresholding: Thresholding,
    /// The timesteps that a student was trained at, noisiest first; none takes `steps` of the sampler's.
    pub timesteps: Option<Vec<i64>>,
    /// Samples in one call of the network; no part of what comes out but for rounding.
    pub batch_size: u32,
    /// What noise and classes follow from.
    pub seed: u64,
}

/// Steps of a teacher, and of a few-step student, that do not say.
const TEACHER_STEPS: u32 = 50;
const STUDENT_STEPS: u32 = 4;

/// Samples in one call of the network: small pictures, and latents.
const BATCH_OF_PIXELS: u32 = 100;
const BATCH_OF_LATENTS: u32 = 1;

impl SamplePlan {
    /// How a model is sampled in its own way: a student at its own timesteps unless another number of steps is asked
    /// for, a teacher in 50 steps, a consistency model that does not say in 4.
    ///
    /// Text-to-image models take their timesteps where their scheduler's file has them; others go from the noisiest.
    pub fn of(pipeline: &Pipeline, steps: Option<u32>) -> Self {
        let own = pipeline.timesteps.clone();
        let timesteps = own.filter(|own| steps.is_none_or(|steps| own.len() == steps as usize));
        let steps = match (&timesteps, pipeline.sampler) {
            (Some(own), _) => own.len() as u32,
            (None, SamplerConfig::Ddim { .. }) => steps.unwrap_or(TEACHER_STEPS),
            (None, SamplerConfig::Lcm { .. }) => steps.unwrap_or(STUDENT_STEPS),
        };
        let of_latents = pipeline.parts.class().is_text_to_image();
        Self {
            steps,
            guidance_scale: pipeline.default_guidance_scale(),
            sampler: pipeline.sampler,
            thresholding: pipeline.thresholding.clone(),
            timesteps,
            batch_size: if of_latents { BATCH_OF_LATENTS } else { BATCH_OF_PIXELS },
            seed: 0,
        }
    }

    /// Calls of the network that `n` samples take.
    pub fn num_calls(&self, n: u32) -> u64 {
        let batches = u64::from(n.div_ceil(self.batch_size.max(1)));
        batches * self.timesteps.as_ref().map_or(u64::from(self.steps), |own| own.len() as u64)
    }

    /// The timesteps that are visited.
    ///
    /// # Errors
    ///
    /// What [`Timesteps`] refuses.
    pub fn timesteps(&self, num_train_timesteps: u32) -> Result<Timesteps> {
        match &self.timesteps {
            Some(list) => Ok(Timesteps::explicit(list.clone(), num_train_timesteps)?),
            None => Ok(self.sampler.timesteps(num_train_timesteps, self.steps)?),
        }
    }
}

/// The noise that `n` samples of a seed start from, `[n, ..]`: the same for every model.
///
/// # Errors
///
/// What libtorch refuses, such as memory.
pub fn initial_noise(seed: u64, n: u32, shape: [i64; 3], device: Device) -> Result<Tensor> {
    let [channels, height, width] = shape;
    let mut generator = RandomStreams::new(seed, 0).generator(0, Stream::Sample, Device::Cpu)?;
    // Drawn on the CPU, so that every device starts from the same.
    let noise = generator.normal([i64::from(n), channels, height, width], Kind::Float)?;
    noise.f_to_device(device).map_err(Error::torch("initial_noise"))
}

/// Classes `0, 1, .., 0, 1, ..` for `n` samples, or all the same one; nothing for a model without classes.
pub fn classes(card: &Card, n: u32, only: Option<i64>, device: Device) -> Conditioning {
    let num_classes = card.class_names.len() as i64;
    if num_classes == 0 {
        return Conditioning::none();
    }
    let labels: Vec<i64> = (0..i64::from(n)).map(|i| only.unwrap_or(i % num_classes)).collect();
    Conditioning::class_labels(Tensor::from_slice(&labels).to_device(device))
}

/// Draws one sample for each row of `noise`.
///
/// # Shapes and units
///
/// - `noise`: `[n, channels, height, width]`, unit normal; `conditioning`: parts of `n` rows
/// - returns: `[n, channels, height, width]`, data scale
///
/// # Errors
///
/// [`Error::Invalid`] for guidance of a model without a null class and for no samples, [`Error::Argument`] for noise that
/// is not floating; otherwise the error of the network.
pub fn generate(
    denoiser: &dyn Denoiser,
    plan: &SamplePlan,
    guide: &Guide,
    noise: &Tensor,
    conditioning: &Conditioning,
) -> Result<Tensor> {
    let schedule = denoiser.schedule().clone();
    let timesteps = plan.timesteps(schedule.num_train_timesteps() as u32)?;
    let sampler = plan.sampler.build(&schedule)?;
    let asked = asked(denoiser, plan, guide)?;
    let streams = RandomStreams::new(plan.seed, 0);
    ensure_real("generate", "noise", noise)?;
    let n = noise.size().first().copied().unwrap_or(0);
    if n == 0 {
        let expected = "[n, channels, height, width] with at least one sample";
        return Err(Invalid::new("noise", format!("{:?}", noise.size()), expected).into());
    }
    let mut samples = Vec::new();
    for start in (0..n).step_by(plan.batch_size.max(1) as usize) {
        let len = i64::from(plan.batch_size.max(1)).min(n - start);
        let rows = Tensor::arange_start(start, start + len, (Kind::Int64, noise.device()));
        // One a sample and on the CPU: what becomes of it depends neither on the batch nor on the device.
        let drawing = if sampler.needs_noise() { start..start + len } else { 0..0 };
        let generator = |row: i64| streams.generator(1 + row as u64, Stream::Sample, Device::Cpu);
        let mut generators = drawing.map(generator).collect::<ddil_core::Result<Vec<_>>>()?;
        let conditioning = conditioning.index_select(&rows)?;
        let rollout = Rollout::new(&*asked, &*sampler, &timesteps).conditioning(&conditioning);
        samples.push(rollout.generators(&mut generators).sample(noise.narrow(0, start, len))?);
    }
    Tensor::f_cat(&samples, 0).map_err(Error::torch("generate"))
}

/// The model as it is asked for samples: guided, held inside the data's range, with its boundary around it.
///
/// # Errors
///
/// [`Error::Invalid`] for guidance of a model without a null class, for guidance that a network which is told
/// its scale has not learned, and for a threshold that cannot be.
pub fn asked<'a>(
    denoiser: &'a dyn Denoiser,
    plan: &SamplePlan,
    guide: &Guide,
) -> Result<Box<dyn Denoiser + 'a>> {
    let guided = guide.guided(denoiser, plan.guidance_scale)?;
    let held = Thresholded::new(guided, plan.thresholding.clone())?;
    Ok(with_boundary(held, &plan.sampler))
}

/// A network that reports each of its calls, to show how far a sampling is.
pub struct Observed<'a> {
    inner: &'a dyn Denoiser,
    on_call: &'a dyn Fn(),
}

impl<'a> Observed<'a> {
    /// Calls `on_call` after each call of the network.
    pub fn new(inner: &'a dyn Denoiser, on_call: &'a dyn Fn()) -> Self {
        Self { inner, on_call }
    }
}

impl Denoiser for Observed<'_> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let prediction = self.inner.predict(x_t, timesteps, conditioning);
        (self.on_call)();
        prediction
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        timestep: i64,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Estimate> {
        let estimate = self.inner.estimate(x_t, timestep, conditioning);
        (self.on_call)();
        estimate
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}

/// A grid with a column a class and `per_class` rows.
///
/// # Errors
///
/// As [`generate`].
pub fn grid_of_classes(
    denoiser: &dyn Denoiser,
    plan: &SamplePlan,
    card: &Card,
    shape: [i64; 3],
    per_class: u32,
    device: Device,
) -> Result<Picture> {
    let columns = card.class_names.len().max(8) as u32;
    let n = columns * per_class.max(1);
    let noise = initial_noise(plan.seed, n, shape, device)?;
    let (guide, conditioning) = (Guide::of_classes(card), classes(card, n, None, device));
    let samples = generate(denoiser, plan, &guide, &noise, &conditioning)?;
    Picture::grid(&samples.to_device(Device::Cpu), layout(columns))
}

/// A grid with a column a prompt, eight at most, and `per_prompt` samples of each, decoded to pictures.
///
/// # Shapes and units
///
/// - `prompts`: one row a prompt; `shape`: that of latents; `decode`: `[n, ..]` of that shape to pictures
///
/// # Errors
///
/// As [`generate`], and whatever `decode` says.
pub fn grid_of_prompts(
    denoiser: &dyn Denoiser,
    plan: &SamplePlan,
    guide: &Guide,
    prompts: &Conditioning,
    per_prompt: u32,
    shape: [i64; 3],
    decode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Picture> {
    let rows = prompts.parts().next().map_or(0, |(_, part)| part.size()[0]) as u32;
    let (n, columns) = (rows * per_prompt.max(1), rows.clamp(1, 8));
    let device = prompts.parts().next().map_or(Device::Cpu, |(_, part)| part.device());
    let order: Vec<i64> = (0..n).map(|i| i64::from(i % rows)).collect();
    let noise = initial_noise(plan.seed, n, shape, device)?;
    let told = prompts.index_select(&Tensor::from_slice(&order))?;
    let latents = generate(denoiser, plan, guide, &noise, &told)?;
    let decoded: Result<Vec<Tensor>> =
        latents.split(1, 0).iter().map(|one| Ok(decode(one)?.to_device(Device::Cpu))).collect();
    let pictures = Tensor::f_cat(&decoded?, 0).map_err(Error::torch("grid_of_prompts"))?;
    let one = std::num::NonZeroU32::MIN;
    // Pictures of hundreds of pixels need no enlarging.
    Picture::grid(&pictures, Layout { scale: one, ..layout(columns) })
}

/// `columns` images in a row, each pixel twice as large.
pub fn layout(columns: u32) -> Layout {
    let at_least_one = |n: u32| std::num::NonZeroU32::new(n).unwrap_or(std::num::NonZeroU32::MIN);
    Layout { scale: at_least_one(2), ..Layout::columns(at_least_one(columns)) }
}
