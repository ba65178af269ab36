//! The training loop for every task: update, record, save, stop, resume.

mod phase_optimizer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{fs, io};

use ddil_evaluate::{Metric, Scores};
use ddil_files::fault::{self, Point};
use ddil_files::{Invalid, parent, sync_folder};
use ddil_losses::Phase;
use ddil_pipelines::Image;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use self::phase_optimizer::PhaseOptimizer;
pub use self::phase_optimizer::UpdateConfig;
use crate::checkpoint::{
    Checkpoint, CheckpointWriter, best_of, discard_newer, newest_intact, note_best,
};
use crate::config::{DistillConfig, EvaluateSection, OutputSection, TrainConfig};
use crate::ema::{Ema, EmaConfig};
use crate::environment::RunEnvironment;
use crate::error::{Error, Result, with_causes};
use crate::evidence::{Evidence, not_finite_among};
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::record::{Position, Record};
use crate::run_folder::RunFolder;
use crate::state;
use crate::tensorboard::{EventWriter, tag};

/// A training task: it returns losses, and the whole state on which its next update depends can be saved.
///
/// Methods return the errors of data, networks, file system and libtorch.
pub trait Task {
    /// The kind of its checkpoints.
    fn kind(&self) -> &'static str;

    /// Total number of updates.
    fn total_updates(&self) -> u64;

    /// Updates per stage; the optimizer and the moving average restart with each stage.
    fn updates_per_stage(&self) -> u64;

    /// The networks trained, each by an optimizer of its own; the student first.
    fn trained(&self) -> &'static [Phase] {
        &[Phase::Student]
    }

    /// The networks trained in an update, in order.
    fn phases(&self, _step: u64) -> &'static [Phase] {
        &[Phase::Student]
    }

    /// Parameters of a phase's optimizer, with their names.
    fn parameters(&self, phase: Phase) -> Vec<(String, Tensor)>;

    /// The loss of one phase of an update, with its graph.
    ///
    /// # Errors
    ///
    /// Errors of data and networks.
    fn loss(&mut self, step: u64, phase: Phase) -> Result<UpdateLoss>;

    /// The findings about the batch of a phase with numbers that are not finite, and the batch itself to be saved.
    ///
    /// Called before the parameters change and before the run stops with an error.
    ///
    /// # Errors
    ///
    /// Errors of networks.
    fn inspect(&mut self, _step: u64, _phase: Phase) -> Result<Option<Evidence>> {
        Ok(None)
    }

    /// Called after the optimizers' steps.
    ///
    /// # Errors
    ///
    /// Errors of libtorch.
    fn after_update(&mut self, step: u64) -> Result<()>;

    /// Sets the run's folder: called once, before the first update or [`restore`](Self::restore).
    ///
    /// # Errors
    ///
    /// Errors of the file system. The default is a no-op, for tasks without files of their own.
    fn enter(&mut self, _folder: &Path) -> Result<()> {
        Ok(())
    }

    /// Starts a new stage at `step`; `average` contains the final moving average of the previous stage.
    ///
    /// # Errors
    ///
    /// [`Error::StateMismatch`] if the average has other parameters.
    fn start_stage(&mut self, step: u64, average: &[(String, Tensor)]) -> Result<()>;

    /// An image grid of the averaged network's samples.
    ///
    /// # Errors
    ///
    /// Errors of the network.
    fn samples(&mut self, average: &[(String, Tensor)]) -> Result<Image>;

    /// An image grid of the teacher's samples, from the same noise as [`samples`](Self::samples), and a description; `None`
    /// if there is no teacher, the default. Must not change anything that the next update depends on.
    ///
    /// # Errors
    ///
    /// Errors of the network.
    fn teacher_samples(&mut self) -> Result<Option<(Image, String)>> {
        Ok(None)
    }

    /// Evaluates the averaged network; `None` if `interrupt` requested a stop. Must not change anything that the next
    /// update depends on.
    ///
    /// # Errors
    ///
    /// Errors of the network and of the metrics; [`Error::Invalid`] for a task that is never evaluated, the default.
    fn evaluate(
        &mut self,
        _average: &[(String, Tensor)],
        _interrupt: &Interrupt,
    ) -> Result<Option<Scores>> {
        let expected = format!("0: a task `{}` is not evaluated", self.kind());
        Err(Invalid::new("evaluate.interval", "set", expected).into())
    }

    /// Adds the task's state besides its parameters to a checkpoint.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    fn save(&self, writer: &mut CheckpointWriter) -> Result<()>;

    /// Restores that state; the parameters themselves are restored afterwards.
    ///
    /// # Errors
    ///
    /// Errors of the file system; [`Error::StateMismatch`] for the state of another task.
    fn restore(&mut self, checkpoint: &Checkpoint, step: u64) -> Result<()>;

    /// Writes the final model in diffusers' format, with its provenance.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    fn export(&self, folder: &Path, average: &[(String, Tensor)], spent: Spent) -> Result<()>;
}

