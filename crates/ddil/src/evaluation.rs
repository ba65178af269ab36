//! Generated images against real ones, on features.

use std::ops::Range;

use ddil_core::{
    Conditioning, Data, Denoiser, RandomStreams, ShiftConfig, ShiftRequest, Stream, measure_shift,
};
use ddil_data::ImageDataset;
use ddil_metrics::{
    FeatureExtractor, Neighbours, Prdc, Statistics, frechet_distance, prdc, quantize,
};
use ddil_pipelines::{
    Guidance, Pipeline, SamplePlan, WithCallback, class_conditioning, generate, initial_noise,
    sampling_denoiser,
};
use ddil_trainer::Result;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// Real images as features: what generated ones are compared with.
#[derive(Debug)]
pub struct Reference {
    /// The dataset and which part of it.
    pub name: String,
    features: Tensor,
    statistics: Statistics,
}

/// How a set of images compares with a [`Reference`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// How many images were compared.
    pub samples: u64,
    /// Fréchet distance.
    pub frechet: f64,
    /// Precision, recall, density and coverage.
    pub prdc: Prdc,
}

/// The covariate shift at one timestep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShiftRow {
    /// The timestep.
    pub timestep: i64,
    /// Energy distance between the states of training and those met at inference.
    pub energy: f64,
    /// The same between two halves of the forward states: what chance alone gives.
    pub null: f64,
}

impl Reference {
    /// Takes in real images, `[n, channels, height, width]` in `[-1, 1]`.
    ///
    /// # Errors
    ///
    /// What the extractor and the metrics refuse: wrong shapes, fewer than two images.
    pub fn new(
        name: impl Into<String>,
        images: &Tensor,
        extractor: &dyn FeatureExtractor,
    ) -> Result<Self> {
        let features = features(images, extractor)?;
        let statistics = Statistics::from_features(&features)?;
        Ok(Self { name: name.into(), features, statistics })
    }

    /// Compares images, generated or held out, with the real ones.
    ///
    /// They are rounded to 8 bits first, as a PNG would. Precision, recall, density and coverage are counted against
    /// as many real images as there are others, the first ones, since all four depend on both numbers; the Fréchet
    /// distance takes all real images.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn score(&self, images: &Tensor, extractor: &dyn FeatureExtractor) -> Result<Scores> {
        let features = features(&quantize(images)?, extractor)?;
        let statistics = Statistics::from_features(&features)?;
        let real = self.features.narrow(0, 0, self.features.size()[0].min(features.size()[0]));
        Ok(Scores {
            samples: statistics.num_samples(),
            frechet: frechet_distance(&self.statistics, &statistics)?,
            prdc: prdc(&real, &features, Neighbours::default())?,
        })
    }
}

/// The samples `range` of the `total` that belong to a plan's seed, on the CPU; classes take turns.
///
/// They start from the same noise whichever of them are asked for.
///
/// # Errors
///
/// What the network refuses.
pub fn draw(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    total: u32,
    range: Range<u32>,
) -> Result<Tensor> {
    draw_observed(pipeline, plan, total, range, None, &|| {})
}

/// As [`draw`], of one class alone where one is given; `on_call` is called after each call of the network.
///
/// # Errors
///
/// As [`draw`].
pub fn draw_observed(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    total: u32,
    range: Range<u32>,
    class: Option<i64>,
    on_call: &dyn Fn(),
) -> Result<Tensor> {
    let device = pipeline.network.placement().device;
    let noise = initial_noise(plan.seed, total, pipeline.card.image_shape, device)?;
    let rows =
        Tensor::arange_start(i64::from(range.start), i64::from(range.end), (Kind::Int64, device));
    let conditioning =
        class_conditioning(&pipeline.card, total, class, device).index_select(&rows)?;
    let noise = noise.index_select(0, &rows);
    // A sampler that draws noise on its way draws other noise for other parts.
    let seed = match range.start {
        0 => plan.seed,
        start => RandomStreams::new(plan.seed, 0).seed_of(u64::from(start), Stream::Sample),
    };
    let plan = SamplePlan { seed, ..plan.clone() };
    let guidance = Guidance::of_classes(&pipeline.card);
    let network = WithCallback::new(&pipeline.network, on_call);
    let images = generate(&network, &plan, &guidance, &noise, &conditioning)?;
    Ok(images.to_device(Device::Cpu))
}

/// How far the states that a student meets are from noised data, at each of its timesteps.
///
/// `states` images stand for training at each timestep, as many others for chance; fewer where the dataset has fewer.
///
/// # Errors
///
/// What the network refuses, and fewer than four images.
pub fn shift(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    images: &ImageDataset,
    states: u32,
) -> Result<Vec<ShiftRow>> {
    let device = pipeline.network.placement().device;
    let batch = images.range(0, 2 * i64::from(states))?;
    let labels = batch.labels.filter(|_| pipeline.network.is_class_conditional());
    let conditioning = labels.map_or_else(Conditioning::none, Conditioning::class_labels);
    let data = Data { x0: batch.x0, conditioning }.to_device(device)?;
    let guidance = Guidance::of_classes(&pipeline.card);
    let student = sampling_denoiser(&pipeline.network, plan, &guidance)?;
    let schedule = pipeline.network.schedule().clone();
    let timesteps = plan.timesteps(schedule.num_train_timesteps() as u32)?;
    let request = ShiftRequest {
        data: &data,
        student: &*student,
        sampler: &*plan.sampler.build(&schedule)?,
        timesteps: &timesteps,
        step: 0,
        streams: &RandomStreams::new(plan.seed, 0),
    };
    let report = measure_shift(&request, &ShiftConfig::default())?;
    let rows = report.timesteps.iter().map(|at| ShiftRow {
        timestep: at.timestep,
        energy: at.shift.energy,
        null: at.null.energy,
    });
    Ok(rows.collect())
}

/// Features in batches, so that memory does not grow with the number of images.
fn features(images: &Tensor, extractor: &dyn FeatureExtractor) -> Result<Tensor> {
    const BATCH: i64 = 250;
    let _no_grad = tch::no_grad_guard();
    let batches: Result<Vec<Tensor>> = images
        .split(BATCH, 0)
        .iter()
        .map(|batch| Ok(extractor.features(batch)?.to_kind(Kind::Float)))
        .collect();
    Ok(Tensor::cat(&batches?, 0))
}
