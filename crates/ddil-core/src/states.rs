//! Batches of training states.

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::{ensure_dense, ensure_real};
use ddil_schedulers::Timesteps;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::rows::on_device;
use crate::source_name::SourceName;

/// Clean samples of a dataset, `[batch, ..]`, with their conditioning.
#[derive(Debug)]
#[non_exhaustive]
pub struct Data {
    /// Clean samples, data scale.
    pub x0: Tensor,
    /// Their labels, captions, ..; parts of `batch` rows.
    pub conditioning: Conditioning,
}

impl Data {
    /// Samples without conditioning.
    pub fn new(x0: Tensor) -> Self {
        Self { x0, conditioning: Conditioning::none() }
    }

    /// The same samples with this conditioning.
    #[must_use]
    pub fn with_conditioning(self, conditioning: Conditioning) -> Self {
        Self { conditioning, ..self }
    }

    /// Everything on `device`.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the device does not exist.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let x0 = self.x0.f_to_device(device).map_err(Error::torch("Data::to_device"))?;
        Ok(Self { x0, conditioning: self.conditioning.to_device(device)? })
    }
}

/// Origin of a training state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Source {
    /// A dataset sample, noised.
    Forward,
    /// The student's own backward trajectory.
    Student,
    /// The teacher's backward trajectory.
    Teacher,
    /// A trajectory on which student and teacher took turns.
    Mixed,
    /// Pure noise: the first state of every trajectory.
    Noise,
    /// A source that was added to the mixture.
    Added(SourceName),
}

impl Source {
    /// All except added sources, in the order in which they are logged.
    pub const ALL: [Self; 5] =
        [Self::Forward, Self::Student, Self::Teacher, Self::Mixed, Self::Noise];

    /// Index in [`ALL`](Self::ALL), followed by the sources in `added`.
    pub(crate) fn place_among(self, added: &[Self]) -> Option<usize> {
        let mut all = Self::ALL.iter().chain(added);
        all.position(|other| *other == self)
    }

    /// The name in configs and logs.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Forward => "forward",
            Self::Student => "student",
            Self::Teacher => "teacher",
            Self::Mixed => "mixed",
            Self::Noise => "noise",
            Self::Added(name) => name.as_str(),
        }
    }
}

impl From<Source> for String {
    fn from(source: Source) -> Self {
        source.as_str().to_owned()
    }
}

impl TryFrom<String> for Source {
    type Error = Invalid;

    fn try_from(name: String) -> std::result::Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|source| source.as_str() == name);
        known.map_or_else(|| SourceName::new(&name).map(Self::Added), Ok)
    }
}

/// A batch of training states: the state, conditioning and source of each sample.
///
/// Contains no labels: the teacher is evaluated in the loss, so that states stay valid if loss, guidance or teacher
/// change (the student acts, the teacher labels; [Ross et al. 2011](https://arxiv.org/abs/1011.0686)).
#[derive(Debug)]
#[non_exhaustive]
pub struct States {
    /// Noisy samples, `[batch, ..]`, always without a graph.
    pub x_t: Tensor,
    /// Their timesteps, `[batch]`, `Int64`.
    pub timesteps: Tensor,
    /// Index of each timestep in the student's grid, 0 the noisiest.
    pub grid_indices: Vec<usize>,
    /// The conditioning of each sample on its trajectory.
    pub conditioning: Conditioning,
    /// The source of each sample.
    pub sources: Vec<Source>,
    /// The student's update at which each state was made.
    pub created_at_step: Vec<u64>,
}

impl States {
    /// States `x_t` at the entries `grid_indices` of a grid, all from one source, without conditioning, made at the
    /// student's update 0.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an index beyond the grid; as [`ensure`](Self::ensure).
    pub fn new(
        x_t: Tensor,
        grid: &Timesteps,
        grid_indices: Vec<usize>,
        source: Source,
    ) -> Result<Self> {
        ensure_real("States::new", "x_t", &x_t)?;
        let timestep = |&index: &usize| {
            grid.as_slice().get(index).copied().ok_or_else(|| {
                let expected = format!("below {}, the length of the grid", grid.len());
                Invalid::new("grid_indices", index, expected)
            })
        };
        let timesteps = grid_indices.iter().map(timestep).collect::<Result<Vec<i64>, Invalid>>()?;
        let n = grid_indices.len();
        let states = Self {
            timesteps: on_device(&timesteps, x_t.device()),
            x_t,
            grid_indices,
            conditioning: Conditioning::none(),
            sources: vec![source; n],
            created_at_step: vec![0; n],
        };
        states.ensure("States::new")?;
        Ok(states)
    }

    /// The same states with this conditioning, a row per state.
    #[must_use]
    pub fn with_conditioning(self, conditioning: Conditioning) -> Self {
        Self { conditioning, ..self }
    }

