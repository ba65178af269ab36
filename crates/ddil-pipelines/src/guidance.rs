//! How a model may be guided.

use ddil_core::{Conditioning, Denoiser, Guided};
use ddil_files::Invalid;
use ddil_schedulers::{Estimate, NoiseSchedule, Prediction};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::pipeline::Card;

/// How a model may be guided: by what it says for "no condition", or by a scale that it is told.
#[derive(Debug, Default)]
pub struct Guide {
    /// What the network is told for "no condition", parts of one row; none for one that cannot be guided.
    null: Option<Conditioning>,
    /// The least and the greatest scale that the network may be told; none for one that is told none.
    range: Option<[f64; 2]>,
}

impl Guide {
    /// For a model of classes, by its null class.
    pub fn of_classes(card: &Card) -> Self {
        let null = card.null_class;
        let null = null.map(|class| Conditioning::class_labels(Tensor::from_slice(&[class])));
        Self { null, range: card.guidance_range }
    }

    /// For a model of prompts, by what it is told of no prompt.
    pub fn of_prompts(card: &Card, empty: Conditioning) -> Self {
        Self { null: Some(empty), range: card.guidance_range }
    }

    /// What the network is told for "no condition", one row.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a model that cannot be guided.
    pub fn null(&self) -> Result<Conditioning> {
        match &self.null {
            Some(null) => Ok(null.shallow_clone()),
            None => Err(Error::Invalid(Invalid::new(
                "guidance_scale",
                "other than 1",
                "1: the model was trained without a null class and cannot be guided",
            ))),
        }
    }

    /// A model guided at one scale; 1 is none.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a model that cannot be guided, or a scale that it has not learned.
    pub fn guided<'a>(
        &self,
        denoiser: &'a dyn Denoiser,
        scale: f64,
    ) -> Result<Box<dyn Denoiser + 'a>> {
        if scale.is_nan() || scale.abs() > f64::from(f32::MAX) {
            let expected = "a number that 32 bits can hold";
            return Err(Invalid::new("guidance_scale", scale, expected).into());
        }
        Ok(match self.range {
            Some(range) => Box::new(Told::new(denoiser, scale, range)?),
            None if (scale - 1.0).abs() < f64::EPSILON => Box::new(denoiser),
            None => Box::new(Guided::new(denoiser, scale, self.null()?)?),
        })
    }
}

/// A network that is told how strongly to guide itself, always the same.
struct Told<'a> {
    inner: &'a dyn Denoiser,
    weight: f64,
}

impl<'a> Told<'a> {
    fn new(inner: &'a dyn Denoiser, scale: f64, [min, max]: [f64; 2]) -> Result<Self> {
        if (min..=max).contains(&scale) {
            return Ok(Self { inner, weight: scale - 1.0 });
        }
        Err(Error::Invalid(Invalid::new(
            "guidance_scale",
            scale,
            format!("in {min}..={max}, the scales that the student was trained with"),
        )))
    }
}

impl Told<'_> {
    /// The conditioning with the weight in it.
    fn told(&self, x_t: &Tensor, conditioning: &Conditioning) -> Conditioning {
        let batch = x_t.size().first().copied().unwrap_or(0);
        let weight = Tensor::full([batch], self.weight, (Kind::Float, x_t.device()));
        conditioning.shallow_clone().with_guidance_weight(weight)
    }
}

impl Denoiser for Told<'_> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        self.inner.predict(x_t, timesteps, &self.told(x_t, conditioning))
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        timestep: i64,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Estimate> {
        self.inner.estimate(x_t, timestep, &self.told(x_t, conditioning))
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}
