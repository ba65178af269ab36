//! Sampling of a pipeline; deterministic for each seed.

use ddil_core::{
    Conditioning, Denoiser, RandomStreams, Rollout, SolverRollout, Stream, Thresholded,
    with_boundary,
};
use ddil_files::Invalid;
use ddil_libtorch::{Generator, ensure_dense, ensure_real};
use ddil_schedulers::{
    Estimate, NoiseLevel, NoiseLevels, NoiseSchedule, Prediction, PreviousTimestep, Sampler,
    SamplerConfig, Solver, SolverConfig, Thresholding, Timesteps,
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::guidance::Guidance;
use crate::image::{Image, Layout};
use crate::pipeline::{Card, Pipeline};

/// The settings of sampling.
///
/// # Example
///
/// ```
/// use ddil_models::Placement;
/// use ddil_pipelines::{
///     Guidance, Pipeline, Precision, SamplePlan, class_conditioning, generate, initial_noise,
/// };
/// use tch::Device;
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher"));
/// let model = Pipeline::open(path, Placement::default(), Precision::Float32)?;
/// let plan = SamplePlan { seed: 3, ..SamplePlan::of(&model, Some(2)) };
///
/// let noise = initial_noise(plan.seed, 4, model.card.image_shape, Device::Cpu)?;
/// let classes = class_conditioning(&model.card, 4, None, Device::Cpu);
/// let guidance = Guidance::of_classes(&model.card);
/// let images = generate(&model.network, &plan, &guidance, &noise, &classes)?;
/// assert_eq!(images.size(), [4, 1, 32, 32]);
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplePlan {
    /// Number of steps; ignored if `timesteps` is set.
    pub steps: u32,
    /// Guidance scale; 1 is no guidance.
    pub guidance_scale: f64,
    /// The sampler.
    pub sampler: SamplerConfig,
    /// A multistep solver instead of the sampler, for a teacher; default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solver: Option<SolverConfig>,
    /// Thresholding of predicted clean data.
    pub thresholding: Thresholding,
    /// Explicit timesteps, noisiest first, such as those a student was trained at; `None` takes `steps` timesteps of
    /// the sampler.
    pub timesteps: Option<Vec<i64>>,
    /// The end of each step on these timesteps: default the next one. diffusers' `DDIMScheduler` has another rule.
    #[serde(default, skip_serializing_if = "is_next_in_grid")]
    pub previous: PreviousTimestep,
    /// Samples per call of the network; changes the samples only by rounding.
    pub batch_size: u32,
    /// Seed of the noise.
    pub seed: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_next_in_grid(rule: &PreviousTimestep) -> bool {
    *rule == PreviousTimestep::NextInGrid
}

/// Default numbers of steps for models that do not specify any.
const TEACHER_STEPS: u32 = 50;
const STUDENT_STEPS: u32 = 4;

/// Default batch sizes for pixel-space and latent models.
const PIXEL_BATCH_SIZE: u32 = 100;
const LATENT_BATCH_SIZE: u32 = 1;

impl SamplePlan {
    /// The default settings of a model: a student at the timesteps it was trained at, unless `steps` is another number;
    /// a teacher in 50 steps; a consistency model without its own timesteps in 4 steps; a model of fewer timesteps in all of
    /// them.
    ///
    /// Timesteps of the sampler begin at the noisiest one. For the timesteps in the scheduler file of a text-to-image
    /// model, see [`with_published_timesteps`](crate::with_published_timesteps).
    pub fn of(pipeline: &Pipeline, steps: Option<u32>) -> Self {
        let own = pipeline.timesteps.clone();
        let timesteps = own.filter(|own| steps.is_none_or(|steps| own.len() == steps as usize));
        let most = pipeline.network.schedule().num_train_timesteps() as u32;
        let steps = match (&timesteps, pipeline.sampler) {
            (Some(own), _) => own.len() as u32,
            (None, SamplerConfig::Ddim { .. }) => steps.unwrap_or(TEACHER_STEPS.min(most)),
            (None, SamplerConfig::Lcm { .. }) => steps.unwrap_or(STUDENT_STEPS.min(most)),
        };
        let is_latent = pipeline.parts.class().is_text_to_image();
        Self {
            steps,
            guidance_scale: pipeline.default_guidance_scale(),
            sampler: pipeline.sampler,
            solver: None,
            thresholding: pipeline.thresholding.clone(),
            timesteps,
            previous: PreviousTimestep::NextInGrid,
            batch_size: if is_latent { LATENT_BATCH_SIZE } else { PIXEL_BATCH_SIZE },
            seed: 0,
        }
    }

    /// The number of network calls for `n` samples.
    pub fn num_calls(&self, n: u32) -> u64 {
        let batches = u64::from(n.div_ceil(self.batch_size.max(1)));
        batches * self.timesteps.as_ref().map_or(u64::from(self.steps), |own| own.len() as u64)
    }

    /// The timesteps of the sampler; a solver has [`levels`](Self::levels).
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] for invalid timesteps or an invalid number of steps.
    pub fn timesteps(&self, num_train_timesteps: u32) -> Result<Timesteps> {
        match &self.timesteps {
            Some(list) => Ok(Timesteps::explicit(list.clone(), num_train_timesteps)?
                .with_previous(self.previous, num_train_timesteps)),
            None => Ok(self.sampler.timesteps(num_train_timesteps, self.steps)?),
        }
    }

    /// The noise levels of a solver: those of `timesteps`, if these are set.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] for invalid timesteps or an invalid number of steps.
    pub fn levels(&self, solver: &SolverConfig, schedule: &NoiseSchedule) -> Result<NoiseLevels> {
        if self.timesteps.is_none() {
            return Ok(solver.levels(schedule, self.steps)?);
        }
        let timesteps = self.timesteps(schedule.num_train_timesteps() as u32)?;
        Ok(NoiseLevels::of_timesteps(schedule, &timesteps)?)
    }

    /// How a batch gets from noise to samples.
    fn path(&self, schedule: &NoiseSchedule) -> Result<Path> {
        if let Some(config) = &self.solver {
            if self.sampler.boundary().is_some() {
                let expected = "left out: a latent consistency model has its own sampler";
                return Err(Invalid::new("solver", "set", expected).into());
            }
            return Ok(Path::Levels(config.build()?, self.levels(config, schedule)?));
        }
        let timesteps = self.timesteps(schedule.num_train_timesteps() as u32)?;
        Ok(Path::Timesteps(self.sampler.build(schedule)?, timesteps))
    }
}

/// A sampler on timesteps, or a solver on noise levels.
enum Path {
    Timesteps(Box<dyn Sampler>, Timesteps),
    Levels(Box<dyn Solver>, NoiseLevels),
}

impl Path {
    fn needs_noise(&self) -> bool {
        matches!(self, Self::Timesteps(sampler, _) if sampler.needs_noise())
    }

    /// The samples of a batch, with one generator per row if the sampler adds noise.
    fn sample(
        &self,
        network: &dyn Denoiser,
        conditioning: &Conditioning,
        generators: &mut [Generator],
        noise: Tensor,
    ) -> Result<Tensor> {
        Ok(match self {
            Self::Timesteps(sampler, timesteps) => Rollout::new(network, &**sampler, timesteps)
                .conditioning(conditioning)
                .generators(generators)
                .sample(noise),
            Self::Levels(solver, levels) => SolverRollout::new(network, &**solver, levels)
                .conditioning(conditioning)
                .sample(noise),
        }?)
    }
}

/// The initial noise of `n` samples for a seed, `[n, channels, height, width]`: the same for every model.
///
/// # Errors
///
/// [`Error::Torch`] if memory runs out.
pub fn initial_noise(seed: u64, n: u32, shape: [i64; 3], device: Device) -> Result<Tensor> {
    let [channels, height, width] = shape;
    let mut generator = RandomStreams::new(seed, 0).generator(0, Stream::Sample, Device::Cpu)?;
    // Drawn on the CPU, so that it is equal on every device.
    let noise = generator.normal([i64::from(n), channels, height, width], Kind::Float)?;
    noise.f_to_device(device).map_err(Error::torch("initial_noise"))
}

/// The conditioning of `n` samples: classes `0, 1, .., 0, 1, ..`, or `only` for all; empty for a model without classes.
pub fn class_conditioning(card: &Card, n: u32, only: Option<i64>, device: Device) -> Conditioning {
    let num_classes = card.class_names.len() as i64;
    if num_classes == 0 {
        return Conditioning::none();
    }
    let labels: Vec<i64> = (0..i64::from(n)).map(|i| only.unwrap_or(i % num_classes)).collect();
    Conditioning::class_labels(Tensor::from_slice(&labels).to_device(device))
}

/// Generates one sample for each row of `noise`.
///
/// # Shapes and units
///
/// - `noise`: `[n, channels, height, width]`, standard normal; `conditioning`: parts with `n` rows
/// - returns: `[n, channels, height, width]`, on the scale of the data
///
/// # Errors
///
/// As [`sampling_denoiser`]; [`Error::Invalid`] for zero samples and for a solver with a latent consistency model, [`Error::Argument`] for noise that is not
/// floating-point; otherwise the error of the network.
pub fn generate(
    denoiser: &dyn Denoiser,
    plan: &SamplePlan,
    guidance: &Guidance,
    noise: &Tensor,
    conditioning: &Conditioning,
) -> Result<Tensor> {
    generate_from(denoiser, plan, guidance, noise, conditioning, 0)
}

/// A part of the samples of [`generate`], which begins at sample `first`: the same samples as in the whole.
///
/// `noise` and `conditioning` are those of the part alone. Rounding is the same too if `first` is a multiple of the
/// plan's batch size.
///
/// # Shapes and units
///
/// As [`generate`].
///
/// # Errors
///
/// As [`generate`].
pub fn generate_from(
    denoiser: &dyn Denoiser,
    plan: &SamplePlan,
    guidance: &Guidance,
    noise: &Tensor,
    conditioning: &Conditioning,
    first: u64,
) -> Result<Tensor> {
    let streams = RandomStreams::new(plan.seed, 0);
    let generator = |row: i64| {
        let sample = first.saturating_add(row as u64);
        streams.generator(sample.saturating_add(1), Stream::Sample, Device::Cpu)
    };
    generate_with(denoiser, plan, guidance, noise, conditioning, &generator)
}

/// As [`generate`], with the source of the noise that a sampler adds to each row.
pub(crate) fn generate_with(
    denoiser: &dyn Denoiser,
    plan: &SamplePlan,
    guidance: &Guidance,
    noise: &Tensor,
    conditioning: &Conditioning,
    generator: &dyn Fn(i64) -> ddil_core::Result<Generator>,
) -> Result<Tensor> {
    let path = plan.path(denoiser.schedule())?;
    let network = sampling_denoiser(denoiser, plan, guidance)?;
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
        // One generator per sample, on the CPU: samples depend neither on the batch size nor on the device.
        let drawn_rows = if path.needs_noise() { start..start + len } else { 0..0 };
        let mut generators = drawn_rows.map(generator).collect::<ddil_core::Result<Vec<_>>>()?;
        let conditioning = conditioning.index_select(&rows)?;
        let noise = noise.narrow(0, start, len);
        samples.push(path.sample(&*network, &conditioning, &mut generators, noise)?);
    }
    Tensor::f_cat(&samples, 0).map_err(Error::torch("generate"))
}

