//! Steps of a whole batch at one timestep, with every coefficient worked out beforehand.

use ddil_libtorch::{
    Clamped, affine, affine_, affine_clamped, affine_clamped_, affine_noise, affine_noise_,
    ensure_real, ensure_same_shape,
};
use tch::{Kind, Tensor};

use crate::config_file::Compatibility;
use crate::ddim::Ddim;
use crate::error::{Error, Result};
use crate::lcm::{ConsistencyBoundary, Lcm};
use crate::noise_schedule::{NoiseSchedule, Scale};
use crate::prediction::{PredictionType, at_least_float};
use crate::sampler::Sampler;
use crate::thresholding::{Bound, DataRange, Thresholding};
use crate::timesteps::Timesteps;

/// The steps of a run, ready to be taken: from a network's raw output straight to the next state.
///
/// Equal to reading the output with [`PredictionType::convert`], thresholding and [`Sampler::step`], for a batch that
/// stands at one timestep. Coefficients are worked out once in `f64`, and a step is one pass over memory where no
/// thresholding looks at more than one value at a time:
///
/// | thresholding | a step |
/// |---|---|
/// | none | `a x_t + b model_output (+ c noise)` |
/// | one interval for all channels | `c x_t + d clamp(a x_t + b model_output) (+ noise)` |
/// | any other | `x0`, its thresholding, `c x_t + d x0 (+ noise)` |
///
/// # Example
///
/// ```
/// use ddil_schedulers::{Ddim, NoiseScheduleConfig, PredictionType, Thresholding, TimestepSpacing, Timesteps};
/// use tch::{Tensor, kind};
///
/// # fn main() -> ddil_schedulers::Result<()> {
/// let sampler = Ddim::new(NoiseScheduleConfig::default().build()?);
/// let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// let plan = sampler.plan(&timesteps, PredictionType::Epsilon, &Thresholding::clamp_pixels())?;
///
/// let mut x = Tensor::randn([2, 3, 8, 8], kind::FLOAT_CPU);
/// for i in 0..plan.len() {
///     let model_output = x.zeros_like();
///     plan.step_inplace(i, &mut x, &model_output, None)?;
/// }
/// assert!(x.abs().max().double_value(&[]) <= 1.0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Plan {
    timesteps: Timesteps,
    thresholding: Thresholding,
    steps: Vec<Coefficients>,
}

/// One step: `x0 = x0_of_x x_t + x0_of_output output`, then
/// `keep x_t + gain x0 + output model_output + noise fresh_noise`.
#[derive(Clone, Copy, Debug)]
struct Coefficients {
    x0_of_x: f64,
    x0_of_output: f64,
    keep: f64,
    gain: f64,
    output: f64,
    noise: f64,
}

impl Ddim {
    /// Works out the steps over `timesteps` for a network that outputs `prediction_type`.
    ///
    /// # Errors
    ///
    /// [`Error::PredictionType`] if the output has no meaning at a timestep of the grid, [`Error::Invalid`] as
    /// [`Thresholding::ensure`], [`Error::TimestepOutOfRange`] if the grid leaves the schedule.
    pub fn plan(
        &self,
        timesteps: &Timesteps,
        prediction_type: PredictionType,
        thresholding: &Thresholding,
    ) -> Result<Plan> {
        self.plan_with(timesteps, prediction_type, thresholding, Compatibility::Off)
    }

    /// As [`plan`](Self::plan), with diffusers' own rule for a thresholded `x0` if asked for: see
    /// [`Compatibility::Diffusers`], whose timesteps go with it.
    ///
    /// # Errors
    ///
    /// As [`plan`](Self::plan).
    pub fn plan_with(
        &self,
        timesteps: &Timesteps,
        prediction_type: PredictionType,
        thresholding: &Thresholding,
        compatibility: Compatibility,
    ) -> Result<Plan> {
        let schedule = self.schedule();
        let keeps_epsilon = compatibility == Compatibility::Diffusers;
        let step = |now: Scale, prev: Scale, x0: (f64, f64), epsilon: (f64, f64)| {
            let (kept, noise) = self.noise_shares(now, prev);
            let (keep, gain, output) = if keeps_epsilon {
                (kept * epsilon.0, prev.alpha, kept * epsilon.1)
            } else {
                let keep = kept / now.sigma;
                (keep, prev.alpha - keep * now.alpha, 0.0)
            };
            Coefficients { x0_of_x: x0.0, x0_of_output: x0.1, keep, gain, output, noise }
        };
        let steps = timesteps.pairs().map(|(t, prev)| {
            let (now, prev) = (schedule.scale_at(t)?, schedule.scale_at(prev)?);
            let (x0, epsilon) = prediction_type.coefficients(schedule, now)?;
            Ok(step(now, prev, x0, epsilon))
        });
        Plan::new(timesteps, thresholding, steps.collect::<Result<_>>()?)
    }
}

