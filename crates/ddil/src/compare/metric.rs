//! The metrics by which arms are compared.

use ddil_evaluate::Measurement;

use super::statistics::Estimate;

/// A metric by which arms are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Fréchet distance to the data.
    Frechet,
    /// Fréchet distance to the teacher's samples.
    ToTeacher,
    /// Precision.
    Precision,
    /// Recall.
    Recall,
    /// Density.
    Density,
    /// Coverage.
    Coverage,
    /// Mean of the shift's energy distance over timesteps.
    Shift,
}

impl Metric {
    /// All of them, in the order of the tables.
    pub(crate) const ALL: [Self; 7] = [
        Self::Frechet,
        Self::ToTeacher,
        Self::Precision,
        Self::Recall,
        Self::Density,
        Self::Coverage,
        Self::Shift,
    ];

    /// Its name.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Frechet => "frechet",
            Self::ToTeacher => "to teacher",
            Self::Precision => "precision",
            Self::Recall => "recall",
            Self::Density => "density",
            Self::Coverage => "coverage",
            Self::Shift => "shift",
        }
    }

    /// Its value in a measurement, if present.
    pub fn of(self, measurement: &Measurement) -> Option<f64> {
        match self {
            Self::Frechet => measurement.frechet,
            Self::ToTeacher => measurement.frechet_to_teacher,
            Self::Precision => measurement.precision,
            Self::Recall => measurement.recall,
            Self::Density => measurement.density,
            Self::Coverage => measurement.coverage,
            Self::Shift => {
                let energies: Vec<f64> = measurement.shift.iter().map(|row| row.energy).collect();
                Estimate::of(&energies).map(|estimate| estimate.mean)
            }
        }
    }

    /// The number of significant decimals to show.
    pub(crate) fn decimals(self) -> usize {
        match self {
            Self::Frechet | Self::ToTeacher => 2,
            Self::Shift => 4,
            _ => 3,
        }
    }
}