/// The denoiser used for sampling: with guidance, then thresholding, then the boundary condition of the sampler.
///
/// # Errors
///
/// [`Error::Invalid`] for guidance of a model without a null class, and for a guidance scale outside of the trained
/// range of a network with a guidance embedding; [`Error::Core`] for invalid thresholding.
pub fn sampling_denoiser<'a>(
    denoiser: &'a dyn Denoiser,
    plan: &SamplePlan,
    guidance: &Guidance,
) -> Result<Box<dyn Denoiser + 'a>> {
    let guided = guidance.guided(denoiser, plan.guidance_scale)?;
    let thresholded = Thresholded::new(guided, plan.thresholding.clone())?;
    Ok(with_boundary(thresholded, &plan.sampler))
}

/// A denoiser that runs a callback after each call, to show progress.
///
/// # Example
///
/// ```
/// use std::cell::Cell;
///
/// use ddil_models::Placement;
/// use ddil_pipelines::{
///     Guidance, Pipeline, Precision, SamplePlan, WithCallback, generate, initial_noise,
/// };
/// use tch::Device;
///
/// # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher"));
/// let model = Pipeline::open(path, Placement::default(), Precision::Float32)?;
/// let calls = Cell::new(0);
/// let count = || calls.set(calls.get() + 1);
/// let network = WithCallback::new(&model.network, &count);
///
/// let plan = SamplePlan::of(&model, Some(2));
/// let noise = initial_noise(0, 1, [1, 32, 32], Device::Cpu)?;
/// let classes = ddil_pipelines::class_conditioning(&model.card, 1, None, Device::Cpu);
/// generate(&network, &plan, &Guidance::default(), &noise, &classes)?;
/// assert_eq!(calls.get(), 2);
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
pub struct WithCallback<'a> {
    inner: &'a dyn Denoiser,
    on_call: &'a dyn Fn(),
}

