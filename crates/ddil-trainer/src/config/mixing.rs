//! The `mixing` table of a distillation config.

use ddil_core::{MixerConfig, PriorSchedule, StudentConfig, TeacherConfig};
use ddil_schedulers::Thresholding;
use serde::{Deserialize, Serialize};

use super::ensure;
use crate::error::Result;

/// The `mixing` table of a config file: [`MixerConfig`] and further keys that run folders contain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MixingSection {
    /// Share of each source over the run; see [`MixerConfig::priors`].
    pub priors: PriorSchedule,
    /// The student's trajectories.
    pub student: StudentConfig,
    /// The teacher's trajectories.
    pub teacher: TeacherConfig,
    /// See [`MixerConfig::pure_noise_at_tmax`].
    pub pure_noise_at_tmax: bool,
    /// Read and written because run folders contain it; only `none` is allowed: `[thresholding]` is for the whole run.
    thresholding: Thresholding,
    /// As `thresholding`; only `true` is allowed: `[thresholding_places]` is for the whole run.
    threshold_student: bool,
    /// As `threshold_student`.
    threshold_teacher: bool,
}

impl Default for MixingSection {
    fn default() -> Self {
        let MixerConfig { priors, student, teacher, pure_noise_at_tmax, .. } =
            MixerConfig::default();
        Self {
            priors,
            student,
            teacher,
            pure_noise_at_tmax,
            thresholding: Thresholding::None,
            threshold_student: true,
            threshold_teacher: true,
        }
    }
}

impl MixingSection {
    /// The settings of the mixer.
    pub fn mixer(&self) -> MixerConfig {
        let Self { priors, student, teacher, pure_noise_at_tmax, .. } = self.clone();
        MixerConfig::default().with(|config| {
            config.priors = priors;
            config.student = student;
            config.teacher = teacher;
            config.pure_noise_at_tmax = pure_noise_at_tmax;
        })
    }

    /// Checks that thresholding is set for the whole run only.
    pub(super) fn ensure(&self) -> Result<()> {
        let Self { thresholding, threshold_student, threshold_teacher, .. } = self;
        let none = *thresholding == Thresholding::None && *threshold_student && *threshold_teacher;
        let expected =
            "no value: use [thresholding] and [thresholding_places], which apply to the whole run";
        let fields = "mixing.thresholding, mixing.threshold_student, mixing.threshold_teacher";
        ensure(fields, "set", none, expected)
    }
}
