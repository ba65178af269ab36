//! The weight of the error in the predicted clean data at each noise level.

use ddil_files::Invalid;
use ddil_libtorch::ensure_dense;
use ddil_schedulers::{NoiseSchedule, PredictionType, Scale};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::device_table::DeviceTable;
use crate::error::{Error, Result};

/// Weight on the squared error of the predicted clean data.
///
/// Section 4 of [Salimans and Ho 2022](https://arxiv.org/abs/2202.00512). At a fixed noisy sample an error `d` in
/// `x0` is an error `-(alpha / sigma) d` in `epsilon` and, on a variance-preserving schedule, `-d / sigma` in `v`.
/// These weights therefore convert one mean squared error into another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// 1: the error of `x0` itself.
    Constant,
    /// The signal-to-noise ratio: the error of `epsilon`. It is 0 where there is no signal.
    Snr,
    /// The larger of 1 and the signal-to-noise ratio.
    #[default]
    TruncatedSnr,
    /// The signal-to-noise ratio plus 1: the error of `v` on a variance-preserving schedule.
    SnrPlusOne,
}

impl Weighting {
    /// The weight that converts the error of `x0` into the error of a network's output.
    ///
    /// For the velocity of flow matching none of these is exact; `snr_plus_one` is between half of it and all of it.
    pub fn of(output: PredictionType) -> Self {
        match output {
            PredictionType::Epsilon => Self::Snr,
            PredictionType::Sample => Self::Constant,
            PredictionType::VPrediction | PredictionType::Flow => Self::SnrPlusOne,
        }
    }

    /// The weight at a noise level; infinite for clean data, except for [`Constant`](Self::Constant).
    pub fn weight(self, scale: Scale) -> f64 {
        match self {
            Self::Constant => 1.0,
            Self::Snr => scale.snr(),
            Self::TruncatedSnr => scale.snr().max(1.0),
            Self::SnrPlusOne => scale.snr() + 1.0,
        }
    }
}

/// The [`Weighting`] of a schedule as a table: one number per timestep, looked up for a batch.
///
/// # Example
///
/// ```
/// use ddil_losses::{TimestepWeights, Weighting};
/// use ddil_schedulers::NoiseScheduleConfig;
///
/// # fn main() -> ddil_losses::Result<()> {
/// let schedule = NoiseScheduleConfig::default().build()?;
/// let weights = TimestepWeights::new(Weighting::TruncatedSnr, Some(5.0), &schedule)?;
/// assert_eq!(weights.at(0)?, 5.0);
/// assert_eq!(weights.at(999)?, 1.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TimestepWeights {
    /// The clean end, then one entry per timestep.
    weights: Vec<f64>,
    table: DeviceTable,
}

impl TimestepWeights {
    /// The weights of `schedule`, clipped at `cap`.
    ///
    /// At the clean end, timestep -1, an infinite weight becomes `cap`, and 0 without one: there is no noise, and
    /// therefore no error to weight.
    /// [`Snr`](Weighting::Snr) with a cap is the weight of
    /// [Hang et al. 2023](https://arxiv.org/abs/2303.09556) ("min-SNR").
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `cap` is positive and finite.
    pub fn new(weighting: Weighting, cap: Option<f64>, schedule: &NoiseSchedule) -> Result<Self> {
        if let Some(cap) = cap.filter(|cap| !(*cap > 0.0 && cap.is_finite())) {
            return Err(Error::Invalid(Invalid::new(
                "weight_cap",
                cap,
                "positive and finite; omit it for no cap",
            )));
        }
        let capped = |timestep| {
            let weight = weighting.weight(schedule.scale_at(timestep)?);
            let weight = cap.map_or(weight, |cap| weight.min(cap));
            Ok(if weight.is_finite() { weight } else { 0.0 })
        };
        let timesteps = -1..schedule.num_train_timesteps();
        let weights = timesteps.map(capped).collect::<Result<Vec<f64>>>()?;
        let table = DeviceTable::new(Tensor::from_slice(&weights));
        Ok(Self { weights, table })
    }

    /// The weight at one timestep; -1 is the clean end.
    ///
    /// # Errors
    ///
    /// [`Error::Scheduler`] if `timestep` is off the training grid.
    pub fn at(&self, timestep: i64) -> Result<f64> {
        let highest = self.weights.len() as i64 - 2;
        if (-1..=highest).contains(&timestep) {
            return Ok(self.weights[(timestep + 1) as usize]);
        }
        let op = "TimestepWeights::at";
        let off_grid =
            ddil_schedulers::Error::TimestepOutOfRange { op, timestep, lowest: -1, highest };
        Err(off_grid.into())
    }

    /// Looks up the weights of a batch.
    ///
    /// # Shapes and units
    ///
    /// - `timesteps`: `[batch]`, `Int64`, in training timesteps; -1 is the clean end
    /// - returns: `[batch]`, of `kind`, on the device of `timesteps`
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if a timestep is off the grid (found by libtorch's index check; on a GPU at the next
    /// synchronisation) or `timesteps` is not an `Int64` vector.
    pub fn gather(&self, timesteps: &Tensor, kind: Kind) -> Result<Tensor> {
        const OP: &str = "TimestepWeights::gather";
        ensure_dense(OP, "timesteps", timesteps)?;
        let table = self.table.on(timesteps.device())?;
        let rows = timesteps.f_add_scalar(1).map_err(Error::torch(OP))?;
        table
            .f_index_select(0, &rows)
            .and_then(|rows| rows.f_to_kind(kind))
            .map_err(Error::torch(OP))
    }
}
