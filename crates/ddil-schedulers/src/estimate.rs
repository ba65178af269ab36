//! Lazily computed clean data and noise of a batch at one timestep.

use ddil_libtorch::{
    Clamped, affine, affine_, affine_clamped, affine_clamped_, affine_four, affine_four_,
    affine_noise, affine_noise_, ensure_real, ensure_same_shape, is_sole_owner,
};
use tch::{Kind, Tensor};

use crate::boundary::ConsistencyBoundary;
use crate::coefficients::StepCoefficients;
use crate::error::{Error, Result};
use crate::noise_level::NoiseLevel;
use crate::noise_schedule::{NoiseSchedule, Scale};
use crate::prediction::{Linear, Prediction, PredictionType, at_least_float};
use crate::thresholding::{Bound, DataRange, Thresholding};

/// The clean data and the noise of a batch at one timestep, as weighted sums that are not computed yet.
///
/// [`Prediction`] holds two tensors, each of which is written once and read again. A step of a sampler does not need
/// them separately: if the whole batch is at one timestep, network output, thresholding, consistency boundary and step
/// are one formula in `x_t` and the output. An estimate keeps its parts until [`Sampler::step_at`] computes it in one
/// pass. [`prediction`](Self::prediction) computes the two tensors, equal to [`PredictionType::convert`],
/// [`Prediction::thresholded`] and [`ConsistencyBoundary::apply`] up to rounding.
///
/// [`Sampler::step_at`]: crate::Sampler::step_at
///
/// # Example
///
/// ```
/// use ddil_schedulers::{Ddim, Estimate, NoiseScheduleConfig, PredictionType, Sampler, Thresholding};
/// use tch::{Tensor, kind};
///
/// # fn main() -> ddil_schedulers::Result<()> {
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let x_t = Tensor::randn([2, 3, 8, 8], kind::FLOAT_CPU);
/// let model_output = x_t.zeros_like();
/// let estimate = Estimate::of_output(&schedule, PredictionType::Epsilon, model_output, 249)?
///     .thresholded(&Thresholding::clamp_pixels(), &x_t)?;
///
/// // The last step of DDIM ends at the clean data.
/// let x0 = estimate.prediction(&x_t)?.x0;
/// let last = Ddim::new(schedule).step_at(x_t, &estimate, -1, None)?;
/// assert!((last - x0).abs().max().double_value(&[]) < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Estimate {
    level: NoiseLevel,
    /// The network's output, or its clean data if known.
    given: Tensor,
    /// The clean data before thresholding.
    x0: Linear,
    epsilon: Epsilon,
    thresholding: Thresholding,
    /// `c_skip` and `c_out` of a consistency boundary.
    boundary: Option<(f64, f64)>,
}

/// How the noise of an estimate is computed.
#[derive(Debug)]
enum Epsilon {
    /// A sum of `x_t` and the given tensor.
    Sum(Linear),
    /// A separate tensor.
    Known(Tensor),
    /// `(x_t - alpha x0) / sigma`, from the thresholded `x0` before the boundary.
    FromX0,
}

/// A step as a sum: `x_t · x_t + x0 · x0 + given · given`, and further tensors with their weights.
struct Terms<'a> {
    x_t: f64,
    x0: f64,
    given: f64,
    rest: Vec<(f64, &'a Tensor)>,
}

impl Estimate {
    /// The estimate of a network's output.
    ///
    /// # Errors
    ///
    /// [`Error::PredictionType`] if the output is not defined at that timestep, [`Error::TimestepOutOfRange`] if it is
    /// off the training grid.
    pub fn of_output(
        schedule: &NoiseSchedule,
        prediction_type: PredictionType,
        model_output: Tensor,
        timestep: i64,
    ) -> Result<Self> {
        Self::at_level(schedule, prediction_type, model_output, schedule.level_at(timestep)?)
    }

