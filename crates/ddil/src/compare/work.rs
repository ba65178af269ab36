//! The work items of a comparison, and the verbs that each of them runs.
//!
//! Every item has a lock file, and its result is complete or absent, so any number of processes, on any number of
//! machines, can work on one comparison. An item that another process works on is awaited if others need its result; a
//! cell is left to that process.

use std::ffi::OsString;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use ddil_evaluate::Measurement;
use ddil_files::write_json;
use ddil_pipelines::{Pipeline, SamplePlan};
use ddil_trainer::run_folder::{Holder, State, Status, lock_file};

use super::folder::ComparisonFolder;
use super::item::{PlannedCell, PlannedTeacher, WorkItem};
use super::plan::Comparison;
use super::record::{NamedRows, Outcome, Row};
use super::setting::{TeacherSamples, precision};
use super::verbs::{Ended, Program, ResultFile};
use crate::error::{Error, Result};
use crate::exit_code::NOT_FINITE;

/// The interval at which a lock held by another process is tried again.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// How a work item ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    /// Its result exists.
    Done,
    /// It was asked to stop and can be continued.
    Stopped,
    /// Another process works on it.
    InUse(String),
    /// It failed.
    Failed(String),
}

/// Performs work items: the comparison, the program, and the stop condition.
pub(crate) struct Worker<'a> {
    /// The comparison.
    pub(crate) comparison: &'a Comparison,
    /// The program that contains the verbs.
    pub(crate) program: &'a Program,
    /// Whether to stop; a running verb then saves and ends.
    pub(crate) should_stop: &'a dyn Fn() -> bool,
}

