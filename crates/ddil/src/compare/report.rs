//! The results of a comparison so far.

use std::collections::BTreeMap;

use ddil_evaluate::Measurement;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::folder::ComparisonFolder;
use super::item::{PlannedCell, PlannedTeacher};
use super::matrix::Axis;
use super::metric::Metric;
use super::plan::Comparison;
use super::plan_file::{CellName, PlanFile};
use super::record::{CellRecord, NamedRows, Outcome, Row};
use super::setting::TeacherSamples;
use super::statistics::Estimate;
use crate::error::Result;
use crate::sample_file;

/// One line of `results.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The kind of entry.
    pub kind: EntryKind,
    /// Name of the cell, or of what was measured.
    pub name: String,
    /// The cell's value on each axis; empty for other entries.
    pub axes: BTreeMap<String, String>,
    /// The cell's seed.
    pub seed: Option<u64>,
    /// How it ended.
    pub state: EntryState,
    /// The reason, if it did not end well; also the step, if it diverged.
    pub message: Option<String>,
    /// Number of sampling steps; 0 for real images.
    pub steps: u32,
    /// Whether the model is made for this number of steps.
    pub own_steps: bool,
    /// The measurement, as written by `ddil evaluate --json`.
    pub measurement: Option<Measurement>,
}

/// The kind of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// Real images against real images.
    Data,
    /// A teacher.
    Teacher,
    /// A cell.
    Cell,
}

/// How an entry ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryState {
    /// Measured.
    Done,
    /// Measured as far as possible, with coverage below 0.1 or samples that are NaN or infinite.
    Collapsed,
    /// Its training diverged.
    Diverged,
    /// Another error.
    Failed,
}

/// The results of a comparison so far; tables, plots and images are made from it.
#[derive(Debug)]
pub struct ComparisonReport {
    /// The name of the comparison.
    pub name: String,
    /// The varied settings.
    pub axes: Vec<Axis>,
    /// All measurements and failures.
    pub entries: Vec<Entry>,
    /// Rows of images, with their labels.
    pub(crate) image_rows: Vec<(String, Tensor)>,
}

/// The cells of an arm at one number of steps.
#[derive(Clone, Debug)]
pub struct ArmAt<'a> {
    /// The arm's value on each axis.
    pub values: Vec<&'a str>,
    /// Number of sampling steps.
    pub steps: u32,
    /// Whether the students are made for this number of steps.
    pub(crate) own_steps: bool,
    /// The measurements, by seed.
    pub measured: BTreeMap<u64, &'a Measurement>,
    /// Number of cells that collapsed at this number of steps.
    pub(crate) num_collapsed: usize,
    /// Number of cells that diverged.
    pub num_diverged: usize,
    /// Number of cells that failed.
    pub(crate) num_failed: usize,
}

/// The difference between an arm and the arm with the baseline of one axis and the same values elsewhere.
#[derive(Clone, Debug)]
pub struct Difference<'a> {
    /// The axis.
    pub axis: &'a str,
    /// The arm's value on it.
    pub value: &'a str,
    /// The baseline value.
    pub baseline: &'a str,
    /// The values on the other axes, common to both.
    pub others: Vec<&'a str>,
    /// Number of sampling steps.
    pub steps: u32,
    /// Mean of `value - baseline` over the seeds that both arms have.
    pub of: Vec<(Metric, Estimate)>,
}

/// The shift of an arm at each timestep, noisiest first: the timestep, the measured distance, and that of chance.
#[derive(Clone, Debug, PartialEq)]
pub struct Shift {
    /// The arm.
    pub name: String,
    /// Timestep, energy distance over seeds, and energy distance of chance.
    pub(crate) points: Vec<(i64, Estimate, Estimate)>,
}

impl ComparisonReport {
    /// Reads the present results of a comparison.
    ///
    /// # Errors
    ///
    /// Invalid files.
    pub(crate) fn gather(plan: &Comparison) -> Result<Self> {
        let (folder, matrix) = (plan.folder(), &plan.matrix);
        let (mut entries, mut image_rows) = (Vec::new(), Vec::new());
        if let Some(found) = NamedRows::read(&folder.real(), &plan.setting.measured_as(None))? {
            entries.extend(found.rows.into_iter().map(|row| of_row(EntryKind::Data, row)));
        }
        for PlannedTeacher { samples, target, own_steps } in &plan.teachers {
            let measured_as = plan.setting.measured_as(Some(target));
            if let Some(found) = NamedRows::read(&samples.row(folder, target), &measured_as)? {
                let name = found.rows.first().map_or(String::new(), |(name, _)| name.clone());
                // Which numbers of steps are a student's own depends on the matrix, not on the row.
                let now = |(name, row)| (name, Row { own_steps: *own_steps, ..row });
                let rows = found.rows.into_iter().map(now);
                entries.extend(rows.map(|row| of_row(EntryKind::Teacher, row)));
                if *own_steps {
                    let name = format!("{name}, {} steps", samples.steps);
                    image_rows.push((name, first_drawn(folder, samples)?));
                }
            }
        }
        for planned in &plan.cells {
            entries.extend(of_cell(plan, planned)?);
            let cell = &planned.cell;
            let samples = folder.samples_of(&cell.name);
            if Some(&cell.seed) == matrix.seeds.first() && samples.is_file() {
                image_rows.push((cell.name.clone(), sample_file::read(&samples)?));
            }
        }
        let (name, axes) = (matrix.name.clone(), matrix.axes.clone());
        Ok(Self { name, axes, entries, image_rows })
    }

