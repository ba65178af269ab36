//! One step of a sampler, with the noise that it adds.

use ddil_libtorch::{ArgumentError, Generator};
use ddil_schedulers::{Prediction, Sampler, SamplerStep};
use tch::{Device, Kind, Tensor};

use crate::conditioning::Conditioning;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};

/// A network, and how a step follows from its prediction.
pub(super) type Actor<'a> = (&'a dyn Denoiser, &'a dyn Sampler);

/// Where the noise comes from that a sampler adds.
pub(super) enum Fresh<'a> {
    /// One draw for a whole batch.
    OfBatch(Option<&'a mut Generator>),
    /// One draw for each sample.
    OfEach(&'a mut [Generator]),
}

impl Fresh<'_> {
    /// Noise in the form of `like`; none without a generator.
    pub(super) fn like(&mut self, like: &Tensor) -> Result<Option<Tensor>> {
        let noise = match self {
            Self::OfBatch(None) => return Ok(None),
            Self::OfBatch(Some(generator)) => generator.normal(like.size(), like.kind())?,
            Self::OfEach(generators) => {
                let (shape, kind) = (like.size(), like.kind());
                let rows = generators.iter_mut().map(|one| Ok(one.normal(&shape[1..], kind)?));
                let rows = rows.collect::<Result<Vec<_>>>()?;
                Tensor::f_stack(&rows, 0).map_err(Error::torch("rollout"))?
            }
        };
        Ok(Some(noise.to_device(like.device())))
    }

    /// Whether there is a generator.
    pub(super) fn can_draw(&self) -> bool {
        !matches!(self, Self::OfBatch(None))
    }

    /// Checks that a sampler that adds noise has a generator for each of `batch` samples, if each has its own.
    pub(super) fn ensure_batch(
        &self,
        op: &'static str,
        sampler: &dyn Sampler,
        noise: &Tensor,
    ) -> Result<()> {
        match self {
            Self::OfEach(generators)
                if sampler.needs_noise() && noise.size()[0] != generators.len() as i64 =>
            {
                let expected = format!("{} rows, one per generator", generators.len());
                Err(ArgumentError::Shape { op, name: "noise", shape: noise.size(), expected }
                    .into())
            }
            _ => Ok(()),
        }
    }
}

/// One call of the network and one step of the sampler.
pub(super) fn step(
    (denoiser, sampler): Actor<'_>,
    x_t: &Tensor,
    timestep: i64,
    prev_timesteps: &Tensor,
    conditioning: &Conditioning,
    generator: Option<&mut Generator>,
) -> Result<Tensor> {
    let timesteps = filled(x_t.size()[0], timestep, x_t.device());
    let prediction = denoiser.predict(x_t, &timesteps, conditioning)?;
    sampler_step(sampler, &prediction, &timesteps, prev_timesteps, generator)
}

/// One step of the sampler, with noise from `generator` if the sampler adds some.
pub(crate) fn sampler_step(
    sampler: &dyn Sampler,
    prediction: &Prediction,
    timesteps: &Tensor,
    prev_timesteps: &Tensor,
    generator: Option<&mut Generator>,
) -> Result<Tensor> {
    let fresh = &mut Fresh::OfBatch(generator);
    renewed_step(sampler, prediction, timesteps, prev_timesteps, fresh)
}

/// One step of the sampler, with noise from `fresh` if the sampler adds some.
pub(super) fn renewed_step(
    sampler: &dyn Sampler,
    prediction: &Prediction,
    timesteps: &Tensor,
    prev_timesteps: &Tensor,
    fresh: &mut Fresh<'_>,
) -> Result<Tensor> {
    let step = SamplerStep::new(prediction, timesteps, prev_timesteps);
    let noise = if sampler.needs_noise() { fresh.like(&prediction.x0)? } else { None };
    match &noise {
        Some(noise) => Ok(sampler.step(&step.with_noise(noise))?),
        None => Ok(sampler.step(&step)?),
    }
}

/// The same timestep for a whole batch.
pub(super) fn filled(batch: i64, timestep: i64, device: Device) -> Tensor {
    Tensor::full([batch], timestep, (Kind::Int64, device))
}
