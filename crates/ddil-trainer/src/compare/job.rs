//! What a process of a comparison is asked to do, from beginning to end.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::measure;
use super::record::{CellRecord, NamedRows, Outcome};
use super::setting::{Setting, TeacherSamples};
use super::training::distil;
use crate::config::DistillConfig;
use crate::error::{Error, Result, with_causes};
use crate::files::write_json;
use crate::interrupt::Interrupt;
use crate::logging::Logging;
use crate::run_folder::Status;
use crate::session;
use crate::settings::Settings;

/// Something to do, and what all jobs of a comparison have in common. It is sent to another process as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// What all have in common.
    pub setting: Setting,
    /// What is to be done.
    pub task: Task,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Task {
    /// Compare real images with real images.
    Real,
    /// Draw some samples of a teacher.
    Draw {
        /// Which.
        teacher: TeacherSamples,
        /// The first of them.
        start: u32,
    },
    /// Measure the samples of a teacher.
    Teacher {
        /// Which.
        teacher: TeacherSamples,
        /// What students are to learn.
        taught: TeacherSamples,
        /// Whether some student is made for so many steps.
        own_steps: bool,
    },
    /// Train a student and measure it.
    Cell {
        /// Its name.
        cell: String,
        /// Checksum of its config.
        config_sha256: String,
        /// What it is to learn.
        taught: TeacherSamples,
    },
}

impl Job {
    /// What is done, in words.
    pub fn about(&self) -> String {
        match &self.task {
            Task::Real => "real images".to_owned(),
            Task::Draw { teacher, start } => {
                let TeacherSamples { steps, guidance_scale, samples, .. } = teacher;
                let end = teacher.end_of(*start);
                format!(
                    "teacher, guidance {guidance_scale}, {steps} steps: samples {start} to {end} of {samples}"
                )
            }
            Task::Teacher { teacher: TeacherSamples { steps, guidance_scale, .. }, .. } => {
                format!("teacher, guidance {guidance_scale}, {steps} steps: measured")
            }
            Task::Cell { cell, .. } => cell.clone(),
        }
    }

    /// Where the process that does it says what it does.
    pub fn log(&self) -> PathBuf {
        match &self.task {
            Task::Cell { cell, .. } => self.setting.folder.log_of(cell),
            _ => self.setting.folder.log(),
        }
    }

    /// Whether it may be ended at any moment: everything but the training of a cell, which saves first.
    pub fn can_end_at_once(&self) -> bool {
        !matches!(self.task, Task::Cell { .. })
    }

    /// Whether what it leaves is there.
    ///
    /// # Errors
    ///
    /// A file in its place that is something else.
    pub fn is_done(&self) -> Result<bool> {
        let Setting { folder, .. } = &self.setting;
        match &self.task {
            Task::Real => {
                let found = NamedRows::read(&folder.real(), &self.setting.measured_as(None))?;
                Ok(found.is_some())
            }
            Task::Draw { teacher, start } => Ok(teacher.part(folder, *start).is_file()),
            Task::Teacher { teacher, taught, .. } => {
                let path = teacher.row(folder, taught);
                Ok(NamedRows::read(&path, &self.setting.measured_as(Some(taught)))?.is_some())
            }
            Task::Cell { cell, config_sha256, taught } => {
                let Some(record) = CellRecord::read(&folder.record_of(cell))? else {
                    return Ok(false);
                };
                let measured_as = self.setting.measured_as(Some(taught));
                Ok(record.config_sha256 == *config_sha256
                    && match record.outcome {
                        Outcome::Done { .. } => record.measured_as == measured_as,
                        Outcome::Diverged { .. } => true,
                        Outcome::Failed { .. } => false,
                    })
            }
        }
    }

