//! From noise to a sample, and the states on the way.

mod mixed;

pub use mixed::{MixedRollout, MixedVariant, Visited};

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::Generator;
use ddil_libtorch::ensure_real;
use ddil_schedulers::{
    NoiseSchedule, NoiseScheduleConfig, Prediction, Sampler, SamplerStep, Timesteps,
};
use tch::kind::Element;
use tch::{Device, Kind, Tensor};

use crate::conditioning::Conditioning;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};

/// The states that a denoiser visits from noise to a sample.
#[derive(Debug)]
pub struct Trajectory {
    /// The state at each of `timesteps`, `[batch, ..]`, noisiest first.
    pub states: Vec<Tensor>,
    /// Where the states are.
    pub timesteps: Timesteps,
    /// Where it ends: the sample.
    pub x0: Tensor,
    /// What was said on the way.
    pub conditioning: Conditioning,
}

/// The state that a trajectory starts in: unit noise on a variance-preserving schedule, `sigma noise` on others.
///
/// Unit noise even where the schedule's last `sigma` falls short of 1, as samplers do at inference.
///
/// # Errors
///
/// [`Error::Scheduler`] if `timestep` is off the grid or `noise` holds no real numbers.
pub fn first_state(schedule: &NoiseSchedule, timestep: i64, noise: &Tensor) -> Result<Tensor> {
    ensure_real("first_state", "noise", noise)?;
    match schedule.config() {
        NoiseScheduleConfig::Vp(_) => Ok(noise.shallow_clone()),
        _ => Ok(noise * schedule.scale_at(timestep)?.sigma),
    }
}

/// Runs a denoiser from noise to a sample and keeps every state on the way, without gradients.
///
/// # Shapes and units
///
/// - `noise`: `[batch, ..]`, unit normal; becomes the first state, see [`first_state`]
/// - `conditioning`: parts of `batch` rows
/// - `generator`: for the fresh noise of samplers that need some
///
/// # Errors
///
/// [`Error::Scheduler`] if the sampler needs noise and there is no generator; [`Error::Conditioning`] or
/// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if the arguments do not fit each other; whatever the denoiser says.
///
/// # Example
///
/// ```
/// use ddil_core::{Conditioning, Denoiser, Result, rollout};
/// use ddil_schedulers::{Ddim, NoiseSchedule, NoiseScheduleConfig, Prediction, TimestepSpacing, Timesteps};
/// use tch::{Tensor, kind};
///
/// /// Believes that all data are 0.
/// struct Zero(NoiseSchedule);
///
/// impl Denoiser for Zero {
///     fn predict(&self, x_t: &Tensor, timesteps: &Tensor, _: &Conditioning) -> Result<Prediction> {
///         Ok(Prediction::from_x0(&self.0, x_t.zeros_like(), x_t, timesteps)?)
///     }
///
///     fn schedule(&self) -> &NoiseSchedule {
///         &self.0
///     }
/// }
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// let noise = Tensor::ones([2, 3], kind::FLOAT_CPU);
/// let teacher = Zero(schedule.clone());
/// let trajectory =
///     rollout(&teacher, &Ddim::new(schedule), &timesteps, noise, &Conditioning::none(), None)?;
/// assert_eq!(trajectory.states.len(), 4);
/// assert_eq!(trajectory.x0.abs().max().double_value(&[]), 0.0);
/// # Ok::<(), ddil_core::Error>(())
/// ```
pub fn rollout(
    denoiser: &dyn Denoiser,
    sampler: &dyn Sampler,
    timesteps: &Timesteps,
    noise: Tensor,
    conditioning: &Conditioning,
    generator: Option<&mut Generator>,
) -> Result<Trajectory> {
    rollout_keeping(denoiser, sampler, timesteps, timesteps, noise, conditioning, generator)
}