    /// The same at any noise level, such as one between two training timesteps.
    ///
    /// # Errors
    ///
    /// [`Error::PredictionType`] if the output is not defined at that level.
    #[expect(clippy::needless_pass_by_value, reason = "the estimate keeps the tensor")]
    pub fn at_level(
        schedule: &NoiseSchedule,
        prediction_type: PredictionType,
        model_output: Tensor,
        level: NoiseLevel,
    ) -> Result<Self> {
        ensure_real("Estimate::at_level", "model_output", &model_output)?;
        let [x0, epsilon] = prediction_type.linear(schedule, level.scale)?;
        let given = at_least_float(&model_output);
        Ok(Self { given, x0, epsilon: Epsilon::Sum(epsilon), ..Self::at(level) })
    }

    /// An estimate whose tensors are both known.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if the two tensors differ in shape, [`Error::TimestepOutOfRange`] if the timestep is off the
    /// training grid.
    pub fn of_prediction(
        schedule: &NoiseSchedule,
        prediction: Prediction,
        timestep: i64,
    ) -> Result<Self> {
        let Prediction { x0, epsilon } = prediction;
        ensure_same_shape("Estimate::of_prediction", ("x0", &x0), ("epsilon", &epsilon))?;
        let level = schedule.level_at(timestep)?;
        Ok(Self { given: x0, epsilon: Epsilon::Known(epsilon), ..Self::at(level) })
    }

    fn at(level: NoiseLevel) -> Self {
        Self {
            level,
            given: Tensor::new(),
            x0: Linear::GIVEN,
            epsilon: Epsilon::FromX0,
            thresholding: Thresholding::None,
            boundary: None,
        }
    }

    /// The noise level of the batch.
    pub fn level(&self) -> NoiseLevel {
        self.level
    }

    /// Whether this is an estimate at `level`; of one without signal, a run has an `alpha` just above 0.
    pub(crate) fn is_at(&self, level: NoiseLevel) -> bool {
        let NoiseLevel { timestep, scale } = self.level;
        timestep == level.timestep && (scale == level.scale || scale.alpha == 0.0)
    }

    /// The timestep of the batch; the nearest one for a level between two timesteps.
    pub fn timestep(&self) -> i64 {
        self.level.nearest_timestep()
    }

    /// Thresholds `x0` to the data's range and recomputes `epsilon` from it, as [`Prediction::thresholded`].
    ///
    /// # Errors
    ///
    /// As [`Thresholding::ensure`]; as [`prediction`](Self::prediction) for an estimate that is already thresholded.
    pub fn thresholded(self, thresholding: &Thresholding, x_t: &Tensor) -> Result<Self> {
        if *thresholding == Thresholding::None {
            return Ok(self);
        }
        let held = self.thresholded_keeping_epsilon(thresholding, x_t)?;
        Ok(Self { epsilon: Epsilon::FromX0, ..held })
    }

    /// Thresholds `x0` to the data's range and keeps `epsilon`, as [`Prediction::thresholded_keeping_epsilon`].
    ///
    /// # Errors
    ///
    /// As [`thresholded`](Self::thresholded).
    pub fn thresholded_keeping_epsilon(
        self,
        thresholding: &Thresholding,
        x_t: &Tensor,
    ) -> Result<Self> {
        thresholding.ensure()?;
        if *thresholding == Thresholding::None {
            return Ok(self);
        }
        let plain = self.thresholding == Thresholding::None && self.boundary.is_none();
        let raw = if plain { self } else { self.computed(x_t)? };
        Ok(Self { thresholding: thresholding.clone(), ..raw })
    }

    /// Applies a consistency boundary: `x0` becomes `c_out x0 + c_skip x_t`, and `epsilon` is kept.
    ///
    /// # Errors
    ///
    /// As [`prediction`](Self::prediction), for an estimate that has a boundary.
    pub fn with_boundary(self, boundary: ConsistencyBoundary, x_t: &Tensor) -> Result<Self> {
        let inner = if self.boundary.is_none() { self } else { self.computed(x_t)? };
        Ok(Self { boundary: Some(boundary.scalings(inner.timestep())), ..inner })
    }