    /// Reads the results of the comparison in a folder, without its matrix: also while it runs, and on another machine.
    ///
    /// `results.json` is written at the end; the records of cells that are newer replace their entries. Without a plan
    /// in the folder, axes are in the order of their names and have no baselines; `name` is then the name.
    ///
    /// # Errors
    ///
    /// Invalid files.
    pub(crate) fn from_folder(
        folder: &ComparisonFolder,
        name: &str,
        plan: Option<&PlanFile>,
    ) -> Result<Self> {
        let results = folder.file("results.json");
        let mut entries: Vec<Entry> =
            if results.is_file() { ddil_files::read_json(&results)? } else { unfiltered(folder)? };
        let Some(plan) = plan else {
            let named = entries.iter().flat_map(|entry| entry.axes.keys());
            let names: std::collections::BTreeSet<String> = named.cloned().collect();
            let axis = |name| Axis { name, baseline: None, values: Vec::new() };
            let axes = names.into_iter().map(axis).collect();
            return Ok(Self { name: name.to_owned(), axes, entries, image_rows: Vec::new() });
        };
        let axes = plan.axes();
        entries.retain(|entry| entry.kind != EntryKind::Cell);
        let mut image_rows = Self::teacher_images(folder, plan)?;
        for cell in &plan.cells {
            let record = CellRecord::from_file(&folder.record_of(&cell.name))?;
            let record = record.filter(|record| record.config_sha256 == cell.config_sha256);
            entries.extend(
                record.into_iter().flat_map(|found| of_outcome(&axes, cell, found.outcome)),
            );
            let samples = folder.samples_of(&cell.name);
            if plan.cells.first().is_some_and(|first| first.seed == cell.seed) && samples.is_file()
            {
                image_rows.push((cell.name.clone(), sample_file::read(&samples)?));
            }
        }
        Ok(Self { name: plan.name.clone(), axes, entries, image_rows })
    }

    /// The first samples of each teacher at full steps and at those of students, in that order.
    fn teacher_images(folder: &ComparisonFolder, plan: &PlanFile) -> Result<Vec<(String, Tensor)>> {
        let mut teachers = Vec::new();
        for path in folder.teachers()? {
            let samples: TeacherSamples = ddil_files::read_json(&path.join("samples.json"))?;
            if samples.part(folder, 0).is_file() {
                teachers.push(samples);
            }
        }
        let most = teachers.iter().map(|samples| samples.steps).max();
        let is_shown = |samples: &TeacherSamples| {
            Some(samples.steps) == most
                || plan.cells.iter().any(|cell| cell.own_steps == samples.steps)
        };
        teachers.retain(is_shown);
        teachers.sort_by(|a, b| {
            b.steps.cmp(&a.steps).then(b.guidance_scale.total_cmp(&a.guidance_scale))
        });
        let labelled = |samples: &TeacherSamples| {
            let TeacherSamples { steps, guidance_scale, .. } = samples;
            let name = format!("teacher, guidance {guidance_scale}, {steps} steps");
            Ok((name, first_drawn(folder, samples)?))
        };
        teachers.iter().map(labelled).collect()
    }

    /// A report of existing entries, without images.
    pub fn new(name: &str, axes: Vec<Axis>, entries: Vec<Entry>) -> Self {
        Self { name: name.to_owned(), axes, entries, image_rows: Vec::new() }
    }

