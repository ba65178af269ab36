//! Classifier-free guidance of a pipeline.

use ddil_core::{Conditioning, Denoiser, Guided};
use ddil_files::Invalid;
use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::pipeline::Card;

/// Classifier-free guidance of a model: by its unconditional prediction, or by a guidance scale as network input.
///
/// # Example
///
/// ```
/// use ddil_core::Conditioning;
/// use ddil_pipelines::{Card, Guidance};
/// use tch::Tensor;
///
/// // A model with ten classes whose null class is label 10.
/// let guidance = Guidance::of_classes(&Card { null_class: Some(10), ..Card::default() });
/// let null = guidance.null()?;
/// assert_eq!(null.get(Conditioning::CLASS_LABELS), Some(&Tensor::from_slice(&[10_i64])));
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Guidance {
    /// The unconditional input of the network, parts of one row; `None` for a model that cannot be guided.
    null: Option<Conditioning>,
    /// The smallest and largest guidance scale of a network with a guidance embedding; `None` without one.
    range: Option<[f64; 2]>,
}

impl Guidance {
    /// Guidance of a class-conditional model with its null class.
    pub fn of_classes(card: &Card) -> Self {
        let null = card.null_class;
        let null = null.map(|class| Conditioning::class_labels(Tensor::from_slice(&[class])));
        Self { null, range: card.guidance_range }
    }

    /// Guidance of a text-to-image model with its encoded empty or negative prompt.
    pub fn of_prompts(card: &Card, empty: Conditioning) -> Self {
        Self { null: Some(empty), range: card.guidance_range }
    }

    /// The unconditional input of the network, one row.
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

    /// The denoiser with guidance of the given scale; 1 is no guidance.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a model that cannot be guided, or a scale outside of the range that it was trained with.
    pub fn guided<'a>(
        &self,
        denoiser: &'a dyn Denoiser,
        scale: f64,
    ) -> Result<Box<dyn Denoiser + 'a>> {
        if scale.is_nan() || scale.abs() > f64::from(f32::MAX) {
            let expected = "a finite number in the range of a 32-bit float";
            return Err(Invalid::new("guidance_scale", scale, expected).into());
        }
        Ok(match self.range {
            Some(range) => Box::new(WithGuidanceWeight::new(denoiser, scale, range)?),
            None if (scale - 1.0).abs() < f64::EPSILON => Box::new(denoiser),
            None => Box::new(Guided::new(denoiser, scale, self.null()?)?),
        })
    }
}

/// Passes a constant guidance weight to a network with a guidance embedding.
struct WithGuidanceWeight<'a> {
    inner: &'a dyn Denoiser,
    weight: f64,
}

impl<'a> WithGuidanceWeight<'a> {
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

impl WithGuidanceWeight<'_> {
    /// The conditioning with the weight added.
    fn with_weight(&self, x_t: &Tensor, conditioning: &Conditioning) -> Conditioning {
        let batch = x_t.size().first().copied().unwrap_or(0);
        let weight = Tensor::full([batch], self.weight, (Kind::Float, x_t.device()));
        conditioning.shallow_clone().with_guidance_weight(weight)
    }
}

impl Denoiser for WithGuidanceWeight<'_> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        self.inner.predict(x_t, timesteps, &self.with_weight(x_t, conditioning))
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Estimate> {
        self.inner.estimate(x_t, level, &self.with_weight(x_t, conditioning))
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}