impl<'a> WithCallback<'a> {
    /// Wraps `inner`; `on_call` runs after each of its calls.
    pub fn new(inner: &'a dyn Denoiser, on_call: &'a dyn Fn()) -> Self {
        Self { inner, on_call }
    }
}

impl Denoiser for WithCallback<'_> {
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
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Estimate> {
        let estimate = self.inner.estimate(x_t, level, conditioning);
        (self.on_call)();
        estimate
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}

/// The layout of samples in a grid, with rows of one class each and the names of the classes.
///
/// # Example
///
/// ```
/// use ddil_pipelines::SampleGrid;
///
/// // Six samples of the classes 0, 1, 0, 1, ..: one row per class.
/// let grid = SampleGrid::of(6, 2);
/// assert_eq!(grid.columns, 3);
/// assert_eq!(grid.cells, [0, 2, 4, 1, 3, 5].map(Some));
/// assert_eq!(grid.row_classes, [Some(0), Some(1)]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleGrid {
    /// Images per row.
    pub columns: u32,
    /// The index of the sample in each cell, row by row; `None` for a white cell.
    pub cells: Vec<Option<u32>>,
    /// The class of each row, `None` except in the first row of a class; empty if rows contain several classes.
    pub row_classes: Vec<Option<u32>>,
}