    /// Does it. `end_at_once` is called when there is nothing left that would have to be saved.
    ///
    /// A cell that diverges is recorded and no error. One that is asked to stop saves its run and leaves no record.
    ///
    /// # Errors
    ///
    /// What data, networks and the file system refuse; of a cell that is recorded too.
    pub fn perform(
        &self,
        logging: &Logging,
        interrupt: &Interrupt,
        end_at_once: &dyn Fn(),
    ) -> Result<()> {
        let setting = &self.setting;
        match &self.task {
            Task::Real => {
                let (measured_as, rows) = (setting.measured_as(None), measure::real(setting)?);
                Ok(write_json(&setting.folder.real(), &NamedRows::new(measured_as, rows))?)
            }
            Task::Draw { teacher, start } => measure::draw_part(setting, teacher, *start),
            Task::Teacher { teacher, taught, own_steps } => {
                let row = measure::teacher(setting, teacher, taught, *own_steps)?;
                let name = format!("teacher, guidance {}", teacher.guidance_scale);
                let rows = vec![(name, row)];
                let measured_as = setting.measured_as(Some(taught));
                let path = teacher.row(&setting.folder, taught);
                Ok(write_json(&path, &NamedRows::new(measured_as, rows))?)
            }
            Task::Cell { .. } => self.perform_cell(logging, interrupt, end_at_once),
        }
    }

    fn perform_cell(
        &self,
        logging: &Logging,
        interrupt: &Interrupt,
        end_at_once: &dyn Fn(),
    ) -> Result<()> {
        let Task::Cell { cell, taught, .. } = &self.task else { return Ok(()) };
        let folder = &self.setting.folder;
        let attempt = || {
            let config: DistillConfig = Settings::read(&folder.config_of(cell))?.build()?;
            match distil(&config, logging, interrupt) {
                Ok(session::Outcome::Completed { .. }) => {}
                Ok(session::Outcome::Interrupted { .. }) => return Ok(None),
                Err(error) => return self.divergence(error).map(Some),
            }
            end_at_once();
            let rows = measure::cell(&self.setting, cell, &config, taught)?;
            Ok(Some(Outcome::Done { rows }))
        };
        match attempt() {
            Ok(Some(outcome)) => self.record(outcome),
            Ok(None) => Ok(()),
            Err(error) => {
                // On a full disk this fails too; the error to tell is the first one.
                let _ = self.record(Outcome::Failed { message: with_causes(&error) });
                Err(error)
            }
        }
    }

    /// What stopped a training, if it is that its numbers are none any more.
    fn divergence(&self, error: Error) -> Result<Outcome> {
        let Task::Cell { cell, .. } = &self.task else { return Err(error) };
        match &error {
            Error::NonFinite { step, .. } => {
                Ok(Outcome::Diverged { step: *step, message: with_causes(&error) })
            }
            // Its images have the right shape, so what cannot be drawn is no number.
            Error::Picture { .. } => {
                let status = Status::read(&self.setting.folder.run_of(cell));
                let step = status.map_or(0, |status| status.step);
                Ok(Outcome::Diverged { step, message: with_causes(&error) })
            }
            _ => Err(error),
        }
    }

    /// How a cell ended; none for other jobs, and before it has.
    ///
    /// # Errors
    ///
    /// A file in its place that is something else.
    pub fn cell_record(&self) -> Result<Option<CellRecord>> {
        let Task::Cell { cell, .. } = &self.task else { return Ok(None) };
        CellRecord::read(&self.setting.folder.record_of(cell))
    }

    /// Removes the record of a failure, before it is tried again.
    ///
    /// # Errors
    ///
    /// What the file system refuses.
    pub(super) fn forget_failure(&self) -> Result<()> {
        if let (Task::Cell { cell, .. }, Some(CellRecord { outcome: Outcome::Failed { .. }, .. })) =
            (&self.task, self.cell_record()?)
        {
            let path = self.setting.folder.record_of(cell);
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }

    /// Writes down how a cell ended; nothing for other jobs.
    ///
    /// # Errors
    ///
    /// What the file system refuses.
    pub fn record(&self, outcome: Outcome) -> Result<()> {
        let Task::Cell { cell, config_sha256, taught } = &self.task else { return Ok(()) };
        let measured_as = self.setting.measured_as(Some(taught));
        CellRecord::new(cell, config_sha256, &measured_as, outcome)
            .write(&self.setting.folder.record_of(cell))
    }
}
