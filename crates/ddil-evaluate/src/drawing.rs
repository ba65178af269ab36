//! Samples of a model.

use std::fmt;
use std::ops::Range;

use ddil_core::{Conditioning, Denoiser, RandomStreams, Stream};
use ddil_files::Invalid;
use ddil_libtorch::Generator;
use ddil_pipelines::{
    Card, Guidance, Pipeline, SamplePlan, WithCallback, class_conditioning, generate,
    generate_from, initial_noise,
};
use tch::{Device, Kind, Tensor};

use crate::classes::label_of;
use crate::error::{Error, Result};

/// The samples of a seed, drawn batch by batch, so that memory does not grow with their number.
///
/// A sample depends on the seed and on its index: a part of the samples is equal to that part of the whole.
///
/// # Example
///
/// ```
/// use ddil_evaluate::{Drawing, draw};
/// use ddil_models::Placement;
/// use ddil_pipelines::{Pipeline, Precision, SamplePlan};
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher");
/// let model = Pipeline::open(folder.as_ref(), Placement::default(), Precision::Float32)?;
/// let plan = SamplePlan { batch_size: 2, ..SamplePlan::of(&model, Some(1)) };
/// let mut batches = Vec::new();
/// Drawing::of_pipeline(&model, &plan, 5).for_each(2, |batch| {
///     batches.push(batch);
///     Ok(())
/// })?;
/// let whole = draw(&model, &plan, 5, 0..5)?;
/// assert_eq!(tch::Tensor::cat(&batches, 0), whole.narrow(0, 2, 3));
/// # Ok::<(), ddil_evaluate::Error>(())
/// ```
#[must_use]
pub struct Drawing<'a> {
    network: &'a dyn Denoiser,
    plan: &'a SamplePlan,
    guidance: Guidance,
    shape: [i64; 3],
    device: Device,
    total: u32,
    end: u32,
    on_call: &'a dyn Fn(),
    conditioning: Box<dyn Fn(Range<i64>) -> Result<Conditioning> + 'a>,
    decode: Option<Decode<'a>>,
}

/// Images of latents.
type Decode<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;

impl fmt::Debug for Drawing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drawing").field("plan", self.plan).field("total", &self.total).finish()
    }
}

impl<'a> Drawing<'a> {
    /// `total` samples of a model without prompts; classes alternate.
    pub fn of_pipeline(pipeline: &'a Pipeline, plan: &'a SamplePlan, total: u32) -> Self {
        let device = pipeline.network.placement().device;
        Self::of_network(&pipeline.network, &pipeline.card, plan, device, total)
    }

    /// The same of a network on `device` with the properties of `card`.
    pub fn of_network(
        network: &'a dyn Denoiser,
        card: &Card,
        plan: &'a SamplePlan,
        device: Device,
        total: u32,
    ) -> Self {
        let (guidance, num_classes) = (Guidance::of_classes(card), card.class_names.len() as u32);
        let classes = class_conditioning(card, num_classes, None, device);
        let conditioning = move |rows: Range<i64>| {
            if num_classes == 0 {
                return Ok(Conditioning::none());
            }
            let rows: Vec<i64> = rows.map(|row| label_of(row, i64::from(num_classes))).collect();
            Ok(classes.index_select(&Tensor::from_slice(&rows).to_device(device))?)
        };
        let conditioning = Box::new(conditioning);
        let shape = card.image_shape;
        Self {
            network,
            plan,
            guidance,
            shape,
            device,
            total,
            end: total,
            on_call: &|| {},
            conditioning,
            decode: None,
        }
    }

    /// With the conditioning of each sample, by its index, instead of classes.
    pub fn with_conditioning(
        self,
        guidance: Guidance,
        conditioning: impl Fn(Range<i64>) -> Result<Conditioning> + 'a,
    ) -> Self {
        Self { guidance, conditioning: Box::new(conditioning), ..self }
    }

    /// With a decoder of the network's samples, latents `[n, channels, height, width]`, to images.
    pub fn with_decoder(self, decode: impl Fn(&Tensor) -> Result<Tensor> + 'a) -> Self {
        Self { decode: Some(Box::new(decode)), ..self }
    }

    /// Only the first `end` samples of them.
    pub fn up_to(self, end: u32) -> Self {
        Self { end: end.min(self.total), ..self }
    }

    /// With a function that is called after each call of the network, to show progress.
    pub fn with_callback(self, on_call: &'a dyn Fn()) -> Self {
        Self { on_call, ..self }
    }