impl Worker<'_> {
    fn folder(&self) -> &ComparisonFolder {
        self.comparison.folder()
    }

    /// Performs a work item unless it is done. A cell that another process works on is left to it; any other item is
    /// awaited.
    ///
    /// A cell that diverges is recorded as done. A cell that receives a stop request saves its run and leaves no record.
    ///
    /// # Errors
    ///
    /// Errors of the file system; a failed verb is [`End::Failed`], with a record if the item is a cell.
    pub(crate) fn perform(&self, item: &WorkItem) -> Result<End> {
        let mut announced = false;
        loop {
            match self.attempt(item)? {
                End::InUse(holder) if !item.is_cell() => {
                    if (self.should_stop)() {
                        return Ok(End::Stopped);
                    }
                    if !announced {
                        tracing::info!(
                            "{}: waiting for {holder}, which is working on it",
                            item.about()
                        );
                        announced = true;
                    }
                    sleep(LOCK_INTERVAL);
                }
                end => return Ok(end),
            }
        }
    }

    /// As [`perform`](Self::perform), without waiting.
    ///
    /// # Errors
    ///
    /// As [`perform`](Self::perform).
    pub(crate) fn attempt(&self, item: &WorkItem) -> Result<End> {
        let folder = self.folder();
        let path = item.lock(folder);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        let _lock = match lock_file(&path, &path) {
            Ok(lock) => lock,
            Err(ddil_trainer::Error::FolderInUse { holder, .. }) => {
                let unknown = || "another process".to_owned();
                let named = |holder: Holder| format!("process {holder}");
                return Ok(End::InUse(holder.map_or_else(unknown, named)));
            }
            Err(error) => return Err(error.into()),
        };
        // Another process may have finished it meanwhile.
        if self.comparison.is_done(item)? {
            return Ok(End::Done);
        }
        match item {
            WorkItem::RealImages => self.real_images(item),
            WorkItem::TeacherSamples { teacher, start } => {
                self.teacher_samples(item, teacher, *start)
            }
            WorkItem::TeacherRow(planned) => self.teacher_row(item, planned),
            WorkItem::Cell(planned) => self.cell(item, planned),
        }
    }

    fn run(&self, item: &WorkItem, arguments: &[OsString]) -> Result<Ended> {
        self.program.run(arguments, &item.log(self.folder()), self.should_stop)
    }

    /// Training images against held-out ones, and one half of the reference against the other.
    fn real_images(&self, item: &WorkItem) -> Result<End> {
        let path = self.folder().real();
        let result_file = ResultFile::at(path.with_extension("rows.json"));
        let mut arguments = self.evaluate("data".into(), &self.comparison.cells[0], &result_file);
        arguments.push("--halves".into());
        let ended = self.run(item, &arguments)?;
        if let Some(end) = unfinished(&ended) {
            return Ok(end);
        }
        let rows = Measurement::read_all(result_file.path())?;
        let names = ["training images", "two halves"];
        // Without held-out images only the two halves are compared.
        let names = &names[names.len().saturating_sub(rows.len())..];
        let row = |(name, measurement): (&&str, Measurement)| {
            let measurement = Measurement { method: "data".to_owned(), ..measurement };
            let row =
                Row { steps: 0, own_steps: true, collapsed: None, measurement: Some(measurement) };
            ((*name).to_owned(), row)
        };
        let rows = names.iter().zip(rows).map(row).collect();
        let measured_as = self.comparison.setting.measured_as(None);
        write_json(&path, &NamedRows::new(measured_as, rows))?;
        Ok(End::Done)
    }

    fn teacher_samples(
        &self,
        item: &WorkItem,
        teacher: &TeacherSamples,
        start: u32,
    ) -> Result<End> {
        let folder = self.folder();
        write_json(&folder.teacher(&teacher.key()).join("samples.json"), teacher)?;
        let arguments = teacher.draw(&self.comparison.setting, start)?;
        let ended = self.run(item, &arguments)?;
        Ok(unfinished(&ended).unwrap_or(End::Done))
    }

    fn teacher_row(&self, item: &WorkItem, planned: &PlannedTeacher) -> Result<End> {
        let PlannedTeacher { samples: teacher, target, own_steps } = planned;
        let folder = self.folder();
        let path = teacher.row(folder, target);
        let result_file = ResultFile::at(path.with_extension("rows.json"));
        let arguments = self.measure_teacher(planned, &result_file)?;
        let ended = self.run(item, &arguments)?;
        if let Some(end) = unfinished(&ended) {
            return Ok(end);
        }
        let Some(measured) = Measurement::read_all(result_file.path())?.pop() else {
            return Ok(End::Failed("`ddil evaluate` wrote no measurement".to_owned()));
        };
        let measurement = Measurement {
            method: "teacher".to_owned(),
            thresholding: teacher.thresholding.clone(),
            guidance_scale: (teacher.guidance_scale != 1.0).then_some(teacher.guidance_scale),
            steps: teacher.steps,
            ..measured
        };
        let name = format!("teacher, guidance {}", teacher.guidance_scale);
        let rows = vec![(name, Row::measured(teacher.steps, *own_steps, measurement))];
        let measured_as = self.comparison.setting.measured_as(Some(target));
        write_json(&path, &NamedRows::new(measured_as, rows))?;
        Ok(End::Done)
    }

    /// The arguments that measure a teacher: its samples, or images of prompts, of which the first are kept.
    fn measure_teacher(
        &self,
        planned: &PlannedTeacher,
        result_file: &ResultFile,
    ) -> Result<Vec<OsString>> {
        let PlannedTeacher { samples: teacher, target, .. } = planned;
        let (folder, first) = (self.folder(), &self.comparison.cells[0]);
        if self.comparison.setting.evaluate.prompts.is_some() {
            write_json(&folder.teacher(&teacher.key()).join("samples.json"), teacher)?;
            let mut arguments = self.evaluate(teacher.path.clone().into(), first, result_file);
            arguments.extend(teacher.sampling_options()?);
            let model = Pipeline::open_without_weights(&teacher.path)?;
            let evaluate = &self.comparison.setting.evaluate;
            arguments.extend(evaluate.negative_prompt_option(&model, teacher.guidance_scale));
            arguments.extend(["--keep".into(), teacher.part(folder, 0).into()]);
            return Ok(arguments);
        }
        let subject = folder.teacher(&teacher.key()).into();
        let mut arguments = self.evaluate(subject, first, result_file);
        arguments.extend(["--classes-of".into(), teacher.path.clone().into()]);
        if teacher != target {
            arguments.extend(["--teacher-samples".into(), folder.teacher(&target.key()).into()]);
        }
        Ok(arguments)
    }

    fn cell(&self, item: &WorkItem, planned: &PlannedCell) -> Result<End> {
        self.comparison.remove_failure(planned)?;
        let trained = match self.train(item, planned)? {
            Trained::Completed => self.measure(item, planned)?,
            other => other,
        };
        match trained {
            Trained::Stopped => Ok(End::Stopped),
            Trained::Ended(outcome) => {
                self.comparison.record(planned, outcome.clone())?;
                match outcome {
                    Outcome::Failed { message } => Ok(End::Failed(message)),
                    _ => Ok(End::Done),
                }
            }
            Trained::Completed => Ok(End::Done),
        }
    }

    /// `ddil distill` starts or resumes the cell's run; nothing is run if it is complete.
    fn train(&self, item: &WorkItem, planned: &PlannedCell) -> Result<Trained> {
        let (folder, name) = (self.folder(), &planned.cell.name);
        let run = folder.run_of(name);
        let is_complete = |status: &Status| status.state == State::Completed;
        if Pipeline::is_at(&run) && Status::from_folder(&run).as_ref().is_ok_and(is_complete) {
            return Ok(Trained::Completed);
        }
        let arguments =
            ["distill".into(), folder.config_of(name).into(), OsString::from("--continue")];
        let ended = self.run(item, &arguments)?;
        let status = Status::from_folder(&run).ok();
        if ended.code == Some(0) {
            let complete = status.as_ref().is_some_and(is_complete);
            return Ok(if complete { Trained::Completed } else { Trained::Stopped });
        }
        // The status contains the whole message; for a run that did not start there is only the output.
        let state = status.as_ref().filter(|status| status.state == State::Failed);
        let message = state.and_then(|status| status.error.clone());
        if ended.code == Some(i32::from(NOT_FINITE)) {
            let message = message.unwrap_or(ended.message);
            let step = diverged_at(&message).or(status.map(|status| status.step)).unwrap_or(0);
            return Ok(Trained::Ended(Outcome::Diverged { step, message }));
        }
        if ended.was_stopped {
            return Ok(Trained::Stopped);
        }
        // A killed process leaves the status of an earlier error, or none.
        let message = if ended.code.is_some() { message } else { None };
        Ok(Trained::Ended(Outcome::Failed { message: message.unwrap_or(ended.message) }))
    }

    /// `ddil evaluate` measures the trained student at every number of steps.
    fn measure(&self, item: &WorkItem, planned: &PlannedCell) -> Result<Trained> {
        let (folder, name) = (self.folder(), &planned.cell.name);
        let run = folder.run_of(name);
        let result_file = ResultFile::at(folder.record_of(name).with_extension("rows.json"));
        let own = SamplePlan::of(&Pipeline::open_without_weights(&run)?, None).steps;
        let mut arguments = self.evaluate(run.into(), planned, &result_file);
        arguments.extend(self.comparison.setting.evaluate.student_options());
        if self.comparison.setting.evaluate.prompts.is_none() {
            let samples = folder.teacher(&planned.target.key());
            arguments.extend(["--teacher-samples".into(), samples.into()]);
        }
        arguments.extend(["--keep".into(), folder.samples_of(name).into()]);
        let ended = self.run(item, &arguments)?;
        let not_finite = ended.code == Some(i32::from(NOT_FINITE));
        if let Some(end) = unfinished(&ended).filter(|_| !not_finite) {
            return Ok(match end {
                End::Failed(message) => Trained::Ended(Outcome::Failed { message }),
                _ => Trained::Stopped,
            });
        }
        let measured = if result_file.path().exists() {
            Measurement::read_all(result_file.path())?
        } else {
            Vec::new()
        };
        let mut rows = Vec::new();
        for steps in self.comparison.setting.evaluate.step_counts(own) {
            let found = measured.iter().find(|measurement| measurement.steps == steps);
            rows.push(match found {
                Some(measurement) => Row::measured(steps, steps == own, measurement.clone()),
                None if not_finite => Row::not_finite(steps, steps == own),
                None => {
                    let message = format!("`ddil evaluate` wrote no measurement at {steps} steps");
                    return Ok(Trained::Ended(Outcome::Failed { message }));
                }
            });
        }
        Ok(Trained::Ended(Outcome::Done { rows }))
    }

    /// The arguments common to all measurements of the comparison.
    fn evaluate(
        &self,
        subject: OsString,
        of: &PlannedCell,
        result_file: &ResultFile,
    ) -> Vec<OsString> {
        let setting = &self.comparison.setting;
        let mut arguments: Vec<OsString> = vec!["evaluate".into(), subject];
        if setting.evaluate.prompts.is_none() {
            arguments.extend(["--data".into(), self.folder().config_of(&of.cell.name).into()]);
        }
        arguments.extend(["--json".into(), result_file.path().into()]);
        arguments.extend(["--threads".into(), setting.threads.to_string().into()]);
        arguments.extend(setting.evaluate.common_options());
        let run = &of.cell.config.run;
        let precision = precision(run.precision);
        let format = if run.channels_last { "channels_last" } else { "contiguous" };
        arguments.extend(["--device", &run.device, "--precision", precision].map(Into::into));
        arguments.extend(["--memory-format", format].map(Into::into));
        arguments
    }
}

/// The outcome of a cell's training.
enum Trained {
    /// It is trained.
    Completed,
    /// It was asked to stop.
    Stopped,
    /// It ended with this outcome, which is recorded.
    Ended(Outcome),
}

/// The outcome of a verb that did not finish.
fn unfinished(ended: &Ended) -> Option<End> {
    match ended {
        Ended { code: Some(0), .. } => None,
        // A process that is stopped in the middle of a computation may fail while it ends.
        Ended { was_stopped: true, .. } => Some(End::Stopped),
        Ended { message, .. } => Some(End::Failed(message.clone())),
    }
}

/// The step in the message about a loss or gradient that is NaN or infinite.
fn diverged_at(message: &str) -> Option<u64> {
    message.strip_prefix("step ")?.split_once(':')?.0.parse().ok()
}
