//! Measures how much thresholding changes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ddil_libtorch::ArgumentError;
use ddil_libtorch::{ensure_dense, ensure_real};
use ddil_schedulers::{NoiseSchedule, Thresholding};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::rows::on_device;
use crate::states::Source;
use crate::tally::Tally;

/// Measures the share of clean values that a [`Thresholded`](super::Thresholded) denoiser changes, by timestep and by
/// source of the state.
///
/// Clones share one meter: keep one to read, pass another to [`Thresholded::metered`]. It sums on the device, does not
/// synchronize before [`take`](Self::take), and its memory does not grow if it is never read.
///
/// A denoiser has no information about the source of its rows. Callers that evaluate whole batches of
/// [`States`](crate::States) set it once per batch with [`rows_are`](Self::rows_are); other rows have no source.
///
/// Rule of thumb for clamping to the data range: below 0.5 % at little noise, a few percent of guided estimates at
/// much.
///
/// [`Thresholded::metered`]: super::Thresholded::metered
///
/// # Example
///
/// ```
/// use ddil_core::{ClipMeter, Conditioning, Denoiser, Result, Source, Thresholded};
/// use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Prediction, Thresholding};
/// use tch::{Tensor, kind};
///
/// /// Predicts 2 for all data.
/// struct Two(NoiseSchedule);
///
/// impl Denoiser for Two {
///     fn predict(&self, x_t: &Tensor, timesteps: &Tensor, _: &Conditioning) -> Result<Prediction> {
///         Ok(Prediction::from_x0(&self.0, x_t.full_like(2.0), x_t, timesteps)?)
///     }
///
///     fn schedule(&self) -> &NoiseSchedule {
///         &self.0
///     }
/// }
///
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let meter = ClipMeter::new(&schedule);
/// let teacher = Thresholded::new(Two(schedule), Thresholding::clamp_pixels())?.metered(meter.clone());
///
/// meter.rows_are(&[Source::Forward, Source::Student]);
/// let (x_t, timesteps) = (Tensor::zeros([2, 3], kind::FLOAT_CPU), Tensor::from_slice(&[999_i64, 499]));
/// let _ = teacher.predict(&x_t, &timesteps, &Conditioning::none())?;
///
/// let clipped = meter.take()?;
/// assert_eq!(clipped[0].figure("teacher"), ("clipped_teacher_forward_999".to_owned(), 1.0));
/// assert_eq!(clipped[1].figure("teacher"), ("clipped_teacher_student_499".to_owned(), 1.0));
/// # Ok::<(), ddil_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ClipMeter(Arc<Mutex<Meter>>);

#[derive(Debug)]
struct Meter {
    num_train_timesteps: usize,
    /// Sources beyond [`Source::ALL`], in order of appearance.
    added: Vec<Source>,
    /// One place per timestep, for each source and for rows without a source.
    tally: Tally,
    rows: Rows,
}

/// The sources of the rows of the next calls.
#[derive(Debug, Default)]
struct Rows {
    /// Indices in [`Source::ALL`].
    sources: Vec<i64>,
    /// The same on the device of the calls.
    on_device: Option<Tensor>,
}

/// Index of rows without a source: after those that have one.
const NO_SOURCE: usize = Source::ALL.len();

/// The share of values that thresholding changed at one timestep, for states of one source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClippedFraction {
    /// The timestep.
    pub timestep: i64,
    /// The source of the states; none if it was not set.
    pub source: Option<Source>,
    /// Share of the values that were changed.
    pub fraction: f64,
    /// Number of samples measured.
    pub samples: u64,
}

impl ClippedFraction {
    /// Name and value for the log: `clipped_teacher_forward_999` for the network `teacher`; without the source if there
    /// is none.
    pub fn figure(&self, network: &str) -> (String, f64) {
        let Self { timestep, source, fraction, .. } = *self;
        let name = match source {
            Some(source) => format!("clipped_{network}_{}_{timestep}", source.as_str()),
            None => format!("clipped_{network}_{timestep}"),
        };
        (name, fraction)
    }
}

impl ClipMeter {
    /// An empty meter, for networks on `schedule`.
    pub fn new(schedule: &NoiseSchedule) -> Self {
        let num_train_timesteps = schedule.num_train_timesteps() as usize;
        let tally = Tally::new((NO_SOURCE + 1) * num_train_timesteps);
        let (added, rows) = (vec![], Rows::default());
        Self(Arc::new(Mutex::new(Meter { num_train_timesteps, added, tally, rows })))
    }