impl SampleGrid {
    /// The grid of `n` samples whose classes are `0, 1, .., 0, 1, ..`: as square as possible with rows of one class
    /// each. If there are too many classes for this, a square grid without regard to classes.
    pub fn of(n: u32, num_classes: u32) -> Self {
        let square = f64::from(n).sqrt().ceil().max(1.0) as u32;
        let per_class = n.div_ceil(num_classes.max(1));
        let columns = square.min(per_class).max(1);
        let rows_per_class = per_class.div_ceil(columns);
        let rows = rows_per_class.saturating_mul(num_classes);
        if num_classes < 2 || n < num_classes || rows > 4 * columns {
            return Self {
                columns: square,
                cells: (0..n).map(Some).collect(),
                row_classes: Vec::new(),
            };
        }
        let cell = |row: u32, column: u32| {
            let (class, within) = (row / rows_per_class, row % rows_per_class * columns + column);
            Some(class + within * num_classes).filter(|at| within < per_class && *at < n)
        };
        let cells = |row| (0..columns).map(move |column| cell(row, column));
        let class =
            |row: u32| Some(row / rows_per_class).filter(|_| row.is_multiple_of(rows_per_class));
        Self {
            columns,
            cells: (0..rows).flat_map(cells).collect(),
            row_classes: (0..rows).map(class).collect(),
        }
    }

