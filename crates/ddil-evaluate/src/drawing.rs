//! Samples of a model.

use std::ops::Range;

use ddil_core::{RandomStreams, Stream};
use ddil_pipelines::{
    Guidance, Pipeline, SamplePlan, WithCallback, class_conditioning, generate, initial_noise,
};
use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// The samples `range` of the `total` samples of a plan's seed, on the CPU; classes alternate.
///
/// A sample starts from the same noise whatever the range.
///
/// # Errors
///
/// Errors of the network.
pub fn draw(
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
