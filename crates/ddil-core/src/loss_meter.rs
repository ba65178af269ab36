//! Compares a student's loss on its own states with its loss on noised data.

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::ensure_real;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::rows::on_device;
use crate::states::{Source, States};
use crate::tally::Tally;

/// Sums per-sample losses by source and grid index.
///
/// It sums on the device, does not synchronize before [`take`](Self::take), and its memory does not grow if it is never
/// read.
///
/// # Example
///
/// ```
/// use ddil_core::{LossMeter, Source, States};
/// use ddil_schedulers::{TimestepSpacing, Timesteps};
/// use tch::{Tensor, kind};
///
/// let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
/// let x_t = Tensor::zeros([3, 2], kind::FLOAT_CPU);
/// let mut states = States::new(x_t, &grid, vec![1, 1, 2], Source::Student)?;
/// states.sources[0] = Source::Forward;
/// let mut meter = LossMeter::new(4);
/// meter.add(&Tensor::from_slice(&[0.25_f32, 1.0, 9.0]), &states)?;
/// let losses = meter.take()?;
/// assert_eq!(losses.gap(Source::Student, 1), Some(0.75));
/// // Nothing to compare with.
/// assert_eq!(losses.gap(Source::Student, 2), None);
/// # Ok::<(), ddil_core::Error>(())
/// ```
#[derive(Debug)]
pub struct LossMeter {
    num_indices: usize,
    /// Sources beyond [`Source::ALL`], in order of appearance.
    added: Vec<Source>,
    /// One place per grid index, for each source.
    tally: Tally,
}

/// Mean losses by source and grid index.
#[derive(Clone, Debug, PartialEq)]
pub struct LossTable {
    num_indices: usize,
    added: Vec<Source>,
    /// Sum and count at each place.
    sums: Vec<(f64, f64)>,
}

impl LossMeter {
    /// An empty meter, for a grid of `num_indices` timesteps.
    pub fn new(num_indices: usize) -> Self {
        let tally = Tally::new(Source::ALL.len() * num_indices);
        Self { num_indices, added: vec![], tally }
    }

    /// Adds the losses of a batch.
    ///
    /// # Shapes and units
    ///
    /// - `per_sample`: `[batch]`, one per state
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) unless there is one loss per state;
    /// [`Error::Invalid`] for a grid index beyond the grid.
    pub fn add(&mut self, per_sample: &Tensor, states: &States) -> Result<()> {
        const OP: &str = "LossMeter::add";
        states.ensure(OP)?;
        ensure_real(OP, "per_sample", per_sample)?;
        let expected = [states.len() as i64];
        if per_sample.size() != expected {
            let (name, shape) = ("per_sample", per_sample.size());
            let expected = format!("{expected:?}, one loss per state");
            return Err(Error::Argument(ArgumentError::Shape { op: OP, name, shape, expected }));
        }
        if let Some(index) = states.grid_indices.iter().find(|index| **index >= self.num_indices) {
            return Err(Error::Invalid(Invalid::new(
                "grid_indices",
                index,
                format!("below {}, the length of the grid", self.num_indices),
            )));
        }
        let places = states.sources.iter().zip(&states.grid_indices);
        let places: Vec<i64> = places
            .map(|(&source, index)| (self.place_of(source) * self.num_indices + index) as i64)
            .collect();
        self.tally.grow(OP, (Source::ALL.len() + self.added.len()) * self.num_indices)?;
        let places = on_device(&places, per_sample.device());
        self.tally.add(OP, &places, per_sample)
    }

    /// The means since the last call; then resets. Waits for the device.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the device cannot be read.
    pub fn take(&mut self) -> Result<LossTable> {
        let sums = self.tally.take("LossMeter::take")?;
        Ok(LossTable { num_indices: self.num_indices, added: self.added.clone(), sums })
    }

    /// The sums of the sources in [`Source::ALL`], for saving.
    pub(crate) fn tensor(&self) -> Option<Tensor> {
        let places = (Source::ALL.len() * self.num_indices) as i64;
        self.tally.tensor().map(|sums| sums.narrow(1, 0, places).contiguous())
    }

    pub(crate) fn restore(&mut self, what: &'static str, sums: Option<&Tensor>) -> Result<()> {
        *self = Self::new(self.num_indices);
        self.tally.restore(what, sums)
    }

    fn place_of(&mut self, source: Source) -> usize {
        source.place_among(&self.added).unwrap_or_else(|| {
            self.added.push(source);
            Source::ALL.len() + self.added.len() - 1
        })
    }
}

impl LossTable {
    /// Mean loss of the states of these sources at a grid index; none if there were no states.
    pub fn mean(&self, sources: &[Source], grid_index: usize) -> Option<f64> {
        let (sum, count) = self.total(sources, grid_index);
        (count > 0.0).then(|| sum / count)
    }

    /// Number of states of these sources at a grid index.
    pub fn samples(&self, sources: &[Source], grid_index: usize) -> u64 {
        self.total(sources, grid_index).1 as u64
    }

    /// `E[loss on states of the source] - E[loss on noised data]` at a grid index; none if either is missing.
    ///
    /// The quantity that on-policy training bounds ([Ross et al. 2011](https://arxiv.org/abs/1011.0686)): above 0 if
    /// the student is worse on the states it visits than on those of plain distillation.
    pub fn gap(&self, source: Source, grid_index: usize) -> Option<f64> {
        Some(self.mean(&[source], grid_index)? - self.mean(&[Source::Forward], grid_index)?)
    }

    fn total(&self, sources: &[Source], grid_index: usize) -> (f64, f64) {
        if grid_index >= self.num_indices {
            return (0.0, 0.0);
        }
        sources
            .iter()
            .filter_map(|source| source.place_among(&self.added))
            .filter_map(|place| self.sums.get(place * self.num_indices + grid_index))
            .fold((0.0, 0.0), |(sum, count), (s, c)| (sum + s, count + c))
    }
}