/// Updates and time spent on a model so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spent {
    /// Updates done.
    pub updates: u64,
    /// Seconds of training, over all sessions of the run.
    pub seconds: f64,
}

/// The loss of an update and the figures to record.
#[derive(Debug)]
pub struct UpdateLoss {
    /// One value per sample, `[batch]`, with its graph.
    pub per_sample: Tensor,
    /// More figures, by name.
    pub figures: Vec<(String, f64)>,
    /// Sum of all network outputs behind this loss, a scalar on its device: finite if they are. None if outputs are not
    /// watched.
    pub outputs_sum: Option<Tensor>,
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All updates are done; the model is in this folder.
    Completed {
        /// The exported model.
        export: PathBuf,
    },
    /// Stopped on request; saved at this step.
    Interrupted {
        /// Updates done.
        step: u64,
    },
}

/// The loop's settings besides the task.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// How the student is updated.
    pub student: UpdateConfig,
    /// How the critic is updated, for a method that has one.
    pub critic: UpdateConfig,
    /// The moving average of the student.
    pub ema: EmaConfig,
    /// When the moving average is evaluated.
    pub evaluate: EvaluateSection,
    /// Logs, grids, checkpoints.
    pub output: OutputSection,
}

impl From<&TrainConfig> for SessionConfig {
    fn from(config: &TrainConfig) -> Self {
        let TrainConfig { optimizer, learning_rate, ema, evaluate, output, .. } = config.clone();
        let student = UpdateConfig { optimizer, learning_rate };
        Self { critic: student.clone(), student, ema, evaluate, output }
    }
}

impl From<&DistillConfig> for SessionConfig {
    fn from(config: &DistillConfig) -> Self {
        let DistillConfig { optimizer, learning_rate, critic, ema, evaluate, output, .. } =
            config.clone();
        let critic = UpdateConfig {
            optimizer: critic.optimizer.unwrap_or(optimizer),
            learning_rate: critic.learning_rate.unwrap_or(learning_rate),
        };
        Self { student: UpdateConfig { optimizer, learning_rate }, critic, ema, evaluate, output }
    }
}

/// A task in progress, in its run folder.
#[derive(Debug)]
pub struct Session<T> {
    task: T,
    config: SessionConfig,
    folder: RunFolder,
    step: u64,
    /// One per trained network, in the order of [`Task::trained`].
    optimizers: Vec<PhaseOptimizer>,
    ema: Ema,
    /// The newest figures of each phase: not every update has every phase, and every line of the record contains all
    /// figures.
    figures: BTreeMap<Phase, Vec<(String, f64)>>,
    /// The best evaluation of this stage, if checkpoints are kept by it.
    best: Option<Best>,
    /// Whether the evaluation and other outputs of the last update are still to be written: a stop was requested
    /// during the evaluation.
    are_outputs_due: bool,
    record: Record,
    timings: Record,
    events: EventWriter,
    seconds: f64,
}

/// An evaluation that was better than all before it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Best {
    step: u64,
    value: f64,
}

