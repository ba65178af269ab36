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
use crate::guidance::Guide;
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

/// How samples stand in a grid, and what stands beside its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrangement {
    /// Images per row.
    pub columns: u32,
    /// Which sample stands in each place, row by row; none leaves the place white.
    pub places: Vec<Option<u32>>,
    /// The class of each row, at the first row of each class; empty where rows are not of one class.
    pub row_classes: Vec<Option<u32>>,
}

impl Arrangement {
    /// For `n` samples, classes taking turns: as near to a square as whole rows of one class allow, and without regard to
    /// classes where they do not.
    pub fn of(n: u32, num_classes: u32) -> Self {
        let square = f64::from(n).sqrt().ceil().max(1.0) as u32;
        let per_class = n.div_ceil(num_classes.max(1));
        let columns = square.min(per_class).max(1);
        let rows_per_class = per_class.div_ceil(columns);
        let rows = rows_per_class.saturating_mul(num_classes);
        if num_classes < 2 || n < num_classes || rows > 4 * columns {
            return Self {
                columns: square,
                places: (0..n).map(Some).collect(),
                row_classes: Vec::new(),
            };
        }
        let place = |row: u32, column: u32| {
            let (class, within) = (row / rows_per_class, row % rows_per_class * columns + column);
            Some(class + within * num_classes).filter(|at| within < per_class && *at < n)
        };
        let places = |row| (0..columns).map(move |column| place(row, column));
        let class = |row: u32| Some(row / rows_per_class).filter(|_| row % rows_per_class == 0);
        Self {
            columns,
            places: (0..rows).flat_map(places).collect(),
            row_classes: (0..rows).map(class).collect(),
        }
    }

    /// The grid of samples in this order, `[n, channels, height, width]`, with the names of classes beside their rows.
    ///
    /// # Errors
    ///
    /// As [`Picture::grid`].
    pub fn draw(&self, samples: &Tensor, class_names: &[String]) -> Result<Picture> {
        let samples = samples.to_device(Device::Cpu);
        let n = samples.size()[0];
        let order: Vec<i64> = self.places.iter().map(|at| at.map_or(n, i64::from)).collect();
        let arranged = || {
            let white = samples.f_narrow(0, 0, 1)?.f_ones_like()?;
            Tensor::f_cat(&[&samples, &white], 0)?.f_index_select(0, &Tensor::from_slice(&order))
        };
        let arranged = arranged().map_err(Error::torch("Arrangement::draw"))?;
        let layout = layout(self.columns);
        let grid = Picture::grid(&arranged, layout)?;
        if self.row_classes.is_empty() {
            return Ok(grid);
        }
        let name = |class: &Option<u32>| {
            class.and_then(|class| class_names.get(class as usize).cloned()).unwrap_or_default()
        };
        let names: Vec<String> = self.row_classes.iter().map(name).collect();
        grid.with_row_names(&names, samples.size()[2] as u32, layout)
    }
}

/// A grid with `per_class` samples of each class, rows of one class with its name; without classes, of eight times as many.
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
    const WITHOUT_CLASSES: u32 = 8;
    let num_classes = card.class_names.len() as u32;
    let n = per_class.max(1) * if num_classes == 0 { WITHOUT_CLASSES } else { num_classes };
    let noise = initial_noise(plan.seed, n, shape, device)?;
    let (guide, conditioning) = (Guide::of_classes(card), classes(card, n, None, device));
    let samples = generate(denoiser, plan, &guide, &noise, &conditioning)?;
    Arrangement::of(n, num_classes).draw(&samples, &card.class_names)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_classes_fill_near_square_grids_and_each_class_is_whole() {
        // Eight of each of three classes: as many as asked for, in rows of one class.
        let grid = Arrangement::of(24, 3);
        assert_eq!((grid.columns, grid.places.len()), (5, 30));
        assert_eq!(grid.row_classes, [Some(0), None, Some(1), None, Some(2), None]);
        let of_row = |row: usize| grid.places[row * 5..][..5].iter().flatten().map(|at| at % 3);
        assert!((0..6).all(|row| of_row(row).all(|class| class as usize == row / 2)));
        let mut drawn: Vec<u32> = grid.places.iter().flatten().copied().collect();
        drawn.sort_unstable();
        assert_eq!(drawn, (0..24).collect::<Vec<_>>());

        let grid = Arrangement::of(200, 3);
        assert_eq!((grid.columns, grid.row_classes.len()), (15, 15));
        let grid = Arrangement::of(64, 10);
        assert_eq!((grid.columns, grid.row_classes.len()), (7, 10));
    }

    #[test]
    fn classes_that_are_too_many_for_rows_of_their_own_share_a_square() {
        for (n, num_classes) in [(64, 1000), (200, 100), (10, 10), (64, 0), (9, 1)] {
            let grid = Arrangement::of(n, num_classes);
            let square = f64::from(n).sqrt().ceil() as u32;
            assert_eq!((grid.columns, grid.row_classes.len()), (square, 0), "{n}, {num_classes}");
            assert_eq!(grid.places.len() as u32, n);
        }
    }
}