impl Lcm {
    /// Works out the steps over `timesteps` for a network that outputs `prediction_type`; `boundary` is the
    /// consistency boundary that the network was trained with, if any.
    ///
    /// # Errors
    ///
    /// As [`Ddim::plan`].
    pub fn plan(
        &self,
        timesteps: &Timesteps,
        prediction_type: PredictionType,
        thresholding: &Thresholding,
        boundary: Option<ConsistencyBoundary>,
    ) -> Result<Plan> {
        let schedule = self.schedule();
        let steps = timesteps.pairs().map(|(t, prev)| {
            let now = schedule.scale_at(t)?;
            let prev = if prev == -1 { Scale::CLEAN } else { schedule.scale_at(prev)? };
            let ((x0_of_x, x0_of_output), _) = prediction_type.coefficients(schedule, now)?;
            let (skip, out) = boundary.map_or((0.0, 1.0), |boundary| boundary.scalings(t));
            let (keep, gain) = (prev.alpha * skip, prev.alpha * out);
            Ok(Coefficients { x0_of_x, x0_of_output, keep, gain, output: 0.0, noise: prev.sigma })
        });
        Plan::new(timesteps, thresholding, steps.collect::<Result<_>>()?)
    }
}

impl PredictionType {
    /// `x0` and `epsilon` as multiples of `x_t` and of the network's output.
    fn coefficients(
        self,
        schedule: &NoiseSchedule,
        now: Scale,
    ) -> Result<((f64, f64), (f64, f64))> {
        self.ensure_defined_at(schedule, now)?;
        let Scale { alpha, sigma } = now;
        let total = alpha + sigma;
        Ok(match self {
            Self::Epsilon => ((1.0 / alpha, -sigma / alpha), (0.0, 1.0)),
            Self::Sample => ((0.0, 1.0), (1.0 / sigma, -alpha / sigma)),
            Self::VPrediction => ((alpha, -sigma), (sigma, alpha)),
            Self::Flow => ((1.0 / total, -sigma / total), (1.0 / total, alpha / total)),
        })
    }
}

impl Plan {
    fn new(
        timesteps: &Timesteps,
        thresholding: &Thresholding,
        steps: Vec<Coefficients>,
    ) -> Result<Self> {
        thresholding.ensure()?;
        Ok(Self { timesteps: timesteps.clone(), thresholding: thresholding.clone(), steps })
    }