    /// Applies the same affine combination of rows to clean data and noise, for guidance.
    ///
    /// `combine` returns sums of rows of its argument with weights that sum to 1, and only of rows with the same `x_t`.
    /// Both parts are affine in the network's output, so combining the output combines them; a thresholded estimate is
    /// computed first.
    ///
    /// # Errors
    ///
    /// As [`prediction`](Self::prediction).
    pub fn combined(self, x_t: &Tensor, combine: impl Fn(&Tensor) -> Tensor) -> Result<Self> {
        let plain = self.thresholding == Thresholding::None && self.boundary.is_none();
        let inner = if plain { self } else { self.computed(x_t)? };
        let epsilon = match inner.epsilon {
            Epsilon::Known(epsilon) => Epsilon::Known(combine(&epsilon)),
            other => other,
        };
        Ok(Self { given: combine(&inner.given), epsilon, ..inner })
    }

    /// The clean data only, thresholded and with the boundary applied.
    ///
    /// # Errors
    ///
    /// As [`prediction`](Self::prediction).
    pub fn x0(&self, x_t: &Tensor) -> Result<Tensor> {
        self.ensure("Estimate::x0", x_t)?;
        let x_t = at_least_float(x_t);
        self.bounded(self.held(&x_t)?, &x_t)
    }

    /// The clean data and the noise.
    ///
    /// # Shapes and units
    ///
    /// - `x_t`: `[batch, ..]`, the state of the estimate
    /// - returns: two tensors of that shape, `Float` or `Double`
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if `x_t` and the estimate differ in shape; as [`Thresholding::apply`].
    pub fn prediction(&self, x_t: &Tensor) -> Result<Prediction> {
        self.ensure("Estimate::prediction", x_t)?;
        let x_t = at_least_float(x_t);
        let held = self.held(&x_t)?;
        let epsilon = match &self.epsilon {
            Epsilon::Sum(sum) => sum.of(&x_t, &self.given)?,
            Epsilon::Known(epsilon) => epsilon.shallow_clone(),
            Epsilon::FromX0 => {
                let Scale { alpha, sigma } = self.level.scale;
                affine(&x_t, &held, 1.0 / sigma, -alpha / sigma)?
            }
        };
        Ok(Prediction { x0: self.bounded(held, &x_t)?, epsilon })
    }

    /// The thresholded clean data, before the boundary.
    fn held(&self, x_t: &Tensor) -> Result<Tensor> {
        self.thresholding.apply(&self.x0.of(x_t, &self.given)?)
    }

    fn bounded(&self, held: Tensor, x_t: &Tensor) -> Result<Tensor> {
        match self.boundary {
            Some((skip, out)) => Ok(affine(&held, x_t, out, skip)?),
            None => Ok(held),
        }
    }

    /// The same estimate, with both tensors computed.
    fn computed(self, x_t: &Tensor) -> Result<Self> {
        let Prediction { x0, epsilon } = self.prediction(x_t)?;
        Ok(Self { given: x0, epsilon: Epsilon::Known(epsilon), ..Self::at(self.level) })
    }

    fn ensure(&self, op: &'static str, x_t: &Tensor) -> Result<()> {
        Ok(ensure_same_shape(op, ("x_t", x_t), ("estimate", &self.given))?)
    }

    /// The bounds, if one interval applies to every value.
    fn clamp(&self) -> Option<(f64, f64)> {
        match self.thresholding {
            Thresholding::Clamp(DataRange {
                low: Bound::Scalar(low),
                high: Bound::Scalar(high),
            }) => Some((low, high)),
            _ => None,
        }
    }

