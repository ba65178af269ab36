//! How much thresholding changes, and whose.

use ddil_core::{ClipMeter, Denoiser, Source, Thresholded};
use ddil_schedulers::NoiseSchedule;

use crate::error::Result;

/// Where clean data are held inside their range.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Teacher,
    Student,
    Target,
    Critic,
    TeacherRollout,
    StudentRollout,
}

/// One meter a place.
#[derive(Debug)]
pub(super) struct Meters([ClipMeter; 6]);

/// As they are called in the record, in the order of [`Place`].
const NAMES: [&str; 6] =
    ["teacher", "student", "target", "critic", "teacher_rollout", "student_rollout"];

impl Meters {
    pub(super) fn new(schedule: &NoiseSchedule) -> Self {
        Self(NAMES.map(|_| ClipMeter::new(schedule)))
    }

    /// The denoiser with the meter of its place, where that will be read.
    pub(super) fn put_on<D: Denoiser>(
        &self,
        denoiser: Thresholded<D>,
        place: Place,
        is_read: bool,
    ) -> Thresholded<D> {
        if is_read { denoiser.metered(self.0[place as usize].clone()) } else { denoiser }
    }

    /// Says where the rows of the loss's calls come from; those of rollouts are of no source.
    pub(super) fn rows_are(&self, sources: &[Source]) {
        for place in [Place::Teacher, Place::Student, Place::Target, Place::Critic] {
            self.0[place as usize].rows_are(sources);
        }
    }

    /// What was measured since the last time. Waits for the device.
    pub(super) fn figures(&self) -> Result<Vec<(String, f64)>> {
        let mut figures = Vec::new();
        for (meter, name) in self.0.iter().zip(NAMES) {
            figures.extend(meter.take()?.iter().map(|clipped| clipped.figure(name)));
        }
        Ok(figures)
    }
}