    /// The metrics of the tables: those that a measurement has if images of prompts were measured, otherwise those of
    /// [`Metric::ALL`].
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let measured: Vec<&Measurement> =
            self.entries.iter().filter_map(|entry| entry.measurement.as_ref()).collect();
        let is_measured = |metric: &Metric| measured.iter().any(|m| metric.of(m).is_some());
        if measured.iter().all(|measurement| measurement.prompts.is_none()) {
            let is_shown =
                |metric: &Metric| !Metric::OF_CLASSES.contains(metric) || is_measured(metric);
            return Metric::ALL.into_iter().filter(is_shown).collect();
        }
        Metric::ALL.into_iter().chain(Metric::OF_PROMPTS).filter(is_measured).collect()
    }

    /// Entries of one kind.
    pub(crate) fn of_kind(&self, kind: EntryKind) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| entry.kind == kind)
    }

    /// Whether all measured cells have the same number of samples at all numbers of steps.
    pub(crate) fn has_one_number_of_samples(&self) -> bool {
        let measured = self.of_kind(EntryKind::Cell).filter_map(|entry| entry.measurement.as_ref());
        let mut counts = measured.map(|measurement| measurement.samples);
        let first = counts.next();
        counts.all(|count| Some(count) == first)
    }

    /// Cells grouped over seeds, in the order of the matrix, then by steps.
    pub fn arms(&self) -> Vec<ArmAt<'_>> {
        let mut arms: Vec<ArmAt<'_>> = Vec::new();
        for entry in self.of_kind(EntryKind::Cell) {
            let values = self.values_of(entry);
            let found =
                arms.iter().position(|arm| arm.values == values && arm.steps == entry.steps);
            let at = found.unwrap_or_else(|| {
                let last =
                    arms.iter().rposition(|arm| arm.values == values && arm.steps < entry.steps);
                let at = last.map_or_else(
                    || arms.iter().position(|arm| arm.values == values).unwrap_or(arms.len()),
                    |last| last + 1,
                );
                arms.insert(at, ArmAt::new(values, entry));
                at
            });
            arms[at].add(entry);
        }
        for arm in &mut arms {
            let of_arm = |entry: &&Entry| self.values_of(entry) == arm.values;
            let count = |state: EntryState| {
                self.of_kind(EntryKind::Cell).filter(of_arm).filter(|e| e.state == state).count()
            };
            (arm.num_diverged, arm.num_failed) =
                (count(EntryState::Diverged), count(EntryState::Failed));
        }
        arms
    }

    /// Every arm compared with the arm that has the baseline of an axis and the same values elsewhere, seed by seed.
    pub fn differences(&self) -> Vec<Difference<'_>> {
        let (arms, metrics) = (self.arms(), self.metrics());
        let mut all = Vec::new();
        for (i, axis) in self.axes.iter().enumerate() {
            let Some(baseline) = axis.baseline.as_deref() else { continue };
            let without = |values: &[&'_ str]| [&values[..i], &values[i + 1..]].concat().join("\0");
            for arm in arms.iter().filter(|arm| arm.values[i] != baseline) {
                let base = arms.iter().find(|base| {
                    base.values[i] == baseline
                        && base.steps == arm.steps
                        && without(&base.values) == without(&arm.values)
                });
                let Some(base) = base else { continue };
                let difference = |metric: Metric| Some((metric, arm.difference(base, metric)?));
                let of: Vec<_> = metrics.iter().copied().filter_map(difference).collect();
                if of.is_empty() {
                    continue;
                }
                all.push(Difference {
                    axis: &axis.name,
                    value: arm.values[i],
                    baseline,
                    others: [&arm.values[..i], &arm.values[i + 1..]].concat(),
                    steps: arm.steps,
                    of,
                });
            }
        }
        all
    }

    /// The shift of every arm at its own number of steps.
    pub fn shifts(&self) -> Vec<Shift> {
        let with_shift = |arm: ArmAt<'_>| {
            let mut at: BTreeMap<i64, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
            for row in arm.measured.values().flat_map(|measurement| &measurement.shift) {
                let (energy, null) = at.entry(row.timestep).or_default();
                energy.push(row.energy);
                null.push(row.null);
            }
            let estimate = |(t, (energy, null)): (&i64, &(Vec<f64>, Vec<f64>))| {
                Some((*t, Estimate::of(energy)?, Estimate::of(null)?))
            };
            let points: Vec<_> = at.iter().rev().filter_map(estimate).collect();
            (!points.is_empty()).then(|| Shift { name: arm.name(), points })
        };
        self.arms().into_iter().filter(|arm| arm.own_steps).filter_map(with_shift).collect()
    }

    fn values_of<'a>(&self, entry: &'a Entry) -> Vec<&'a str> {
        let value = |axis: &Axis| entry.axes.get(&axis.name).map_or("", String::as_str);
        self.axes.iter().map(value).collect()
    }
}

impl<'a> ArmAt<'a> {
    fn new(values: Vec<&'a str>, entry: &Entry) -> Self {
        Self {
            values,
            steps: entry.steps,
            own_steps: entry.own_steps,
            measured: BTreeMap::new(),
            num_collapsed: 0,
            num_diverged: 0,
            num_failed: 0,
        }
    }

