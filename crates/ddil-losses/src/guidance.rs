//! The source of a teacher's guidance, so that no teacher is guided twice.

use ddil_core::{Conditioning, Denoiser, Guided, GuidedByWeight};
use ddil_files::Invalid;
use ddil_schedulers::{Estimate, NoiseLevel, NoiseSchedule, Prediction};
use rand::Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::error::{Error, Result};

/// Where the guidance of a teacher comes from.
///
/// An enum rather than a number: a student of a guided teacher has guidance baked in, and guiding it again as the
/// teacher of the next stage would apply guidance twice. The first stage therefore uses [`Cfg`](Self::Cfg) and the
/// later ones [`BakedIn`](Self::BakedIn). [`Embedded`](Self::Embedded) is section 3 of
/// [Meng et al. 2022](https://arxiv.org/abs/2210.03142).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "kind",
    rename_all = "snake_case",
    deny_unknown_fields,
    expecting = "a table: { kind = \"cfg\", scale = 2.0 } for a guidance scale of 2, { kind = \"baked_in\" } for no guidance"
)]
pub enum TeacherGuidance {
    /// Classifier-free guidance at one scale, with two evaluations of the network.
    Cfg {
        /// `uncond + scale (cond - uncond)`; 1 is off.
        scale: f64,
    },
    /// Classifier-free guidance with a weight `w = scale - 1` per sample, drawn uniformly from a range when the state's
    /// trajectory starts: `cond + w (cond - uncond)`, with two evaluations of a network without a weight input. The
    /// student takes the weight as an input and learns the whole range.
    CfgRange {
        /// The smallest weight; 0 is no guidance.
        min: f64,
        /// The largest weight.
        max: f64,
    },
    /// The network takes a weight `w = scale - 1` per sample as an input, drawn uniformly from a range when the state's
    /// trajectory starts. Student and teacher receive the same weight.
    Embedded {
        /// The smallest weight.
        min: f64,
        /// The largest weight.
        max: f64,
    },
    /// The network's output is already guided, or is used unguided: one evaluation, used as it is.
    #[default]
    BakedIn,
}

impl TeacherGuidance {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless numbers are finite, the scale is not negative and the range is in order.
    pub fn ensure(self) -> Result<()> {
        let (field, value, expected) = match self {
            Self::Cfg { scale } if !(scale.is_finite() && scale >= 0.0) => {
                ("guidance.scale", scale.to_string(), "finite and at least 0; 1 is no guidance")
            }
            Self::Embedded { min, max } | Self::CfgRange { min, max }
                if !(min.is_finite() && max.is_finite() && min >= -1.0 && min <= max) =>
            {
                let expected = "finite, in order, and at least -1 (unconditional)";
                ("guidance.min, guidance.max", format!("{min}, {max}"), expected)
            }
            _ => return Ok(()),
        };
        Err(Error::Invalid(Invalid::new(field, value, expected)))
    }

    /// The kind, as in config files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cfg { .. } => "cfg",
            Self::CfgRange { .. } => "cfg_range",
            Self::Embedded { .. } => "embedded",
            Self::BakedIn => "baked_in",
        }
    }

    /// Whether the student takes a guidance weight: its network then needs an embedding of it.
    pub fn is_student_input(self) -> bool {
        matches!(self, Self::CfgRange { .. } | Self::Embedded { .. })
    }

    /// The guidance of the student when it becomes the teacher of the next stage.
    #[must_use]
    pub fn of_student(self) -> Self {
        match self {
            Self::Cfg { .. } | Self::BakedIn => Self::BakedIn,
            Self::CfgRange { min, max } | Self::Embedded { min, max } => {
                Self::Embedded { min, max }
            }
        }
    }

    /// The teacher with its guidance. Thresholding wraps the result.
    ///
    /// `null` is the conditioning for "no condition", one row; only [`Cfg`](Self::Cfg) and
    /// [`CfgRange`](Self::CfgRange) require it.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] as [`ensure`](Self::ensure); [`Error::Core`] if `null` does not have one row or contains a
    /// weight.
    pub fn wrap<'a, D: Denoiser + 'a>(
        self,
        teacher: D,
        null: Conditioning,
    ) -> Result<Box<dyn Denoiser + 'a>> {
        self.ensure()?;
        Ok(match self {
            Self::Cfg { scale } => Box::new(Guided::new(teacher, scale, null)?),
            Self::CfgRange { .. } => Box::new(GuidedByWeight::new(teacher, null)?),
            Self::Embedded { .. } => Box::new(WithGuidanceWeight { inner: teacher }),
            Self::BakedIn => Box::new(teacher),
        })
    }

    /// The conditioning of `batch` new trajectories: with a weight per sample drawn uniformly from the range for
    /// [`CfgRange`](Self::CfgRange) and [`Embedded`](Self::Embedded), unchanged otherwise.
    ///
    /// # Shapes and units
    ///
    /// - returns: `guidance_weight` is `[batch]`, `Float`, on `device`
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] as [`ensure`](Self::ensure), [`Error::Torch`] if the device is not available.
    pub fn condition<R: Rng + ?Sized>(
        self,
        conditioning: Conditioning,
        batch: usize,
        device: Device,
        rng: &mut R,
    ) -> Result<Conditioning> {
        self.ensure()?;
        let (Self::Embedded { min, max } | Self::CfgRange { min, max }) = self else {
            return Ok(conditioning);
        };
        let weights: Vec<f32> = (0..batch).map(|_| rng.random_range(min..=max) as f32).collect();
        let weights = Tensor::from_slice(&weights).f_to_device(device);
        let weights = weights.map_err(Error::torch("TeacherGuidance::condition"))?;
        Ok(conditioning.with_guidance_weight(weights))
    }
}

/// A denoiser that requires a guidance weight: without one, its network would use its default weight.
#[derive(Debug)]
struct WithGuidanceWeight<D> {
    inner: D,
}

impl<D: Denoiser> Denoiser for WithGuidanceWeight<D> {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        ensure_weight(conditioning)?;
        self.inner.predict(x_t, timesteps, conditioning)
    }

    fn estimate(
        &self,
        x_t: &Tensor,
        level: NoiseLevel,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Estimate> {
        ensure_weight(conditioning)?;
        self.inner.estimate(x_t, level, conditioning)
    }

    fn schedule(&self) -> &NoiseSchedule {
        self.inner.schedule()
    }
}

fn ensure_weight(conditioning: &Conditioning) -> ddil_core::Result<()> {
    if conditioning.get(Conditioning::GUIDANCE_WEIGHT).is_some() {
        return Ok(());
    }
    let network = "a teacher with embedded guidance".to_owned();
    Err(ddil_core::Error::ConditioningMissing { network, field: "guidance_weight" })
}