/// The loop's own state in a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoopState {
    step: u64,
    seconds: f64,
    averaged_updates: u64,
    metrics: Position,
    #[serde(default)]
    figures: BTreeMap<Phase, Vec<(String, f64)>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    best: Option<Best>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    are_outputs_due: bool,
}

/// The starting point of a resumed run.
struct Start {
    checkpoint: Option<Checkpoint>,
    record: Record,
    timings: Record,
    step: u64,
    seconds: f64,
}

impl Start {
    fn find(folder: &RunFolder, kind: &str) -> Result<Self> {
        let checkpoint = newest_intact(&folder.checkpoints())?;
        let (mut step, mut seconds, mut metrics) = (0, 0.0, Position::default());
        if let Some(checkpoint) = &checkpoint {
            checkpoint.ensure_kind(kind)?;
            for obstacle in checkpoint.obstacles_to_exact_resume()? {
                tracing::warn!("the resumed run will not be bit-identical: {obstacle}");
            }
            LoopState { step, seconds, metrics, .. } = checkpoint.json(STATE)?;
        }
        // Everything that can fail comes before newer checkpoints are deleted.
        let record = Record::resume(&folder.file("metrics.jsonl"), metrics)?;
        let timings = Record::resume_after(&folder.file("timings.jsonl"), step)?;
        if checkpoint.is_some() {
            discard_newer(&folder.checkpoints(), step)?;
        }
        Ok(Self { checkpoint, record, timings, step, seconds })
    }
}

/// Records in `status.json` why a run could not be resumed.
fn failed(folder: &mut RunFolder, error: Error) -> Error {
    let _ = folder.fail(folder.status().step, &error);
    error
}

const STATE: &str = "session.json";
const AVERAGE: &str = "ema.safetensors";
/// Folders of the averaged model: of the last checkpoint, and of the best evaluation.
pub(crate) const EXPORT: &str = "export";
const BEST: &str = "best";

/// The moving average of a checkpoint, and what was spent on it.
pub(crate) fn average_of(checkpoint: &Checkpoint) -> Result<(Vec<(String, Tensor)>, Spent)> {
    let LoopState { step, seconds, .. } = checkpoint.json(STATE)?;
    Ok((checkpoint.tensors(AVERAGE)?, Spent { updates: step, seconds }))
}

impl<T: Task> Session<T> {
    /// Starts a task in a new run folder.
    ///
    /// # Errors
    ///
    /// Errors of the file system and libtorch.
    pub fn start(task: T, config: SessionConfig, mut folder: RunFolder) -> Result<Self> {
        let create = |name: &str| Record::create(&folder.file(name));
        let records =
            create("metrics.jsonl").and_then(|record| Ok((record, create("timings.jsonl")?)));
        let (record, timings) = records.map_err(|error| failed(&mut folder, error))?;
        Self::new(task, config, folder, record, timings, 0, 0.0)
    }

    /// Resumes a task from the last sound checkpoint of its run folder.
    ///
    /// Without a checkpoint (the run was killed before the first) the task starts again, with the same result.
    ///
    /// # Errors
    ///
    /// Errors of the file system and libtorch; [`Error::OtherCheckpoint`] if the checkpoint is of another task,
    /// [`Error::NoIntactCheckpoint`] if all are damaged. They are recorded in `status.json`.
    pub fn resume(task: T, config: SessionConfig, mut folder: RunFolder) -> Result<Self> {
        let Start { checkpoint, record, timings, step, seconds } =
            match Start::find(&folder, task.kind()) {
                Ok(start) => start,
                Err(error) => return Err(failed(&mut folder, error)),
            };
        let mut session = Self::new(task, config, folder, record, timings, step, seconds)?;
        if let Some(checkpoint) = checkpoint {
            if let Err(error) = session.restore(&checkpoint) {
                return Err(failed(&mut session.folder, error));
            }
            tracing::info!("resumed from {} at step {step}", checkpoint.path().display());
        }
        Ok(session)
    }

