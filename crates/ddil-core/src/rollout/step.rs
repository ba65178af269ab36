//! One step of a sampler, with the noise that it adds.

use ddil_libtorch::{ArgumentError, Generator};
use ddil_schedulers::{Prediction, Sampler, SamplerStep};
use tch::{Kind, Tensor};

use crate::conditioning::Conditioning;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};

/// A network and its sampler.
pub(super) type Actor<'a> = (&'a dyn Denoiser, &'a dyn Sampler);

/// The generators of the noise that a sampler adds.
pub(super) enum Fresh<'a> {
    /// One draw for the whole batch.
    OfBatch(Option<&'a mut Generator>),
    /// One draw for each sample.
    OfEach(&'a mut [Generator]),
}

impl Fresh<'_> {
    /// Noise shaped like `like`, in at least `Float`; none without a generator.
    pub(super) fn like(&mut self, like: &Tensor) -> Result<Option<Tensor>> {
        let kind = match like.kind() {
            Kind::Half | Kind::BFloat16 => Kind::Float,
            kind => kind,
        };
        let noise = match self {
            Self::OfBatch(None) => return Ok(None),
            Self::OfBatch(Some(generator)) => generator.normal(like.size(), kind)?,
            Self::OfEach(generators) => {
                let shape = like.size();
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

    /// Checks that, with one generator per sample, a sampler that adds noise has `batch` of them.
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

/// One call of the network and one step of the sampler, for a batch that goes from one timestep to another.
pub(super) fn step_at(
    (denoiser, sampler): Actor<'_>,
    x_t: Tensor,
    (timestep, prev): (i64, i64),
    conditioning: &Conditioning,
    fresh: &mut Fresh<'_>,
) -> Result<Tensor> {
    let level = denoiser.schedule().level_at(timestep)?;
    let estimate = denoiser.estimate(&x_t, level, conditioning)?;
    let adds_noise = sampler.needs_noise() && sampler.coefficients_at(timestep, prev)?.noise != 0.0;
    let noise = if adds_noise { fresh.like(&x_t)? } else { None };
    Ok(sampler.step_at(x_t, &estimate, prev, noise.as_ref())?)
}

/// The same for a batch at one timestep whose samples go to individual timesteps.
pub(super) fn step(
    actor: Actor<'_>,
    x_t: &Tensor,
    timestep: i64,
    prev_timesteps: &[i64],
    conditioning: &Conditioning,
    generator: Option<&mut Generator>,
) -> Result<Tensor> {
    if let Some(&prev) = prev_timesteps.first()
        && prev_timesteps.iter().all(|other| *other == prev)
    {
        let fresh = &mut Fresh::OfBatch(generator);
        return step_at(actor, x_t.shallow_clone(), (timestep, prev), conditioning, fresh);
    }
    let (denoiser, sampler) = actor;
    let level = denoiser.schedule().level_at(timestep)?;
    let prediction = denoiser.estimate(x_t, level, conditioning)?.prediction(x_t)?;
    let timesteps = vec![timestep; prev_timesteps.len()];
    sampler_step(sampler, &prediction, &timesteps, prev_timesteps, generator)
}

/// One step of the sampler for a batch with mixed timesteps, with noise from `generator` if the sampler adds noise.
pub(crate) fn sampler_step(
    sampler: &dyn Sampler,
    prediction: &Prediction,
    timesteps: &[i64],
    prev_timesteps: &[i64],
    generator: Option<&mut Generator>,
) -> Result<Tensor> {
    let step = SamplerStep::new(prediction, timesteps, prev_timesteps);
    let mut fresh = Fresh::OfBatch(generator);
    let noise = if sampler.needs_noise() { fresh.like(&prediction.x0)? } else { None };
    match &noise {
        Some(noise) => Ok(sampler.step(&step.with_noise(noise))?),
        None => Ok(sampler.step(&step)?),
    }
}