/// As [`rollout`], keeping the states at `kept` alone: a teacher that walks a finer grid than its student.
///
/// # Errors
///
/// As [`rollout`], and [`Error::Invalid`] if a timestep of `kept` is not visited.
pub fn rollout_keeping(
    denoiser: &dyn Denoiser,
    sampler: &dyn Sampler,
    timesteps: &Timesteps,
    kept: &Timesteps,
    noise: Tensor,
    conditioning: &Conditioning,
    generator: Option<&mut Generator>,
) -> Result<Trajectory> {
    ensure_part_of("timesteps", kept, timesteps)?;
    let mut states = Vec::with_capacity(kept.len());
    let fresh = Fresh::OfBatch(generator);
    let x0 = run((denoiser, sampler), timesteps, noise, conditioning, fresh, |timestep, x_t| {
        if kept.as_slice().contains(&timestep) {
            states.push(x_t.shallow_clone());
        }
    })?;
    let conditioning = conditioning.shallow_clone();
    Ok(Trajectory { states, timesteps: kept.clone(), x0, conditioning })
}

/// Runs a denoiser from noise to a sample and keeps that alone; as [`rollout`] otherwise.
///
/// # Errors
///
/// As [`rollout`].
pub fn sample(
    denoiser: &dyn Denoiser,
    sampler: &dyn Sampler,
    timesteps: &Timesteps,
    noise: Tensor,
    conditioning: &Conditioning,
    generator: Option<&mut Generator>,
) -> Result<Tensor> {
    let fresh = Fresh::OfBatch(generator);
    run((denoiser, sampler), timesteps, noise, conditioning, fresh, |_, _| {})
}

/// As [`sample`], with a generator for each sample: what one becomes depends on no other, but for rounding.
///
/// # Shapes and units
///
/// - `generators`: one a sample, on any device; none for a sampler that needs no noise
///
/// # Errors
///
/// As [`sample`], and [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) for another number of generators.
///
/// # Example
///
/// ```
/// use ddil_core::{Conditioning, Denoiser, RandomStreams, Result, Stream, sample_each};
/// use ddil_schedulers::{Lcm, NoiseSchedule, NoiseScheduleConfig, Prediction, Timesteps};
/// use tch::{Device, Kind, Tensor};
///
/// /// Believes that all data are what they look like.
/// struct Same(NoiseSchedule);
///
/// impl Denoiser for Same {
///     fn predict(&self, x_t: &Tensor, timesteps: &Tensor, _: &Conditioning) -> Result<Prediction> {
///         Ok(Prediction::from_x0(&self.0, x_t.shallow_clone(), x_t, timesteps)?)
///     }
///
///     fn schedule(&self) -> &NoiseSchedule {
///         &self.0
///     }
/// }
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let timesteps = Timesteps::lcm(1000, 50, 2)?;
/// let (model, sampler) = (Same(schedule.clone()), Lcm::new(schedule));
/// let streams = RandomStreams::new(0, 0);
/// let run = |rows: std::ops::Range<u64>| {
///     let noise = Tensor::zeros([rows.end as i64 - rows.start as i64, 3], (Kind::Float, Device::Cpu));
///     let generators = rows.map(|row| streams.generator(row, Stream::Sample, Device::Cpu));
///     let mut generators = generators.collect::<Result<Vec<_>>>()?;
///     sample_each(&model, &sampler, &timesteps, noise, &Conditioning::none(), &mut generators)
/// };
/// assert_eq!(run(0..3)?.get(2), run(2..3)?.get(0));
/// # Ok::<(), ddil_core::Error>(())
/// ```
pub fn sample_each(
    denoiser: &dyn Denoiser,
    sampler: &dyn Sampler,
    timesteps: &Timesteps,
    noise: Tensor,
    conditioning: &Conditioning,
    generators: &mut [Generator],
) -> Result<Tensor> {
    ensure_real("sample_each", "noise", &noise)?;
    let batch = noise.size().first().copied().unwrap_or(0);
    if sampler.needs_noise() && batch != generators.len() as i64 {
        let expected = format!("{} rows, one a generator", generators.len());
        let (op, shape) = ("sample_each", noise.size());
        return Err(Error::Argument(ArgumentError::Shape { op, name: "noise", shape, expected }));
    }
    let fresh = Fresh::OfEach(generators);
    run((denoiser, sampler), timesteps, noise, conditioning, fresh, |_, _| {})
}

