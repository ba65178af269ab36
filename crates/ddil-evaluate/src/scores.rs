//! Comparison of generated images with real ones, on features.

use std::ops::Range;

use ddil_core::{
    Conditioning, Data, Denoiser, RandomStreams, ShiftConfig, ShiftRequest, Stream, measure_shift,
};
use ddil_data::ImageDataset;
use ddil_metrics::{
    FeatureExtractor, Neighbours, Prdc, Reference, Statistics, frechet_distance, kid, prdc,
    quantize,
};
use ddil_pipelines::{
    Guidance, Pipeline, SamplePlan, WithCallback, class_conditioning, generate, initial_noise,
    sampling_denoiser,
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// The comparison of a set of images with a [`Reference`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// The number of images compared.
    pub samples: u64,
    /// Fréchet distance.
    pub frechet: f64,
    /// The metrics that require the features of the reference.
    pub by_features: Option<FeatureScores>,
}

/// The metrics of a set of images that statistics alone do not determine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FeatureScores {
    /// Kernel distance.
    pub kid: f64,
    /// Precision, recall, density and coverage.
    pub prdc: Prdc,
}

/// The covariate shift at one timestep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShiftRow {
    /// The timestep.
    pub timestep: i64,
    /// Energy distance between the states of training and those visited at inference.
    pub energy: f64,
    /// The same between two halves of the forward states: the value due to chance alone.
    pub null: f64,
}

/// A reference of images, `[n, channels, height, width]` in `[-1, 1]`.
///
/// # Errors
///
/// Errors of the extractor and the metrics: wrong shapes, fewer than two images.
pub fn reference(
    name: impl Into<String>,
    images: &Tensor,
    extractor: &dyn FeatureExtractor,
) -> Result<Reference> {
    Ok(Reference::new(name, &features(images, extractor)?, extractor)?)
}

/// Compares features with those of a reference.
///
/// Precision, recall, density and coverage use as many real images as there are images to compare, the first ones, since
/// all four depend on both numbers; the Fréchet distance and KID use all of them.
///
/// # Errors
///
/// Errors of the metrics: fewer than two images, too few for the neighbours.
pub fn score(reference: &Reference, features: &Tensor) -> ddil_metrics::Result<Scores> {
    let statistics = Statistics::from_features(features)?;
    let n = features.size()[0];
    let by_features = reference.features().map(|all| {
        let real = all.narrow(0, 0, all.size()[0].min(n));
        let prdc = prdc(&real, features, Neighbours::default())?;
        Ok::<_, ddil_metrics::Error>(FeatureScores { kid: kid(all, features)?, prdc })
    });
    Ok(Scores {
        samples: n.unsigned_abs(),
        frechet: frechet_distance(reference.statistics(), &statistics)?,
        by_features: by_features.transpose()?,
    })
}

/// Features of images as stored in a PNG, in batches: `[n, channels, height, width]` in `[-1, 1]`, rounded to 8 bits.
///
/// # Errors
///
/// Errors of the extractor.
pub fn features_as_stored(images: &Tensor, extractor: &dyn FeatureExtractor) -> Result<Tensor> {
    features(&quantize(images)?, extractor)
}

/// The samples `range` of the `total` samples of a plan's seed, on the CPU; classes alternate.
///
/// A sample starts from the same noise whatever the range.
///
/// # Errors
///
/// Errors of the network.
pub(crate) fn draw(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    total: u32,
    range: Range<u32>,
) -> Result<Tensor> {
    draw_observed(pipeline, plan, total, range, None, &|| {})
}

/// As [`draw`], optionally for a single class; `on_call` is called after each call of the network.
///
/// # Errors
///
/// As [`draw`].
pub(crate) fn draw_observed(
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
    // A sampler that draws noise in its steps draws different noise for different parts.
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

/// The distance between the states that a student visits and noised data, at each of its timesteps.
///
/// At each timestep, `states` images represent training and as many others chance; fewer if the dataset is smaller.
///
/// # Errors
///
/// Errors of the network; fewer than four images.
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
    let data = Data::new(batch.x0).with_conditioning(conditioning).to_device(device)?;
    let guidance = Guidance::of_classes(&pipeline.card);
    let student = sampling_denoiser(&pipeline.network, plan, &guidance)?;
    let schedule = pipeline.network.schedule().clone();
    let timesteps = plan.timesteps(schedule.num_train_timesteps() as u32)?;
    let sampler = plan.sampler.build(&schedule)?;
    let streams = RandomStreams::new(plan.seed, 0);
    let request = ShiftRequest::new(&data, &*student, &*sampler, &timesteps, streams);
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
        .map(|batch| Ok(extractor.features(batch)?.to_kind(Kind::Float).to_device(Device::Cpu)))
        .collect();
    Ok(Tensor::cat(&batches?, 0))
}
