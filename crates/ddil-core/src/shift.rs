//! The shift between the states of inference and those of training.

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::Generator;
use ddil_libtorch::ensure_real;
use ddil_schedulers::{Sampler, Timesteps};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::random::{RandomStreams, Stream};
use crate::rollout::Rollout;
use crate::states::Data;

/// Settings of [`measure_shift`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ShiftConfig {
    /// Number of directions of the sliced distance; default 256.
    pub projections: i64,
    /// Maximum number of values kept along each dimension after the channels, by averaging; default all. 8 is usual for
    /// latents.
    pub pool: Option<i64>,
    /// States per rollout, and rows of the distance matrix that are in memory at once; default 512.
    pub batch_size: i64,
}

impl Default for ShiftConfig {
    fn default() -> Self {
        Self { projections: 256, pool: None, batch_size: 512 }
    }
}

impl ShiftConfig {
    /// The same settings with a change: `ShiftConfig::default().with(|config| config.pool = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn ensure(&self) -> Result<()> {
        let Self { projections, pool, batch_size } = *self;
        if projections > 0 && batch_size > 0 && pool.is_none_or(|size| size > 0) {
            return Ok(());
        }
        Err(Error::Invalid(Invalid::new(
            "shift.projections, shift.pool, shift.batch_size",
            format!("{projections}, {pool:?}, {batch_size}"),
            "at least 1 each",
        )))
    }
}

/// Distances between two sets of states.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Distances {
    /// Mean over random directions of the squared 2-Wasserstein distance along each ([Bonneel et al.
    /// 2015](https://doi.org/10.1007/s10851-014-0506-3)); at least 0, and above it by chance alone.
    pub sliced_w2: f64,
    /// `2 E|X - Y| - E|X - X'| - E|Y - Y'|`, unbiased: around 0 for equal distributions, then of either sign ([Székely
    /// and Rizzo 2013](https://doi.org/10.1016/j.jspi.2013.03.018)).
    pub energy: f64,
    /// Root mean square over channels of the difference of means.
    pub mean_gap: f64,
    /// Mean over channels of the second standard deviation minus the first: above 0 if states of inference are spread
    /// wider than those of training, as with strong guidance.
    pub std_gap: f64,
}

/// The shift at one timestep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ShiftAt {
    /// The timestep.
    pub timestep: i64,
    /// From the states of training to those of inference.
    pub shift: Distances,
    /// Between two sets from one distribution, of the same size: the effect of chance alone.
    pub null: Distances,
}

/// The shift over a grid, one number per distance.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ShiftSummary {
    /// `sum (D - D_null) / sum D_null` of the sliced distance: 0 means no shift, 1 a shift as large as the effect of
    /// chance.
    pub relative_sliced_w2: f64,
    /// `sum (D - D_null)` of the energy distance. It is not divided by its null, which is around 0.
    pub excess_energy: f64,
}

/// The shift at each timestep of a grid.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ShiftReport {
    /// Noisiest first.
    pub timesteps: Vec<ShiftAt>,
}

impl FromIterator<ShiftAt> for ShiftReport {
    /// From the shift at each timestep, noisiest first.
    fn from_iter<I: IntoIterator<Item = ShiftAt>>(timesteps: I) -> Self {
        Self { timesteps: timesteps.into_iter().collect() }
    }
}

impl ShiftReport {
    /// The shift over the grid, one number per distance.
    pub fn summary(&self) -> ShiftSummary {
        let sum = |f: &dyn Fn(&ShiftAt) -> f64| -> f64 { self.timesteps.iter().map(f).sum() };
        let null = sum(&|at| at.null.sliced_w2);
        let excess = sum(&|at| at.shift.sliced_w2 - at.null.sliced_w2);
        ShiftSummary {
            relative_sliced_w2: if null > 0.0 { excess / null } else { 0.0 },
            excess_energy: sum(&|at| at.shift.energy - at.null.energy),
        }
    }
}

/// Compares states of training and inference at one timestep.
///
/// # Shapes and units
///
/// - `train`, `inference`, both of `null`: `[n, ..]`, the same shape; `null` are two sets from one distribution
/// - `generator`: for the directions of the sliced distance, the same for both comparisons
///
/// # Errors
///
/// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if shapes differ or there are fewer than two states;
/// [`Error::Invalid`] for the settings.
pub fn shift_at(
    timestep: i64,
    train: &Tensor,
    inference: &Tensor,
    null: (&Tensor, &Tensor),
    config: &ShiftConfig,
    generator: &mut Generator,
) -> Result<ShiftAt> {
    config.ensure()?;
    let _no_grad = tch::no_grad_guard();
    ensure_real("shift_at", "train", train)?;
    for (name, states) in [("inference", inference), ("null.0", null.0), ("null.1", null.1)] {
        ensure_real("shift_at", name, states)?;
        if states.size() != train.size() || train.dim() < 2 || train.size()[0] < 2 {
            return Err(Error::Argument(ArgumentError::Shape {
                op: "shift_at",
                name,
                shape: states.size(),
                expected: format!("that of `train`, {:?}, with at least 2 rows", train.size()),
            }));
        }
    }
    let prepare = |states: &Tensor| pooled(&states.to_kind(Kind::Float), config.pool);
    let (train, inference) = (prepare(train)?, prepare(inference)?);
    let null = (prepare(null.0)?, prepare(null.1)?);
    let directions = directions(&train, config.projections, generator)?;
    Ok(ShiftAt {
        timestep,
        shift: distances(&train, &inference, &directions, config.batch_size)?,
        null: distances(&null.0, &null.1, &directions, config.batch_size)?,
    })
}