/// Runs each sample of a batch to a timestep of its own; at each step only those not yet there are evaluated.
///
/// # Shapes and units
///
/// - `noise`: `[batch, ..]`, unit normal
/// - `targets`: one timestep a sample, on the training grid but not necessarily in `timesteps`: the last step goes
///   there straight; -1 is clean data
/// - returns: `[batch, ..]`
///
/// # Errors
///
/// As [`rollout`], and [`Error::Invalid`] if a target is noisier than the first of `timesteps`.
pub fn rollout_to(
    denoiser: &dyn Denoiser,
    sampler: &dyn Sampler,
    timesteps: &Timesteps,
    noise: &Tensor,
    conditioning: &Conditioning,
    targets: &[i64],
    generator: Option<&mut Generator>,
) -> Result<Tensor> {
    const OP: &str = "rollout_to";
    let _no_grad = tch::no_grad_guard();
    ensure_ready(OP, sampler, noise, conditioning, generator.is_some())?;
    let path = timesteps.as_slice();
    ensure_targets(OP, noise, path[0], targets)?;
    let x_t = first_state(denoiser.schedule(), path[0], noise)?;
    walk((denoiser, sampler), path, &x_t, conditioning, targets, generator)
}

/// Who answers, and how a step follows from the answer.
type Actor<'a> = (&'a dyn Denoiser, &'a dyn Sampler);

/// Where the noise that a sampler renews comes from.
enum Fresh<'a> {
    /// One draw for a whole batch.
    OfBatch(Option<&'a mut Generator>),
    /// One draw for each sample.
    OfEach(&'a mut [Generator]),
}

impl Fresh<'_> {
    /// Noise in the form of `like`; none without a generator.
    fn like(&mut self, like: &Tensor) -> Result<Option<Tensor>> {
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
}

/// Walks a whole grid and shows every state to `visit`.
fn run(
    (denoiser, sampler): Actor<'_>,
    timesteps: &Timesteps,
    noise: Tensor,
    conditioning: &Conditioning,
    mut fresh: Fresh<'_>,
    mut visit: impl FnMut(i64, &Tensor),
) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let can_draw = !matches!(fresh, Fresh::OfBatch(None));
    ensure_ready("rollout", sampler, &noise, conditioning, can_draw)?;
    let batch = noise.size()[0];
    let mut x_t = first_state(denoiser.schedule(), timesteps.as_slice()[0], &noise)?;
    drop(noise);
    for (timestep, prev) in timesteps.pairs() {
        visit(timestep, &x_t);
        let [timestep, prev] = [timestep, prev].map(|at| filled(batch, at, x_t.device()));
        let prediction = denoiser.predict(&x_t, &timestep, conditioning)?;
        x_t = renewed_step(sampler, &prediction, &timestep, &prev, &mut fresh)?;
    }
    Ok(x_t)
}

