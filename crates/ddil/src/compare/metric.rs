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
    /// Share of samples that are classified as their class.
    ClassAgreement,
    /// Fréchet distance to the teacher's samples, of the classes that the data lack.
    MissingToTeacher,
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
    /// Mean cosine of the CLIP score.
    ClipCosine,
    /// Mean distance between the images of a prompt, on features.
    Diversity,
    /// The same, on CLIP's embeddings: 1 - cosine.
    ClipDistance,
    /// The same by LPIPS.
    Lpips,
}

impl Metric {
    /// Those of images of prompts.
    pub(crate) const OF_PROMPTS: [Self; 4] =
        [Self::ClipCosine, Self::Diversity, Self::ClipDistance, Self::Lpips];

    /// All others, in the order of the tables.
    pub(crate) const ALL: [Self; 9] = [
        Self::Frechet,
        Self::ToTeacher,
        Self::MissingToTeacher,
        Self::ClassAgreement,
        Self::Precision,
        Self::Recall,
        Self::Density,
        Self::Coverage,
        Self::Shift,
    ];

    /// Those that the tables on a terminal leave out, whose width is small.
    const NOT_ON_TERMINAL: [Self; 3] = [Self::Precision, Self::Density, Self::Shift];

    /// Whether a terminal's tables show it.
    pub(crate) fn is_on_terminal(self) -> bool {
        !Self::NOT_ON_TERMINAL.contains(&self)
    }

    /// Those that only samples of classes have: the first one if the data lack classes, the second with a classifier of
    /// the model's classes.
    pub(crate) const OF_CLASSES: [Self; 2] = [Self::MissingToTeacher, Self::ClassAgreement];

    /// Its name.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Frechet => "frechet",
            Self::ToTeacher => "to teacher",
            Self::MissingToTeacher => "missing",
            Self::ClassAgreement => "agreement",
            Self::Precision => "precision",
            Self::Recall => "recall",
            Self::Density => "density",
            Self::Coverage => "coverage",
            Self::Shift => "shift",
            Self::ClipCosine => "clip cosine",
            Self::Diversity => "diversity",
            Self::ClipDistance => "clip distance",
            Self::Lpips => "lpips",
        }
    }

    /// A title.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Frechet => "Fréchet distance to the data",
            Self::ToTeacher => "Fréchet distance to the teacher",
            Self::MissingToTeacher => {
                "Fréchet distance to the teacher, of classes that the data lack"
            }
            Self::ClassAgreement => "Share of samples that show their class",
            Self::Precision => "Precision",
            Self::Recall => "Recall",
            Self::Density => "Density",
            Self::Coverage => "Coverage",
            Self::Shift => "Shift",
            Self::ClipCosine => "CLIP score, mean cosine",
            Self::Diversity => "Distance between images of a prompt",
            Self::ClipDistance => "1 - cosine between images of a prompt",
            Self::Lpips => "LPIPS between images of a prompt",
        }
    }

    /// Whether a smaller value is better.
    pub(crate) fn lower_is_better(self) -> bool {
        matches!(self, Self::Frechet | Self::ToTeacher | Self::MissingToTeacher | Self::Shift)
    }

    /// Its value in a measurement, if present.
    pub fn of(self, measurement: &Measurement) -> Option<f64> {
        match self {
            Self::Frechet => measurement.frechet,
            Self::ToTeacher => measurement.frechet_to_teacher,
            Self::MissingToTeacher => measurement.missing_classes.as_ref()?.frechet_to_teacher,
            Self::ClassAgreement => measurement.class_agreement,
            Self::Precision => measurement.precision,
            Self::Recall => measurement.recall,
            Self::Density => measurement.density,
            Self::Coverage => measurement.coverage,
            Self::ClipCosine => Some(measurement.clip_score.as_ref()?.cosine.mean),
            Self::Diversity => Some(measurement.diversity.as_ref()?.euclidean?.mean),
            Self::ClipDistance => Some(measurement.diversity.as_ref()?.clip_cosine_distance?.mean),
            Self::Lpips => Some(measurement.diversity.as_ref()?.lpips?.mean),
            Self::Shift => {
                let energies: Vec<f64> = measurement.shift.iter().map(|row| row.energy).collect();
                Estimate::of(&energies).map(|estimate| estimate.mean)
            }
        }
    }

    /// The standard error over prompts of its value in a measurement, if it is a mean over prompts.
    pub(crate) fn error_over_prompts(self, measurement: &Measurement) -> Option<f64> {
        let diversity = measurement.diversity.as_ref();
        let mean = match self {
            Self::ClipCosine => measurement.clip_score.as_ref().map(|score| score.cosine),
            Self::Diversity => diversity?.euclidean,
            Self::ClipDistance => diversity?.clip_cosine_distance,
            Self::Lpips => diversity?.lpips,
            _ => None,
        };
        mean?.standard_error
    }

    /// The number of significant decimals to show.
    pub(crate) fn decimals(self) -> usize {
        match self {
            Self::Frechet | Self::ToTeacher | Self::MissingToTeacher => 2,
            Self::Shift | Self::ClipCosine | Self::ClipDistance | Self::Lpips => 4,
            _ => 3,
        }
    }
}
