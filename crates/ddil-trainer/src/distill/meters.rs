//! Meters of how much thresholding changes, by place.

use ddil_core::{ClipMeter, ClippedFraction, Denoiser, Source, Thresholded};
use ddil_losses::ObjectiveConfig;
use ddil_schedulers::NoiseSchedule;

use crate::error::Result;

/// Where clean data are thresholded.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Teacher,
    Student,
    Target,
    Critic,
    TeacherRollout,
    StudentRollout,
}

/// One meter per place.
#[derive(Debug)]
pub(super) struct Meters {
    of_places: [ClipMeter; 6],
    /// Number of adjacent timesteps that are reported together.
    together: i64,
}

/// Figure names should be few and the same in every line: for a method that uses timesteps of the whole schedule, the
/// figures are averaged over this number of parts.
const PARTS: i64 = 10;

/// Their names in the record, in the order of [`Place`].
const NAMES: [&str; 6] =
    ["teacher", "student", "target", "critic", "teacher_rollout", "student_rollout"];

impl Meters {
    pub(super) fn new(schedule: &NoiseSchedule, objective: &ObjectiveConfig) -> Self {
        let together = match objective {
            ObjectiveConfig::Progressive(_) => 1,
            ObjectiveConfig::Lcm(_) | ObjectiveConfig::Dmd2(_) => {
                (schedule.num_train_timesteps() / PARTS).max(1)
            }
        };
        Self { of_places: NAMES.map(|_| ClipMeter::new(schedule)), together }
    }

    /// The denoiser with the meter of its place, if that is recorded.
    pub(super) fn put_on<D: Denoiser>(
        &self,
        denoiser: Thresholded<D>,
        place: Place,
        is_read: bool,
    ) -> Thresholded<D> {
        if is_read { denoiser.metered(self.of_places[place as usize].clone()) } else { denoiser }
    }

    /// Sets the sources of the rows of the loss's calls; rows of rollouts have no source.
    pub(super) fn rows_are(&self, sources: &[Source]) {
        for place in [Place::Teacher, Place::Student, Place::Target, Place::Critic] {
            self.of_places[place as usize].rows_are(sources);
        }
    }

    /// The measurements since the last call, under the least noisy timestep of each part. Waits for the device.
    pub(super) fn figures(&self) -> Result<Vec<(String, f64)>> {
        let mut figures = Vec::new();
        for (meter, name) in self.of_places.iter().zip(NAMES) {
            let part = |clipped: &ClippedFraction| {
                let timestep = clipped.timestep - clipped.timestep % self.together;
                (ClippedFraction { timestep, ..*clipped }, clipped.samples as f64)
            };
            let measured: Vec<(ClippedFraction, f64)> = meter.take()?.iter().map(part).collect();
            let same = |a: &(ClippedFraction, f64), b: &(ClippedFraction, f64)| {
                (a.0.timestep, a.0.source) == (b.0.timestep, b.0.source)
            };
            figures.extend(measured.chunk_by(same).map(|part| {
                let samples: f64 = part.iter().map(|(_, samples)| samples).sum();
                let changed: f64 = part.iter().map(|(c, samples)| c.fraction * samples).sum();
                ClippedFraction { fraction: changed / samples, ..part[0].0 }.figure(name)
            }));
        }
        Ok(figures)
    }
}