    /// The timesteps at which the network is asked.
    pub fn timesteps(&self) -> &Timesteps {
        &self.timesteps
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Never true: a grid has at least one timestep.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether step `i` wants fresh noise; one that ends on clean data does not.
    pub fn needs_noise(&self, i: usize) -> bool {
        self.steps.get(i).is_some_and(|step| step.noise != 0.0)
    }

    /// The state after step `i`, counted from 0, of a batch that stands at timestep `i` of the grid.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`, `model_output`: `[batch, ..]`, the same shape; half kinds are computed in `Float`
    /// - `noise`: the same shape, unit normal; looked at only if the step [needs it](Self::needs_noise)
    /// - returns: that shape, `Float` or `Double`
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchStep`], [`ArgumentError::ShapeMismatch`](ddil_libtorch::ArgumentError::ShapeMismatch) if the tensors differ in shape, [`Error::NoiseMissing`];
    /// as [`Thresholding::apply`].
    pub fn step(
        &self,
        i: usize,
        x_t: &Tensor,
        model_output: &Tensor,
        noise: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "Plan::step";
        let (step, noise) = self.checked(OP, i, x_t, model_output, noise)?;
        let (x_t, output) = (at_least_float(x_t), at_least_float(model_output));
        match self.clamp() {
            _ if self.thresholding == Thresholding::None => step.linear(&x_t, &output, noise),
            Some(bounds) => {
                let x = affine_clamped(&x_t, &output, &step.clamped(bounds))?;
                step.rest(x, &output, noise)
            }
            None => {
                let x0 = affine(&x_t, &output, step.x0_of_x, step.x0_of_output)?;
                let x0 = self.thresholding.apply(&x0)?;
                step.rest(affine(&x_t, &x0, step.keep, step.gain)?, &output, noise)
            }
        }
    }

    /// As [`step`](Self::step), in the memory of `x_t`, which keeps its kind.
    ///
    /// # Errors
    ///
    /// As [`step`](Self::step), and [`Error::Libtorch`] if `x_t` requires a gradient or overlaps the others in
    /// memory. `x_t` is then as it was, unless it is the noise alone that was refused.
    pub fn step_inplace(
        &self,
        i: usize,
        x_t: &mut Tensor,
        model_output: &Tensor,
        noise: Option<&Tensor>,
    ) -> Result<()> {
        const OP: &str = "Plan::step_inplace";
        ensure_real(OP, "x_t", x_t)?;
        if at_least_float(x_t).kind() != x_t.kind() {
            let x = self.step(i, x_t, model_output, noise)?;
            return x_t.f_copy_(&x).map_err(Error::torch(OP));
        }
        let (step, noise) = self.checked(OP, i, x_t, model_output, noise)?;
        let output = at_least_float(model_output);
        match self.clamp() {
            _ if self.thresholding == Thresholding::None => step.linear_(x_t, &output, noise),
            Some(bounds) => {
                affine_clamped_(x_t, &output, &step.clamped(bounds))?;
                step.rest_(x_t, &output, noise)
            }
            None => {
                let x0 = affine(x_t, &output, step.x0_of_x, step.x0_of_output)?;
                affine_(x_t, &self.thresholding.apply(&x0)?, step.keep, step.gain)?;
                step.rest_(x_t, &output, noise)
            }
        }
    }

    /// The bounds, where one interval goes for every value.
    fn clamp(&self) -> Option<(f64, f64)> {
        match self.thresholding {
            Thresholding::Clamp(DataRange {
                low: Bound::Scalar(low),
                high: Bound::Scalar(high),
            }) => Some((low, high)),
            _ => None,
        }
    }

    /// The coefficients of step `i`, and the noise if it wants any.
    fn checked<'a>(
        &self,
        op: &'static str,
        i: usize,
        x_t: &Tensor,
        model_output: &Tensor,
        noise: Option<&'a Tensor>,
    ) -> Result<(&Coefficients, Option<&'a Tensor>)> {
        let len = self.steps.len();
        let step = self.steps.get(i).ok_or(Error::NoSuchStep { op, index: i, len })?;
        ensure_same_shape(op, ("x_t", x_t), ("model_output", model_output))?;
        if step.noise == 0.0 {
            return Ok((step, None));
        }
        let noise = noise.ok_or(Error::NoiseMissing { op })?;
        ensure_same_shape(op, ("x_t", x_t), ("noise", noise))?;
        Ok((step, Some(noise)))
    }
}

impl Coefficients {
    /// Nothing comes between output and state: the two multiples of `x_t` and of the output.
    fn collapsed(&self) -> (f64, f64) {
        (self.keep + self.gain * self.x0_of_x, self.output + self.gain * self.x0_of_output)
    }

    fn clamped(&self, (lo, hi): (f64, f64)) -> Clamped {
        let Self { x0_of_x, x0_of_output, keep, gain, .. } = *self;
        Clamped { a: x0_of_x, b: x0_of_output, lo, hi, c: keep, d: gain }
    }

    fn linear(&self, x: &Tensor, output: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        let (a, b) = self.collapsed();
        Ok(match noise {
            Some(noise) => affine_noise(x, output, &cast(noise, x.kind()), a, b, self.noise)?,
            None => affine(x, output, a, b)?,
        })
    }

    fn linear_(&self, x: &mut Tensor, output: &Tensor, noise: Option<&Tensor>) -> Result<()> {
        let (a, b) = self.collapsed();
        let Some(noise) = noise else { return Ok(affine_(x, output, a, b)?) };
        let noise = cast(noise, x.kind());
        Ok(affine_noise_(x, output, &noise, a, b, self.noise)?)
    }

    /// What a step adds after its thresholding.
    fn rest(&self, mut x: Tensor, output: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        // Out of place where gradients are recorded, which the sum in place would refuse.
        if x.requires_grad() {
            if self.output != 0.0 {
                x = affine(&x, output, 1.0, self.output)?;
            }
            return Ok(match noise {
                Some(noise) => affine(&x, &cast(noise, x.kind()), 1.0, self.noise)?,
                None => x,
            });
        }
        self.rest_(&mut x, output, noise)?;
        Ok(x)
    }

    fn rest_(&self, x: &mut Tensor, output: &Tensor, noise: Option<&Tensor>) -> Result<()> {
        if self.output != 0.0 {
            affine_(x, output, 1.0, self.output)?;
        }
        if let Some(noise) = noise {
            let noise = cast(noise, x.kind());
            affine_(x, &noise, 1.0, self.noise)?;
        }
        Ok(())
    }
}

fn cast(tensor: &Tensor, kind: Kind) -> Tensor {
    if tensor.kind() == kind { tensor.shallow_clone() } else { tensor.to_kind(kind) }
}