    fn add(&mut self, entry: &'a Entry) {
        self.num_collapsed += usize::from(entry.state == EntryState::Collapsed);
        if let (Some(seed), Some(measurement)) = (entry.seed, &entry.measurement) {
            self.measured.insert(seed, measurement);
        }
    }

    /// The arm's values, joined to a name.
    pub fn name(&self) -> String {
        if self.values.is_empty() { "student".to_owned() } else { self.values.join(", ") }
    }

    /// Mean and error of a metric over the seeds.
    pub fn estimate(&self, metric: Metric) -> Option<Estimate> {
        let values: Vec<f64> = self.measured.values().filter_map(|m| metric.of(m)).collect();
        Estimate::of(&values)
    }

    fn difference(&self, base: &Self, metric: Metric) -> Option<Estimate> {
        let pair = |(seed, own): (&u64, &&Measurement)| {
            Some((metric.of(own)?, metric.of(base.measured.get(seed)?)?))
        };
        let pairs: Vec<(f64, f64)> = self.measured.iter().filter_map(pair).collect();
        Estimate::of_differences(&pairs)
    }
}

fn of_row(kind: EntryKind, (name, row): (String, Row)) -> Entry {
    let Row { steps, own_steps, collapsed, measurement } = row;
    let state = if collapsed.is_some() { EntryState::Collapsed } else { EntryState::Done };
    Entry {
        kind,
        name,
        axes: BTreeMap::new(),
        seed: None,
        state,
        message: collapsed,
        steps,
        own_steps,
        measurement,
    }
}

/// The entries of a cell, unless it was measured in another way.
fn of_cell(plan: &Comparison, planned: &PlannedCell) -> Result<Vec<Entry>> {
    let Some(CellRecord { measured_as, outcome, .. }) = plan.record_of(planned)? else {
        return Ok(Vec::new());
    };
    if matches!(outcome, Outcome::Done { .. })
        && measured_as != plan.setting.measured_as(Some(&planned.target))
    {
        return Ok(Vec::new());
    }
    Ok(of_outcome(&plan.matrix.axes, &CellName::of(planned), outcome))
}

/// One entry for each number of steps; a single entry for a cell that was not measured.
fn of_outcome(axes: &[Axis], cell: &CellName, outcome: Outcome) -> Vec<Entry> {
    let axes: BTreeMap<String, String> = axes
        .iter()
        .zip(&cell.values)
        .map(|(axis, value)| (axis.name.clone(), value.clone()))
        .collect();
    let of_cell = |entry: Entry| Entry { axes: axes.clone(), seed: Some(cell.seed), ..entry };
    let unmeasured = |state: EntryState, message: String| {
        let steps = cell.own_steps;
        let row = Row { steps, own_steps: true, collapsed: Some(message), measurement: None };
        Entry { state, ..of_row(EntryKind::Cell, (cell.name.clone(), row)) }
    };
    let entries: Vec<Entry> = match outcome {
        Outcome::Done { rows } => {
            rows.into_iter().map(|row| of_row(EntryKind::Cell, (cell.name.clone(), row))).collect()
        }
        Outcome::Diverged { message, .. } => vec![unmeasured(EntryState::Diverged, message)],
        Outcome::Failed { message } => vec![unmeasured(EntryState::Failed, message)],
    };
    entries.into_iter().map(of_cell).collect()
}

/// The rows of real images and of teachers that are there, however they were measured.
fn unfiltered(folder: &ComparisonFolder) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut add = |kind: EntryKind, path: &std::path::Path| -> Result<()> {
        let found = NamedRows::read_any(path)?;
        entries.extend(found.into_iter().flat_map(|f| f.rows).map(|row| of_row(kind, row)));
        Ok(())
    };
    add(EntryKind::Data, &folder.real())?;
    for teacher in folder.teachers()? {
        for row in ComparisonFolder::rows_of(&teacher)? {
            add(EntryKind::Teacher, &row)?;
        }
    }
    Ok(entries)
}

/// The first samples of a teacher.
fn first_drawn(folder: &ComparisonFolder, teacher: &TeacherSamples) -> Result<Tensor> {
    let images = sample_file::read(&teacher.part(folder, 0))?;
    Ok(images.narrow(0, 0, sample_file::KEPT.min(images.size()[0])))
}

/// Every timestep that occurs in some shifts, noisiest first.
pub(crate) fn timesteps(shifts: &[Shift]) -> Vec<i64> {
    let of = |shift: &Shift| shift.points.iter().map(|point| point.0).collect::<Vec<_>>();
    let mut timesteps: Vec<i64> = shifts.iter().flat_map(of).collect();
    timesteps.sort_unstable_by(|a, b| b.cmp(a));
    timesteps.dedup();
    timesteps
}