    /// The number of samples to draw.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Draws the samples from `first` on and calls `consume` with each batch, `[n, channels, height, width]` on the CPU.
    ///
    /// Batches begin at multiples of the plan's batch size, whatever `first` is, so that rounding does not depend on it.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if `first` is beyond the samples; errors of the network, and of `consume`.
    pub fn for_each(
        &self,
        first: u32,
        mut consume: impl FnMut(Tensor) -> Result<()>,
    ) -> Result<()> {
        if first > self.end {
            let expected = format!("at most {}, the number of samples", self.end);
            return Err(Invalid::new("first", first, expected).into());
        }
        let (batch, end) = (i64::from(self.plan.batch_size.max(1)), i64::from(self.end));
        let network = WithCallback::new(self.network, self.on_call);
        let mut noise = NoiseRows::new(self.plan.seed, self.shape, i64::from(self.total))?;
        let first = i64::from(first);
        for start in (first / batch * batch..end).step_by(batch as usize) {
            let rows = start..end.min(start.saturating_add(batch));
            let skipped = (first - start).max(0);
            if skipped >= rows.end - rows.start {
                continue;
            }
            let images = self.batch(&network, &mut noise, rows)?;
            let kept = images.size()[0].saturating_sub(skipped);
            consume(images.narrow(0, skipped, kept).to_device(Device::Cpu))?;
        }
        Ok(())
    }

    fn batch(
        &self,
        network: &dyn Denoiser,
        noise: &mut NoiseRows,
        rows: Range<i64>,
    ) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let noise = noise.at(&rows)?.f_to_device(self.device).map_err(Error::torch(OP))?;
        let (first, conditioning) = (rows.start as u64, (self.conditioning)(rows)?);
        let (plan, guidance) = (self.plan, &self.guidance);
        let samples = generate_from(network, plan, guidance, &noise, &conditioning, first)?;
        match &self.decode {
            Some(decode) => decode(&samples),
            None => Ok(samples),
        }
    }
}

const OP: &str = "Drawing::for_each";

/// Rows of [`initial_noise`], in order, of which one part is in memory.
struct NoiseRows {
    generator: Generator,
    shape: [i64; 3],
    total: i64,
    /// The first row of `part`.
    start: i64,
    part: Option<Tensor>,
}

impl NoiseRows {
    /// A multiple of 16: libtorch draws normal numbers in blocks of that many, so that parts equal the whole.
    const ROWS: i64 = 512;

    fn new(seed: u64, shape: [i64; 3], total: i64) -> Result<Self> {
        let generator = RandomStreams::new(seed, 0).generator(0, Stream::Sample, Device::Cpu)?;
        Ok(Self { generator, shape, total, start: 0, part: None })
    }

    /// Rows that begin in the part in memory or after it.
    fn at(&mut self, rows: &Range<i64>) -> Result<Tensor> {
        let mut found = Vec::new();
        let mut next = rows.start;
        while next < rows.end {
            let len = self.part.as_ref().map_or(0, |part| part.size()[0]);
            let end = self.start + len;
            match &self.part {
                Some(part) if next < end => {
                    let taken = end.min(rows.end) - next;
                    found.push(part.narrow(0, next - self.start, taken));
                    next += taken;
                }
                _ => self.draw_part(end)?,
            }
        }
        Tensor::f_cat(&found, 0).map_err(Error::torch(OP))
    }

    fn draw_part(&mut self, start: i64) -> Result<()> {
        let left = self.total - start;
        // The last part is not a short one: libtorch draws fewer than 16 numbers in another way.
        let rows = if left < 2 * Self::ROWS { left } else { Self::ROWS };
        let [channels, height, width] = self.shape;
        let part = self.generator.normal([rows, channels, height, width], Kind::Float)?;
        (self.start, self.part) = (start, Some(part));
        Ok(())
    }
}

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
/// As [`draw`]; [`Error::Invalid`] for a range that is not within the samples.
pub fn draw_observed(
    pipeline: &Pipeline,
    plan: &SamplePlan,
    total: u32,
    range: Range<u32>,
    class: Option<i64>,
    on_call: &dyn Fn(),
) -> Result<Tensor> {
    if range.start > range.end || range.end > total {
        let expected = format!("a range within the {total} samples");
        return Err(Invalid::new("range", format!("{range:?}"), expected).into());
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_in_parts_is_the_noise_of_the_whole() -> Result<()> {
        // Rows of 75 and of 3 values: parts end within a block of 16.
        for (shape, total) in [([3, 5, 5], 1700), ([3, 1, 1], 1027), ([1, 1, 1], 7)] {
            let whole = initial_noise(7, total, shape, Device::Cpu)?;
            let total = i64::from(total);
            for batch in [100, 640, total] {
                let mut noise = NoiseRows::new(7, shape, total)?;
                for start in (0..total).step_by(batch as usize) {
                    let rows = start..total.min(start + batch);
                    let len = rows.end - rows.start;
                    assert_eq!(noise.at(&rows)?, whole.narrow(0, start, len), "{shape:?} {rows:?}");
                }
            }
            // Rows that were drawn and skipped.
            let mut noise = NoiseRows::new(7, shape, total)?;
            assert_eq!(noise.at(&(total - 2..total))?, whole.narrow(0, total - 2, 2));
        }
        Ok(())
    }
}