    /// Draws the grid of samples `[n, channels, height, width]`, with the names of classes to the left of their rows.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for an undefined or sparse tensor, [`Error::Torch`] for a cell without a sample; otherwise as
    /// [`Image::grid`].
    pub fn draw(&self, samples: &Tensor, class_names: &[String]) -> Result<Image> {
        ensure_dense("SampleGrid::draw", "samples", samples)?;
        let torch = Error::torch("SampleGrid::draw");
        let samples = samples.f_to_device(Device::Cpu).map_err(&torch)?;
        let n = samples.size().first().copied().unwrap_or(0);
        let order: Vec<i64> = self.cells.iter().map(|at| at.map_or(n, i64::from)).collect();
        let arranged = || {
            let white = samples.f_narrow(0, 0, 1)?.f_ones_like()?;
            Tensor::f_cat(&[&samples, &white], 0)?.f_index_select(0, &Tensor::from_slice(&order))
        };
        let arranged = arranged().map_err(&torch)?;
        let layout = layout(self.columns);
        let grid = Image::grid(&arranged, layout)?;
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

/// A grid of `per_class` samples of each class, with rows of one class each and its name; without classes, of
/// `8 * per_class` samples: [`num_samples_of_grid`] in all.
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
) -> Result<Image> {
    let num_classes = card.class_names.len() as u32;
    let n = num_samples_of_grid(card, per_class);
    let noise = initial_noise(plan.seed, n, shape, device)?;
    let guidance = Guidance::of_classes(card);
    let conditioning = class_conditioning(card, n, None, device);
    let samples = generate(denoiser, plan, &guidance, &noise, &conditioning)?;
    SampleGrid::of(n, num_classes).draw(&samples, &card.class_names)
}

/// The number of samples that [`grid_of_classes`] draws; `per_class` counts as at least 1.
///
/// # Example
///
/// ```
/// use ddil_pipelines::{Card, num_samples_of_grid};
///
/// let mut card = Card::default();
/// assert_eq!(num_samples_of_grid(&card, 2), 16);
/// card.class_names = ["bag", "coat", "shoe"].map(str::to_owned).to_vec();
/// assert_eq!(num_samples_of_grid(&card, 2), 6);
/// ```
pub fn num_samples_of_grid(card: &Card, per_class: u32) -> u32 {
    const WITHOUT_CLASSES: u32 = 8;
    let rows = match card.class_names.len() as u32 {
        0 => WITHOUT_CLASSES,
        classes => classes,
    };
    rows.saturating_mul(per_class.max(1))
}

/// A grid of `per_prompt` decoded samples of each prompt, one column per prompt and at most eight columns.
///
/// # Shapes and units
///
/// - `prompts`: one row per prompt; `shape`: that of a latent; `decode`: latents `[n, ..shape]` to images
///
/// # Errors
///
/// As [`generate`], and the errors of `decode`.
pub fn grid_of_prompts(
    denoiser: &dyn Denoiser,
    plan: &SamplePlan,
    guidance: &Guidance,
    prompts: &Conditioning,
    per_prompt: u32,
    shape: [i64; 3],
    decode: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Image> {
    let rows = prompts.parts().next().map_or(0, |(_, part)| part.size()[0]) as u32;
    let (n, columns) = (rows * per_prompt.max(1), rows.clamp(1, 8));
    let device = prompts.parts().next().map_or(Device::Cpu, |(_, part)| part.device());
    let order: Vec<i64> = (0..n).map(|i| i64::from(i % rows)).collect();
    let noise = initial_noise(plan.seed, n, shape, device)?;
    let conditioning = prompts.index_select(&Tensor::from_slice(&order))?;
    let latents = generate(denoiser, plan, guidance, &noise, &conditioning)?;
    let decoded: Result<Vec<Tensor>> =
        latents.split(1, 0).iter().map(|one| Ok(decode(one)?.to_device(Device::Cpu))).collect();
    let images = Tensor::f_cat(&decoded?, 0).map_err(Error::torch("grid_of_prompts"))?;
    let one = std::num::NonZeroU32::MIN;
    // Large images are not enlarged.
    Image::grid(&images, Layout { scale: one, ..layout(columns) })
}

/// `columns` images per row, enlarged by a factor of two.
pub fn layout(columns: u32) -> Layout {
    let at_least_one = |n: u32| std::num::NonZeroU32::new(n).unwrap_or(std::num::NonZeroU32::MIN);
    Layout { scale: at_least_one(2), ..Layout::columns(at_least_one(columns)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_classes_have_rows_of_their_own_in_a_nearly_square_grid() {
        // Eight samples of each of three classes, in rows of one class each.
        let grid = SampleGrid::of(24, 3);
        assert_eq!((grid.columns, grid.cells.len()), (5, 30));
        assert_eq!(grid.row_classes, [Some(0), None, Some(1), None, Some(2), None]);
        let of_row = |row: usize| grid.cells[row * 5..][..5].iter().flatten().map(|at| at % 3);
        assert!((0..6).all(|row| of_row(row).all(|class| class as usize == row / 2)));
        let mut drawn: Vec<u32> = grid.cells.iter().flatten().copied().collect();
        drawn.sort_unstable();
        assert_eq!(drawn, (0..24).collect::<Vec<_>>());

        let grid = SampleGrid::of(200, 3);
        assert_eq!((grid.columns, grid.row_classes.len()), (15, 15));
        let grid = SampleGrid::of(64, 10);
        assert_eq!((grid.columns, grid.row_classes.len()), (7, 10));
    }

    #[test]
    fn too_many_classes_share_a_square_grid() {
        for (n, num_classes) in [(64, 1000), (200, 100), (10, 10), (64, 0), (9, 1)] {
            let grid = SampleGrid::of(n, num_classes);
            let square = f64::from(n).sqrt().ceil() as u32;
            assert_eq!((grid.columns, grid.row_classes.len()), (square, 0), "{n}, {num_classes}");
            assert_eq!(grid.cells.len() as u32, n);
        }
    }
}