/// Inputs of [`measure_shift`].
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct ShiftRequest<'a> {
    /// Dataset samples. One half represents training and provides the conditioning of the rollouts, so that both sides
    /// have the same; the other half is the null. If their number is odd, the last is not used.
    pub data: &'a Data,
    /// The student, as it samples.
    pub student: &'a dyn Denoiser,
    /// Its sampler, exactly as deployed.
    pub sampler: &'a dyn Sampler,
    /// Its grid.
    pub timesteps: &'a Timesteps,
    /// The student's update at the measurement.
    pub step: u64,
    /// Random numbers.
    pub streams: RandomStreams,
}

impl<'a> ShiftRequest<'a> {
    /// A measurement before the first update; [`at_step`](Self::at_step) is one at a later one.
    pub fn new(
        data: &'a Data,
        student: &'a dyn Denoiser,
        sampler: &'a dyn Sampler,
        timesteps: &'a Timesteps,
        streams: RandomStreams,
    ) -> Self {
        Self { data, student, sampler, timesteps, step: 0, streams }
    }

    /// The same at the student's update `step`, with its random numbers.
    #[must_use]
    pub fn at_step(self, step: u64) -> Self {
        Self { step, ..self }
    }
}

/// Measures the shift from the forward marginals, which plain distillation trains on, to the states that a student
/// visits when it samples, at each timestep of its grid.
///
/// # Errors
///
/// As [`shift_at`], and errors of the student.
pub fn measure_shift(request: &ShiftRequest<'_>, config: &ShiftConfig) -> Result<ShiftReport> {
    config.ensure()?;
    let _no_grad = tch::no_grad_guard();
    let x0 = &request.data.x0;
    ensure_real("measure_shift", "data.x0", x0)?;
    let half = x0.size().first().copied().unwrap_or(0) / 2;
    if half < 2 {
        let expected = "at least 4 samples".to_owned();
        let (op, shape) = ("measure_shift", x0.size());
        return Err(Error::Argument(ArgumentError::Shape { op, name: "data.x0", shape, expected }));
    }
    let mut generator = request.streams.generator(request.step, Stream::Projection, x0.device())?;
    let visited = inference_states(request, half, config.batch_size, &mut generator)?;
    let noised = |start: i64, timestep: i64, generator: &mut Generator| -> Result<Tensor> {
        let x0 = x0.narrow(0, start, half);
        let noise = generator.normal(x0.size(), x0.kind())?;
        let timesteps = Tensor::full([half], timestep, (Kind::Int64, x0.device()));
        Ok(request.sampler.schedule().add_noise(&x0, &noise, &timesteps)?)
    };
    let timesteps = request.timesteps.as_slice().iter().zip(&visited).map(|(&t, inference)| {
        let train = noised(0, t, &mut generator)?;
        let other = noised(half, t, &mut generator)?;
        shift_at(t, &train, inference, (&train, &other), config, &mut generator)
    });
    timesteps.collect()
}

impl std::fmt::Debug for ShiftRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShiftRequest")
            .field("timesteps", self.timesteps)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

/// The states at which `n` samples enter the network, one tensor per timestep.
fn inference_states(
    request: &ShiftRequest<'_>,
    n: i64,
    batch_size: i64,
    generator: &mut Generator,
) -> Result<Vec<Tensor>> {
    let x0 = &request.data.x0;
    let mut visited: Vec<Vec<Tensor>> = Vec::new();
    visited.resize_with(request.timesteps.len(), Vec::new);
    let mut start = 0;
    while start < n {
        let rows = batch_size.min(n - start);
        let order = Tensor::arange_start(start, start + rows, (Kind::Int64, x0.device()));
        let conditioning = request.data.conditioning.index_select(&order)?;
        let mut shape = x0.size();
        shape[0] = rows;
        let noise = generator.normal(&shape, x0.kind())?;
        let rollout = Rollout::new(request.student, request.sampler, request.timesteps)
            .conditioning(&conditioning)
            .generator(&mut *generator);
        let trajectory = rollout.run(noise)?;
        for (visited, state) in visited.iter_mut().zip(trajectory.states) {
            visited.push(state);
        }
        start += rows;
    }
    visited
        .iter()
        .map(|parts| Tensor::f_cat(parts, 0).map_err(Error::torch("measure_shift")))
        .collect()
}