    /// The step with these weights.
    pub(crate) fn step(
        &self,
        x_t: Tensor,
        step: StepCoefficients,
        noise: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "Sampler::step_at";
        self.ensure(OP, &x_t)?;
        let noise = match noise {
            _ if step.noise == 0.0 => None,
            None => return Err(Error::NoiseMissing { op: OP, argument: "noise" }),
            Some(noise) => {
                ensure_same_shape(OP, ("x_t", &x_t), ("noise", noise))?;
                Some(noise)
            }
        };
        let x = State::new(x_t, &self.given);
        let noise = noise.map(|noise| cast(noise, x.0.kind()));
        let mut terms = self.terms(step);
        terms.rest.extend(noise.as_ref().map(|noise| (step.noise, noise)));
        self.sum(x, terms)
    }

    /// The weighted sum of `x_t`, `x0` and `earlier` tensors, and `x0` itself if `keep_x0`.
    pub(crate) fn solver_step(
        &self,
        x_t: Tensor,
        (x_t_weight, x0_weight): (f64, f64),
        earlier: &[(f64, &Tensor)],
        keep_x0: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.ensure("SolverRun::step", &x_t)?;
        if keep_x0 {
            let x0 = self.x0(&x_t)?;
            let mut x = State::new(x_t, &self.given);
            x.sum(x_t_weight, (x0_weight, &x0), earlier)?;
            return Ok((x.0, Some(x0)));
        }
        let (skip, out) = self.boundary.unwrap_or((0.0, 1.0));
        let terms = Terms {
            x_t: x_t_weight + x0_weight * skip,
            x0: x0_weight * out,
            given: 0.0,
            rest: earlier.to_vec(),
        };
        Ok((self.sum(State::new(x_t, &self.given), terms)?, None))
    }

    /// The weighted sum, with `x0` computed in the same pass if possible.
    fn sum(&self, mut x: State, terms: Terms<'_>) -> Result<Tensor> {
        match self.clamp() {
            _ if self.thresholding == Thresholding::None => {
                // The step is a direct sum of output and state.
                let Terms { x_t, x0, given, rest } = terms;
                let (x_t, given) = (x_t + x0 * self.x0.x_t, given + x0 * self.x0.given);
                x.sum(x_t, (given, &self.given), &rest)?;
            }
            Some((lo, hi)) => {
                let Linear { x_t: a, given: b } = self.x0;
                x.clamped(&self.given, Clamped { a, b, lo, hi, c: terms.x_t, d: terms.x0 })?;
                x.sum(1.0, (terms.given, &self.given), &terms.rest)?;
            }
            None => {
                let held = self.held(&x.0)?;
                let rest: Vec<_> = std::iter::once((terms.x0, &held)).chain(terms.rest).collect();
                x.sum(terms.x_t, (terms.given, &self.given), &rest)?;
            }
        }
        Ok(x.0)
    }

    /// A step in terms of `x_t`, the thresholded `x0`, the given tensor and others.
    fn terms(&self, step: StepCoefficients) -> Terms<'_> {
        let (skip, out) = self.boundary.unwrap_or((0.0, 1.0));
        let (x_t, x0) = (step.x0 * skip, step.x0 * out);
        match &self.epsilon {
            Epsilon::Sum(sum) => Terms {
                x_t: x_t + step.epsilon * sum.x_t,
                x0,
                given: step.epsilon * sum.given,
                rest: Vec::new(),
            },
            Epsilon::Known(epsilon) => {
                Terms { x_t, x0, given: 0.0, rest: vec![(step.epsilon, epsilon)] }
            }
            Epsilon::FromX0 => {
                let inner = StepCoefficients { x0, ..step }.without_epsilon(self.level.scale);
                Terms { x_t: x_t + inner.x_t, x0: inner.x0, given: 0.0, rest: Vec::new() }
            }
        }
    }
}