/// One call of the network and one step of the sampler.
fn step(
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

/// One step of the sampler, with fresh noise if it wants some.
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

fn renewed_step(
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

/// The part of a batch that has not arrived yet, at one level of a path.
struct Leg<'a> {
    level: usize,
    x_t: &'a Tensor,
    conditioning: &'a Conditioning,
    /// Where each goes in this step.
    next: &'a [i64],
    /// Which samples of the whole batch these are.
    rows: &'a [usize],
}

/// Moves a batch, all at `path[0]`, until each sample is at its target; `advance` makes one step of those that are
/// not yet there.
fn for_unfinished(
    path: &[i64],
    x_t: &Tensor,
    conditioning: &Conditioning,
    targets: &[i64],
    mut advance: impl FnMut(&Leg<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    // Those with the longest way come first, so that the unfinished are always a front part of the batch.
    let mut rows: Vec<usize> = (0..targets.len()).collect();
    rows.sort_by_key(|&row| targets[row]);
    let order = index(&rows, x_t.device());
    let mut x_t = x_t.index_select(0, &order);
    let conditioning = conditioning.index_select(&order)?;
    for (level, &timestep) in path.iter().enumerate() {
        let active = rows.partition_point(|&row| targets[row] < timestep);
        if active == 0 {
            break;
        }
        let after = path.get(level + 1).copied().unwrap_or(-1);
        let next: Vec<i64> = rows[..active].iter().map(|&row| targets[row].max(after)).collect();
        let (n, batch) = (active as i64, rows.len() as i64);
        let front = Tensor::arange(n, (Kind::Int64, x_t.device()));
        let leg = Leg {
            level,
            x_t: &x_t.narrow(0, 0, n),
            conditioning: &conditioning.index_select(&front)?,
            next: &next,
            rows: &rows[..active],
        };
        let stepped = advance(&leg)?;
        x_t = if n == batch {
            stepped
        } else {
            Tensor::f_cat(&[stepped, x_t.narrow(0, n, batch - n)], 0)
                .map_err(Error::torch("rollout"))?
        };
    }
    Ok(x_t.index_select(0, &index(&inverse(&rows), x_t.device())))
}

/// Moves a batch, all at `path[0]`, along `path` until each sample is at its target.
fn walk(
    actor: Actor<'_>,
    path: &[i64],
    x_t: &Tensor,
    conditioning: &Conditioning,
    targets: &[i64],
    mut generator: Option<&mut Generator>,
) -> Result<Tensor> {
    for_unfinished(path, x_t, conditioning, targets, |leg| {
        let prev = on_device(leg.next, leg.x_t.device());
        let generator = generator.as_deref_mut();
        step(actor, leg.x_t, path[leg.level], &prev, leg.conditioning, generator)
    })
}

fn ensure_ready(
    op: &'static str,
    sampler: &dyn Sampler,
    noise: &Tensor,
    conditioning: &Conditioning,
    has_generator: bool,
) -> Result<()> {
    ensure_real(op, "noise", noise)?;
    let Some(&batch) = noise.size().first() else {
        let expected = "[batch, ..]".to_owned();
        return Err(Error::Argument(ArgumentError::Shape {
            op,
            name: "noise",
            shape: vec![],
            expected,
        }));
    };
    conditioning.ensure_batch(op, batch)?;
    if sampler.needs_noise() && !has_generator {
        return Err(ddil_schedulers::Error::NoiseMissing { op }.into());
    }
    Ok(())
}

fn ensure_targets(op: &'static str, noise: &Tensor, first: i64, targets: &[i64]) -> Result<()> {
    if noise.size().first() != Some(&(targets.len() as i64)) {
        let expected = format!("{} rows, one a target", targets.len());
        return Err(Error::Argument(ArgumentError::Shape {
            op,
            name: "noise",
            shape: noise.size(),
            expected,
        }));
    }
    match targets.iter().find(|target| !(-1..=first).contains(*target)) {
        Some(target) => Err(Error::Invalid(Invalid::new(
            "targets",
            target,
            format!("in -1..={first}; the trajectory starts at {first}"),
        ))),
        None => Ok(()),
    }
}

/// Checks that a finer grid visits every timestep of a coarser one.
pub(crate) fn ensure_part_of(
    field: &'static str,
    coarse: &Timesteps,
    fine: &Timesteps,
) -> Result<()> {
    match coarse.as_slice().iter().find(|timestep| !fine.as_slice().contains(timestep)) {
        Some(timestep) => Err(Error::Invalid(Invalid::new(
            field,
            format!("{timestep} among {:?}", coarse.as_slice()),
            format!("one of the timesteps that are visited, {:?}", fine.as_slice()),
        ))),
        None => Ok(()),
    }
}

/// The same timestep for a whole batch.
fn filled(batch: i64, timestep: i64, device: Device) -> Tensor {
    Tensor::full([batch], timestep, (Kind::Int64, device))
}

/// Rows of a batch as libtorch takes them.
pub(crate) fn index(rows: &[usize], device: Device) -> Tensor {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    on_device(&rows, device)
}

/// Numbers of the host on a device, without waiting for it: a plain copy ends when all that was queued before it has, and
/// in the middle of an update that is whole passes of networks.
pub(crate) fn on_device<T: Element>(numbers: &[T], device: Device) -> Tensor {
    Tensor::from_slice(numbers).to_device_(device, T::KIND, true, false)
}

/// The permutation that undoes another.
pub(crate) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut undone = vec![0; order.len()];
    for (to, &from) in order.iter().enumerate() {
        undone[from] = to;
    }
    undone
}