    /// Sets the sources of the rows of all following calls, in their order, until it is called again.
    ///
    /// Calls with another number of rows are counted without a source.
    pub fn rows_are(&self, sources: &[Source]) {
        let mut meter = self.meter();
        let sources = sources.iter().map(|&source| meter.place_of(source) as i64).collect();
        meter.rows = Rows { sources, on_device: None };
    }

    /// The shares since the last call, sources in the order of [`Source::ALL`] and noisiest first within each; then
    /// resets. Waits for the device.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if a device cannot be read.
    pub fn take(&self) -> Result<Vec<ClippedFraction>> {
        let mut meter = self.meter();
        let num_train_timesteps = meter.num_train_timesteps;
        let tally = meter.tally.take("ClipMeter::take")?;
        let mut clipped = Vec::new();
        let added = meter.added.clone().into_iter().map(Some);
        let sources = Source::ALL.into_iter().map(Some).chain([None]).chain(added);
        for (source, at) in sources.zip(tally.chunks(num_train_timesteps.max(1))) {
            let measured = at.iter().enumerate().rev().filter(|(_, (_, count))| *count > 0.0);
            clipped.extend(measured.map(|(timestep, (sum, count))| ClippedFraction {
                timestep: timestep as i64,
                source,
                fraction: sum / count,
                samples: *count as u64,
            }));
        }
        Ok(clipped)
    }

    /// Adds what `thresholding` would change in a batch: for estimates that do not come from a
    /// [`Thresholded`](super::Thresholded) denoiser, such as a student's inside a loss.
    ///
    /// # Shapes and units
    ///
    /// - `x0`: `[batch, ..]`, data scale, not yet thresholded
    /// - `timesteps`: `[batch]`, `Int64`, in training timesteps, not -1
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] for the settings or a range that does not fit `x0`;
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if `timesteps` does not fit it, [`Error::Torch`]
    /// for one off the grid.
    pub fn measure(
        &self,
        thresholding: &Thresholding,
        x0: &Tensor,
        timesteps: &Tensor,
    ) -> Result<()> {
        const OP: &str = "ClipMeter::measure";
        let _no_grad = tch::no_grad_guard();
        ensure_real(OP, "x0", x0)?;
        ensure_dense(OP, "timesteps", timesteps)?;
        let (shape, batch) = (timesteps.size(), x0.size().first().copied());
        if shape.len() != 1 || shape.first().copied() != batch || timesteps.kind() != Kind::Int64 {
            let expected = format!("[{}], Int64, one per sample", batch.unwrap_or(0));
            return Err(Error::Argument(ArgumentError::Shape {
                op: OP,
                name: "timesteps",
                shape,
                expected,
            }));
        }
        let fractions = thresholding.changed_fraction(&x0.detach())?;
        let timesteps = timesteps.to_device(fractions.device());
        let mut meter = self.meter();
        let num_train_timesteps = meter.num_train_timesteps as i64;
        let sources = meter.rows.sources_of(&timesteps) * num_train_timesteps;
        let places = (NO_SOURCE + 1 + meter.added.len()) * meter.num_train_timesteps;
        meter.tally.grow(OP, places)?;
        meter.tally.add(OP, &(sources + timesteps), &fractions)
    }

    fn meter(&self) -> MutexGuard<'_, Meter> {
        // The sums are valid even after a panic: they are added to in one operation.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Meter {
    fn place_of(&mut self, source: Source) -> usize {
        // Rows without a source have the index in between.
        let place = source.place_among(&self.added).unwrap_or_else(|| {
            self.added.push(source);
            NO_SOURCE + self.added.len() - 1
        });
        if place < NO_SOURCE { place } else { place + 1 }
    }
}

impl Rows {
    /// The index of each row's source.
    fn sources_of(&mut self, timesteps: &Tensor) -> Tensor {
        let device = timesteps.device();
        if timesteps.size() != [self.sources.len() as i64] {
            return timesteps.full_like(NO_SOURCE as i64);
        }
        let known = self.on_device.take().filter(|sources| sources.device() == device);
        let sources = known.unwrap_or_else(|| on_device(&self.sources, device));
        self.on_device.insert(sources).shallow_clone()
    }
}