fn cast(tensor: &Tensor, kind: Kind) -> Tensor {
    if tensor.kind() == kind { tensor.shallow_clone() } else { tensor.to_kind(kind) }
}

/// The state of a batch during one step, updated in place if possible.
struct State(Tensor);

impl State {
    /// In `Float` or wider, or in the kind of the output.
    fn new(x_t: Tensor, given: &Tensor) -> Self {
        Self(match given.kind() {
            Kind::Double if x_t.kind() != Kind::Double => x_t.to_kind(Kind::Double),
            _ => match at_least_float(&x_t) {
                same if same.kind() == x_t.kind() => x_t,
                converted => converted,
            },
        })
    }

    /// Whether the memory may be overwritten: it is not shared, and no gradient is recorded through it.
    fn is_own(&self, others: &[&Tensor]) -> bool {
        let records = self.0.requires_grad() || others.iter().any(|other| other.requires_grad());
        let holds = others.iter().all(|other| other.kind() == self.0.kind());
        !records && holds && is_sole_owner(&self.0)
    }

    /// Computes the weighted sum of `x_t` and other tensors.
    fn sum(&mut self, x_t: f64, given: (f64, &Tensor), rest: &[(f64, &Tensor)]) -> Result<()> {
        let all = std::iter::once(&given).chain(rest);
        let terms: Vec<(f64, &Tensor)> =
            all.copied().filter(|(weight, _)| *weight != 0.0).collect();
        let mut terms = terms.as_slice();
        if x_t == 0.0 {
            // Not multiplied by 0, which would keep NaN and infinite values.
            self.0 = match terms {
                [] => self.0.zeros_like(),
                [(a, x)] => *x * *a,
                [(a, x), (b, y), ..] => affine(x, y, *a, *b)?,
            };
            terms = &terms[terms.len().min(2)..];
        } else if terms.is_empty() && x_t != 1.0 {
            self.0 = &self.0 * x_t;
        }
        let mut own = if x_t == 0.0 { 1.0 } else { x_t };
        while !terms.is_empty() {
            terms = match terms {
                [x, y, z, others @ ..] => {
                    self.add_three(own, [*x, *y, *z])?;
                    others
                }
                [x, y, others @ ..] => {
                    self.add_two(own, *x, *y)?;
                    others
                }
                [x, others @ ..] => {
                    self.add(own, *x)?;
                    others
                }
                [] => terms,
            };
            own = 1.0;
        }
        Ok(())
    }

    fn add(&mut self, own: f64, (a, x): (f64, &Tensor)) -> Result<()> {
        if self.is_own(&[x]) {
            return Ok(affine_(&mut self.0, x, own, a)?);
        }
        self.0 = affine(&self.0, x, own, a)?;
        Ok(())
    }

    fn add_two(&mut self, own: f64, (a, x): (f64, &Tensor), (b, y): (f64, &Tensor)) -> Result<()> {
        if self.is_own(&[x, y]) {
            return Ok(affine_noise_(&mut self.0, x, y, own, a, b)?);
        }
        self.0 = affine_noise(&self.0, x, y, own, a, b)?;
        Ok(())
    }

    #[expect(clippy::many_single_char_names, reason = "three terms with their weights")]
    fn add_three(&mut self, own: f64, terms: [(f64, &Tensor); 3]) -> Result<()> {
        let [(a, x), (b, y), (c, z)] = terms;
        let weights = [own, a, b, c];
        if self.is_own(&[x, y, z]) {
            return Ok(affine_four_(&mut self.0, [x, y, z], weights)?);
        }
        self.0 = affine_four([&self.0, x, y, z], weights)?;
        Ok(())
    }

    fn clamped(&mut self, given: &Tensor, numbers: Clamped) -> Result<()> {
        if self.is_own(&[given]) {
            return Ok(affine_clamped_(&mut self.0, given, &numbers)?);
        }
        self.0 = affine_clamped(&self.0, given, &numbers)?;
        Ok(())
    }
}