/// States averaged to at most `size` values along each dimension after the channels.
fn pooled(states: &Tensor, size: Option<i64>) -> Result<Tensor> {
    const OP: &str = "shift_at";
    let Some(size) = size else { return Ok(states.shallow_clone()) };
    let to: Vec<i64> = states.size().iter().skip(2).map(|n| size.min(*n)).collect();
    match to.len() {
        1 => states.f_adaptive_avg_pool1d(to),
        2 => states.f_adaptive_avg_pool2d(to),
        3 => states.f_adaptive_avg_pool3d(to),
        // Vectors have nothing to average over; beyond video there is no such operation.
        _ => return Ok(states.shallow_clone()),
    }
    .map_err(Error::torch(OP))
}

fn distances(
    first: &Tensor,
    second: &Tensor,
    directions: &Tensor,
    block: i64,
) -> Result<Distances> {
    const OP: &str = "shift_at";
    let (mean_gap, std_gap) = moment_gaps(first, second);
    let sliced_w2 = sliced_w2(first, second, directions);
    let (first, second) = (first.flatten(1, -1), second.flatten(1, -1));
    let energy = energy_distance(&first, &second, block).map_err(Error::torch(OP))?;
    Ok(Distances { sliced_w2, energy, mean_gap, std_gap })
}

/// Random unit vectors for states like these, one per column.
pub(crate) fn directions(
    states: &Tensor,
    projections: i64,
    generator: &mut Generator,
) -> Result<Tensor> {
    let width: i64 = states.size().iter().skip(1).product();
    let directions = generator.normal([width, projections], Kind::Float)?;
    let norms = directions.square().sum_dim_intlist(0, true, Kind::Float).sqrt();
    Ok((directions / norms).to_device(states.device()))
}

/// Mean over directions of the squared distance between two sets of the same size, in `Float`. Waits for the device.
///
/// `ddil_metrics::sliced_wasserstein` is the same measure in `Double` for features; here the states remain in their
/// kind on their device, and the caller chooses the directions.
pub(crate) fn sliced_w2(first: &Tensor, second: &Tensor, directions: &Tensor) -> f64 {
    let sorted = |states: &Tensor| states.flatten(1, -1).matmul(directions).sort(0, false).0;
    (sorted(first) - sorted(second)).square().mean(Kind::Double).double_value(&[])
}

/// `2 E|X - Y| - E|X - X'| - E|Y - Y'|`, where no state is compared with itself, in `Float` with sums in `Double`;
/// `ddil_metrics::energy_distance` is the same in `Double` throughout.
fn energy_distance(
    first: &Tensor,
    second: &Tensor,
    block: i64,
) -> std::result::Result<f64, tch::TchError> {
    let n = first.size()[0] as f64;
    let across = total_distance(first, second, block)? / (n * n);
    let within = total_distance(first, first, block)? + total_distance(second, second, block)?;
    let energy: Tensor = across * 2.0 - within / (n * (n - 1.0));
    energy.f_double_value(&[])
}

/// Sum of all pairwise Euclidean distances, some rows at a time.
fn total_distance(
    first: &Tensor,
    second: &Tensor,
    block: i64,
) -> std::result::Result<Tensor, tch::TchError> {
    /// Differences rather than a matrix product, which would give a state a nonzero distance to itself.
    const WITHOUT_PRODUCT: i64 = 2;
    let mut total = Tensor::zeros([], (Kind::Double, first.device()));
    for rows in first.f_split(block, 0)? {
        let distances = Tensor::f_cdist(&rows, second, 2.0, WITHOUT_PRODUCT)?;
        total += distances.f_sum(Kind::Double)?;
    }
    Ok(total)
}

/// Root mean square over channels of the difference of means; mean difference of standard deviations.
fn moment_gaps(first: &Tensor, second: &Tensor) -> (f64, f64) {
    let moments = |states: &Tensor| {
        // One row per channel, over samples and places.
        let rows = states.to_kind(Kind::Double).transpose(0, 1).flatten(1, -1);
        (rows.mean_dim(1, false, Kind::Double), rows.std_dim(1, true, false))
    };
    let ((mean, std), (other_mean, other_std)) = (moments(first), moments(second));
    let mean_gap = (other_mean - mean).square().mean(Kind::Double).sqrt();
    let std_gap = (other_std - std).mean(Kind::Double);
    (mean_gap.double_value(&[]), std_gap.double_value(&[]))
}