    /// The same states, made at the student's update `step`.
    #[must_use]
    pub fn made_at(self, step: u64) -> Self {
        Self { created_at_step: vec![step; self.created_at_step.len()], ..self }
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// Checks that all parts have the same number of samples.
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) or [`Error::Conditioning`] for the first part that
    /// differs, [`Error::Invalid`] for a list of another length, [`Error::Scheduler`] for `x_t` without real numbers
    /// and `timesteps` other than `Int64`.
    pub fn ensure(&self, op: &'static str) -> Result<()> {
        let batch = self.len();
        for (field, len) in [
            ("created_at_step", self.created_at_step.len()),
            ("grid_indices", self.grid_indices.len()),
        ] {
            if len != batch {
                let (value, expected) =
                    (format!("{len} long"), format!("{batch} entries, one per state"));
                return Err(Error::Invalid(Invalid::new(field, value, expected)));
            }
        }
        ensure_real(op, "x_t", &self.x_t)?;
        ensure_dense(op, "timesteps", &self.timesteps)?;
        let batch = batch as i64;
        let shapes = [("x_t", self.x_t.size()), ("timesteps", self.timesteps.size())];
        for (name, shape) in shapes {
            if shape.first() != Some(&batch) || (name == "timesteps" && shape.len() != 1) {
                let expected = format!("{batch} rows, one per state");
                return Err(Error::Argument(ArgumentError::Shape { op, name, shape, expected }));
            }
        }
        let kind = self.timesteps.kind();
        if kind != Kind::Int64 {
            let (name, expected) = ("timesteps", "Int64");
            return Err(ddil_schedulers::Error::Argument(ArgumentError::Kind {
                op,
                name,
                kind,
                expected,
            })
            .into());
        }
        self.conditioning.ensure_batch(op, batch)
    }

    /// Concatenates batches, on the device and in the kind of the first.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is none; as [`ensure`](Self::ensure); [`Error::Torch`] or [`Error::Conditioning`] if
    /// they do not fit each other.
    pub fn cat(batches: &[Self]) -> Result<Self> {
        const OP: &str = "States::cat";
        let Some(first) = batches.first() else {
            return Err(Error::Invalid(Invalid::new("batches", "none", "at least one")));
        };
        batches.iter().try_for_each(|batch| batch.ensure(OP))?;
        let (device, kind) = (first.x_t.device(), first.x_t.kind());
        let x_t: Vec<Tensor> =
            batches.iter().map(|b| b.x_t.to_device(device).to_kind(kind)).collect();
        let timesteps: Vec<Tensor> =
            batches.iter().map(|b| b.timesteps.to_device(device)).collect();
        let conditioning: Result<Vec<Conditioning>> =
            batches.iter().map(|b| b.conditioning.to_device(device)).collect();
        let conditioning = conditioning?;
        Ok(Self {
            x_t: Tensor::f_cat(&x_t, 0).map_err(Error::torch(OP))?,
            timesteps: Tensor::f_cat(&timesteps, 0).map_err(Error::torch(OP))?,
            grid_indices: batches.iter().flat_map(|b| b.grid_indices.iter().copied()).collect(),
            conditioning: Conditioning::cat(&conditioning.iter().collect::<Vec<_>>())?,
            sources: batches.iter().flat_map(|b| b.sources.iter().copied()).collect(),
            created_at_step: batches
                .iter()
                .flat_map(|b| b.created_at_step.iter().copied())
                .collect(),
        })
    }

    /// The samples at `rows`, in that order.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if a row is beyond the batch; as [`ensure`](Self::ensure).
    pub fn index_select(&self, rows: &[usize]) -> Result<Self> {
        self.ensure("States::index_select")?;
        if let Some(row) = rows.iter().find(|row| **row >= self.len()) {
            return Err(Error::Invalid(Invalid::new(
                "rows",
                row,
                format!("below {}, the length of the batch", self.len()),
            )));
        }
        let order = crate::rows::index(rows, self.x_t.device());
        Ok(Self {
            x_t: self.x_t.index_select(0, &order),
            timesteps: self.timesteps.index_select(0, &order),
            grid_indices: rows.iter().map(|&row| self.grid_indices[row]).collect(),
            conditioning: self.conditioning.index_select(&order)?,
            sources: rows.iter().map(|&row| self.sources[row]).collect(),
            created_at_step: rows.iter().map(|&row| self.created_at_step[row]).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Saved buffers and counters use these names in this order.
    #[test]
    fn sources_keep_their_names_and_places() {
        let names = ["forward", "student", "teacher", "mixed", "noise"];
        for ((place, source), name) in Source::ALL.into_iter().enumerate().zip(names) {
            assert_eq!(source.place_among(&[]), Some(place));
            assert_eq!(serde_json::to_value(source).ok(), Some(name.into()));
            assert_eq!(serde_json::from_value::<Source>(name.into()).ok(), Some(source));
        }
        let added = SourceName::new("perturbed").map(Source::Added).expect("it is a name");
        assert_eq!(serde_json::from_value::<Source>("perturbed".into()).ok(), Some(added));
        assert!(serde_json::from_value::<Source>("Perturbed".into()).is_err());
    }
}