    fn new(
        mut task: T,
        config: SessionConfig,
        mut folder: RunFolder,
        record: Record,
        timings: Record,
        step: u64,
        seconds: f64,
    ) -> Result<Self> {
        let parts = |task: &mut T| {
            task.enter(folder.path())?;
            let optimizers = PhaseOptimizer::all(task, &config)?;
            let parameters = task.parameters(Phase::Student);
            let device = parameters.first().map_or(Device::Cpu, |(_, tensor)| tensor.device());
            RunEnvironment::note(folder.path(), step, device)?;
            let ema = config.ema.build(parameters)?;
            Ok((optimizers, ema, EventWriter::create(folder.path(), step + 1)?))
        };
        let parts = parts(&mut task);
        let (optimizers, ema, events) = parts.map_err(|error| failed(&mut folder, error))?;
        let figures = BTreeMap::new();
        Ok(Self {
            task,
            config,
            folder,
            step,
            optimizers,
            ema,
            figures,
            best: None,
            are_outputs_due: false,
            record,
            timings,
            events,
            seconds,
        })
    }

    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.task.restore(checkpoint, self.step)?;
        // A later stage may have created other networks: list the parameters again.
        for phase in self.task.trained() {
            let parameters = self.task.parameters(*phase);
            let saved = checkpoint.tensors(phase_optimizer::parameters_file(*phase))?;
            state::restore("parameters", &parameters, &saved)?;
        }
        self.begin_stage()?;
        for phase_optimizer in &mut self.optimizers {
            let saved =
                checkpoint.tensors(phase_optimizer::optimizer_file(phase_optimizer.phase))?;
            phase_optimizer.optimizer.load_state(&saved)?;
        }
        let LoopState { averaged_updates, figures, best, are_outputs_due, .. } =
            checkpoint.json(STATE)?;
        (self.figures, self.best, self.are_outputs_due) = (figures, best, are_outputs_due);
        self.ema.load(&checkpoint.tensors(AVERAGE)?, averaged_updates)?;
        self.restore_best()
    }

    /// Completes what a process that was killed left of its best model.
    fn restore_best(&self) -> Result<()> {
        self.finish_replacing(BEST)?;
        let Some(best) = self.best.filter(|best| best.step == self.step) else { return Ok(()) };
        if best_of(&self.folder.checkpoints()) == Some(best.step) {
            return Ok(());
        }
        self.place_best(best)
    }

    /// The task.
    pub fn task(&self) -> &T {
        &self.task
    }

    /// The run's folder.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// Seconds spent in updates so far, over all sessions of the run.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Updates done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Runs to the end or until a stop is requested, and records the outcome in `status.json`.
    ///
    /// # Errors
    ///
    /// [`Error::NonFinite`] before a loss or gradient that is not finite reaches the weights; errors of the task, the
    /// file system and libtorch. The last sound checkpoint is kept.
    pub fn run(&mut self, interrupt: &Interrupt) -> Result<Outcome> {
        let outcome = self.run_to_end(interrupt);
        match &outcome {
            Ok(Outcome::Completed { .. }) => self.folder.complete(self.step)?,
            Ok(Outcome::Interrupted { .. }) => self.folder.interrupt(self.step)?,
            Err(error) => {
                // On a full disk this fails too; the first error is the one to report.
                let _ = self.folder.fail(self.step, error);
            }
        }
        outcome
    }

    fn run_to_end(&mut self, interrupt: &Interrupt) -> Result<Outcome> {
        let total = self.task.total_updates();
        let mut progress = Progress::new(self.task.kind(), self.step, total);
        if std::mem::take(&mut self.are_outputs_due) {
            self.write_outputs(total, interrupt, &mut progress)?;
        }
        while self.step < total || self.are_outputs_due {
            if interrupt.is_requested() {
                progress.set_activity("saving");
                self.save()?;
                progress.finish();
                return Ok(Outcome::Interrupted { step: self.step });
            }
            self.update()?;
            progress.update(self.step, &self.figures());
            self.write_outputs(total, interrupt, &mut progress)?;
        }
        progress.set_activity("exporting the model");
        // Repeated for a run that was resumed after its last update.
        self.export().map(|export| Outcome::Completed { export })
    }

    /// The newest figures of all phases.
    fn figures(&self) -> Vec<(String, f64)> {
        self.figures.values().flatten().cloned().collect()
    }

    /// One update; afterwards `self.step` includes it.
    fn update(&mut self) -> Result<()> {
        let started = Instant::now();
        let step = self.step;
        let per_stage = self.task.updates_per_stage();
        if step > 0 && step.is_multiple_of(per_stage) {
            self.start_stage(step)?;
        }
        for phase in self.task.phases(step) {
            let figures = self.update_of(*phase, step, step % per_stage, per_stage)?;
            self.figures.insert(*phase, figures);
        }
        self.task.after_update(step)?;
        self.step += 1;
        self.seconds += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// One phase of an update.
    fn update_of(
        &mut self,
        phase: Phase,
        step: u64,
        stage_step: u64,
        per_stage: u64,
    ) -> Result<Vec<(String, f64)>> {
        let phase_optimizer = phase_optimizer::find(&mut self.optimizers, phase)?;
        phase_optimizer.optimizer.zero_grad()?;
        let UpdateLoss { per_sample, figures, outputs_sum } = self.task.loss(step, phase)?;
        let own =
            phase_optimizer.update(&per_sample, outputs_sum.as_ref(), step, stage_step, per_stage);
        let own = own.map_err(|error| self.explain(error, step, phase))?;
        if phase == Phase::Student {
            self.ema.update()?;
        }
        Ok(own.into_iter().chain(figures).collect())
    }

    /// Adds the findings about the batch to an error about numbers, and saves the batch for inspection.
    fn explain(&mut self, error: Error, step: u64, phase: Phase) -> Error {
        let Error::NonFinite { step: update, name, value, detail, saved } = error else {
            return error;
        };
        let evidence = self.task.inspect(step, phase).unwrap_or_else(|error| {
            tracing::warn!("the batch could not be inspected: {}", with_causes(&error));
            None
        });
        let found = evidence.as_ref().and_then(Evidence::first);
        let detail = match (found, detail) {
            (Some(found), Some(detail)) => Some(format!("{found}; {detail}")),
            (found, detail) => found.or(detail),
        };
        let mut error = Error::NonFinite { step: update, name, value, detail, saved };
        if let Some(evidence) = evidence {
            let written = evidence.write(self.folder.path(), update, &error.to_string());
            match (&mut error, written) {
                (Error::NonFinite { saved, .. }, Ok(folder)) => *saved = Some(folder),
                (_, Err(cause)) => {
                    tracing::warn!("the batch could not be saved: {}", with_causes(&cause));
                }
                (_, Ok(_)) => {}
            }
        }
        error
    }

    fn start_stage(&mut self, step: u64) -> Result<()> {
        self.task.start_stage(step, self.ema.tensors())?;
        // Students of different numbers of steps are different models.
        self.best = None;
        self.begin_stage()
    }

    /// New optimizers and a new moving average of the task's present parameters.
    fn begin_stage(&mut self) -> Result<()> {
        self.optimizers = PhaseOptimizer::all(&self.task, &self.config)?;
        self.ema = self.config.ema.build(self.task.parameters(Phase::Student))?;
        Ok(())
    }

    /// Evaluates, logs, draws and saves whatever is due after the last update.
    fn write_outputs(
        &mut self,
        total: u64,
        interrupt: &Interrupt,
        progress: &mut Progress,
    ) -> Result<()> {
        let OutputSection { log_interval, sample_interval, checkpoint_interval, .. } =
            self.config.output;
        let step = self.step;
        let last = step == total;
        let due = |interval: u64| last || (interval > 0 && step.is_multiple_of(interval));
        let mut evaluated = None;
        if self.config.evaluate.is_due(step, total) {
            progress.set_activity("evaluating");
            evaluated = self.task.evaluate(self.ema.tensors(), interrupt)?;
            // Stopped: a session that resumes begins with it.
            self.are_outputs_due = evaluated.is_none();
            if self.are_outputs_due {
                return Ok(());
            }
        }
        let scores = evaluated.as_ref().map(figures_of).unwrap_or_default();
        if !scores.is_empty() {
            let shown = |(name, value): &(String, f64)| format!("{name} {value:.4}");
            let shown: Vec<String> = scores.iter().map(shown).collect();
            tracing::info!("step {step}: {}", shown.join("  "));
        }
        if due(log_interval) {
            self.log(&[self.figures(), scores].concat(), true)?;
        } else if !scores.is_empty() {
            self.log(&scores, false)?;
        }
        if due(sample_interval) {
            progress.set_activity("drawing samples");
            let image = self.task.samples(self.ema.tensors())?;
            image.save(&self.folder.samples_of(step))?;
            self.events.image(step, "samples", &image)?;
        }
        // The next stage has another teacher.
        if due(sample_interval) || step.is_multiple_of(self.task.updates_per_stage()) {
            self.draw_teacher(progress)?;
        }
        let best = evaluated.and_then(|scores| self.improvement(&scores));
        self.best = best.or(self.best);
        if due(checkpoint_interval) || best.is_some() {
            progress.set_activity("writing a checkpoint");
            self.save()?;
        }
        best.map_or(Ok(()), |best| self.place_best(best))
    }

    /// Draws the teacher's samples, once in a run; a task without a teacher has none.
    fn draw_teacher(&mut self, progress: &mut Progress) -> Result<()> {
        let path = self.folder.teacher_samples();
        if path.exists() {
            return Ok(());
        }
        progress.set_activity("drawing the teacher's samples");
        let Some((image, description)) = self.task.teacher_samples()? else { return Ok(()) };
        Ok(image.save_described(&path, &description)?)
    }

    /// The evaluation of the last update, if checkpoints are kept by it and it is better than all before it.
    fn improvement(&self, scores: &Scores) -> Option<Best> {
        let metric = self.config.output.checkpoints.keep_best?;
        let value = metric.of(scores)?;
        let is_better = self.best.is_none_or(|best| metric.is_better(value, best.value));
        is_better.then_some(Best { step: self.step, value })
    }

    /// Writes the model of the best evaluation, and the name of its checkpoint.
    fn place_best(&self, best: Best) -> Result<()> {
        let path = self.export_to(BEST)?;
        note_best(&self.folder.checkpoints(), best.step)?;
        let metric = self.config.output.checkpoints.keep_best.map_or("", Metric::as_str);
        tracing::info!(
            "step {}: the best {metric} so far; the model is in {}",
            best.step,
            path.display()
        );
        Ok(())
    }

    /// Writes a line of the record and its points; `with_time` also the time spent.
    fn log(&mut self, figures: &[(String, f64)], with_time: bool) -> Result<()> {
        let values: Map<String, Value> =
            figures.iter().map(|(name, value)| (name.clone(), Value::from(*value))).collect();
        self.record.write(self.step, &values)?;
        if with_time {
            // Wall-clock times differ between runs, so they are separate from the records that must not differ.
            let seconds = Map::from_iter([("seconds".to_owned(), self.seconds.into())]);
            self.timings.write(self.step, &seconds)?;
        }
        for (name, value) in figures {
            self.events.scalar(self.step, &tag(name), *value as f32)?;
        }
        if with_time {
            self.events.scalar(self.step, "time/seconds", self.seconds as f32)?;
        }
        self.events.flush()
    }

    /// Saves everything that the next update depends on, and deletes old checkpoints.
    fn save(&mut self) -> Result<()> {
        self.ensure_finite_state()?;
        let mut writer =
            CheckpointWriter::new(&self.folder.checkpoints(), self.step, self.task.kind())?;
        for PhaseOptimizer { phase, optimizer, .. } in &self.optimizers {
            let parameters = self.task.parameters(*phase);
            writer.tensors(phase_optimizer::parameters_file(*phase), &parameters)?;
            writer.tensors(phase_optimizer::optimizer_file(*phase), &optimizer.state_tensors()?)?;
        }
        writer.tensors(AVERAGE, self.ema.tensors())?;
        self.task.save(&mut writer)?;
        let metrics = self.record.position()?;
        let state = LoopState {
            step: self.step,
            seconds: self.seconds,
            averaged_updates: self.ema.num_updates(),
            metrics,
            figures: self.figures.clone(),
            best: self.best,
            are_outputs_due: self.are_outputs_due,
        };
        writer.json(STATE, &state)?;
        let newest = writer.commit()?;
        let best = self.best.map(|best| best.step);
        self.config.output.checkpoints.apply_except(&newest, best)?;
        self.export()?;
        self.folder.progress(self.step)
    }

    /// A step can produce weights that are not finite from a finite loss and gradient: they are never saved in a
    /// checkpoint.
    fn ensure_finite_state(&self) -> Result<()> {
        let ensure = |what: String, tensors: &[(String, Tensor)]| {
            let found = not_finite_among(tensors)?;
            let Some((name, tensor)) = found.first().map(|first| &tensors[*first]) else {
                return Ok(());
            };
            let sum = tensor.f_detach().and_then(|tensor| tensor.f_sum(Kind::Double));
            let value = sum.and_then(|sum| sum.f_double_value(&[]));
            let value = value.map_err(Error::torch("Session::save"))?;
            let name = format!("the sum of `{name}`, {what},");
            let detail = Some(format!("{} of {} are not finite", found.len(), tensors.len()));
            Err(Error::NonFinite { step: self.step, name, value, detail, saved: None })
        };
        for PhaseOptimizer { phase, optimizer, .. } in &self.optimizers {
            let owner = match phase {
                Phase::Student => "student",
                Phase::Critic => "critic",
            };
            ensure(format!("a parameter of the {owner}"), &self.task.parameters(*phase))?;
            ensure(
                format!("in the state of the {owner}'s optimizer"),
                &optimizer.state_tensors()?,
            )?;
        }
        ensure("in the moving average".to_owned(), self.ema.tensors())
    }

    /// Replaces the previous averaged model with that of this step, atomically.
    fn export(&self) -> Result<PathBuf> {
        self.export_to(EXPORT)
    }

    /// Removes what a process that was killed left of replacing a model, or completes it.
    fn finish_replacing(&self, name: &str) -> Result<()> {
        let [export, aside, replaced] = self.places_of(name);
        remove(&aside)?;
        if !export.exists() && replaced.exists() {
            // A process was killed between the two renames of `export_to`.
            fs::rename(&replaced, &export).map_err(Error::io("restore", &export))?;
        }
        remove(&replaced)
    }

    /// A model's folder, where a new one is written, and where the old one is moved.
    fn places_of(&self, name: &str) -> [PathBuf; 3] {
        [name.to_owned(), format!(".{name}-new"), format!(".{name}-old")]
            .map(|name| self.folder.file(&name))
    }

    fn export_to(&self, name: &str) -> Result<PathBuf> {
        self.finish_replacing(name)?;
        let [export, aside, replaced] = self.places_of(name);
        let spent = Spent { updates: self.step, seconds: self.seconds };
        let written = fault::reach(Point::ExportWrite, &export)
            .map_err(Error::io("write", &export))
            .and_then(|()| self.task.export(&aside, self.ema.tensors(), spent));
        if let Err(error) = written {
            // An incomplete model is useless, and the disk may be full.
            let _ = remove(&aside);
            return Err(error);
        }
        if export.exists() {
            fault::rename(Point::ExportMakeRoom, &export, &replaced)
                .map_err(Error::io("rename", &export))?;
        }
        fault::rename(Point::ExportRename, &aside, &export).map_err(Error::io("rename", &aside))?;
        sync_folder(parent(&export))?;
        fault::reach(Point::ExportClear, &export).map_err(Error::io("remove", &replaced))?;
        remove(&replaced)?;
        Ok(export)
    }
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", folder)(error))
        }
        _ => Ok(()),
    }
}

/// The scores for the record: `eval_frechet` and so on.
fn figures_of(scores: &Scores) -> Vec<(String, f64)> {
    let figure = |(metric, value): (Metric, f64)| (format!("eval_{}", metric.as_str()), value);
    scores.values().map(figure).collect()
}
