//! The report of a comparison.

use std::path::Path;

use ddil_files::with_causes;
use serde::Serialize;

use super::charts::{Chart, Line};
use super::forest::{self, Forest};
use super::metrics::shown;
use super::samples::strip;
use super::summary::{FILE, RunState, is_run, name_of};
use crate::compare::folder::ComparisonFolder;
use crate::compare::metric::Metric;
use crate::compare::{
    ArmAt, ComparisonReport, Entry, EntryKind, EntryState, PlanFile, Shift, plot, table, timesteps,
};
use crate::error::Result;
use ddil_evaluate::{Measurement, StandardErrors};

/// The data of a comparison's page.
#[derive(Debug, Serialize)]
pub(crate) struct ComparisonPage {
    name: String,
    path: String,
    about: String,
    notes: Vec<String>,
    /// Whether a process is training one of the cells.
    is_live: bool,
    num_cells: usize,
    num_ended: usize,
    /// Headings before and after the number of steps.
    axes: Vec<String>,
    metrics: Vec<Head>,
    rows: Vec<ResultRow>,
    forests: Vec<Forest>,
    /// Whether there are baselines: without them nothing is paired.
    has_baselines: bool,
    charts: Vec<Chart>,
    strips: Vec<Strip>,
    cells: Vec<CellRow>,
}

#[derive(Debug, Serialize)]
struct Head {
    name: &'static str,
    title: &'static str,
    lower_is_better: bool,
}

/// A row of the table of results.
#[derive(Debug, Serialize)]
struct ResultRow {
    kind: EntryKind,
    /// The name, or the value on each axis.
    names: Vec<String>,
    steps: u32,
    own_steps: bool,
    samples: Option<u64>,
    seeds: String,
    values: Vec<Option<Shown>>,
}

/// A value for a reader, and exactly.
#[derive(Debug, Serialize)]
struct Shown {
    value: String,
    mean: String,
    error: Option<String>,
}

/// Samples in one row.
#[derive(Debug, Serialize)]
struct Strip {
    name: String,
    src: String,
}

/// A cell: how it stands, and where its own report is.
#[derive(Debug, Serialize)]
struct CellRow {
    name: String,
    state: &'static str,
    message: Option<String>,
    seed: Option<u64>,
    step: Option<u64>,
    /// At its own number of steps.
    values: Vec<Option<Shown>>,
    link: Option<String>,
}

impl ComparisonPage {
    /// Reads the folder of a comparison. `base` precedes links: it leads from the page to the folder.
    ///
    /// # Errors
    ///
    /// Invalid files.
    pub(super) fn read(path: &Path, base: &str) -> Result<Self> {
        let folder = ComparisonFolder::new(path);
        let plan = PlanFile::read(&folder)?;
        let report = ComparisonReport::from_folder(&folder, &name_of(path), plan.as_ref())?;
        let mut notes = Vec::new();
        if plan.is_none() {
            notes.push(
                "An earlier version made this folder: it names no baselines, so there are no paired differences. \
                 `ddil compare` with the same matrix adds them."
                    .to_owned(),
            );
        }
        let metrics = shown_metrics(&report);
        let cells = cells(&report, &metrics, plan.as_ref(), &folder, base);
        let mut charts: Vec<Chart> = metrics.iter().filter_map(|m| quality(&report, *m)).collect();
        charts.extend(shift(&report.shifts()));
        Ok(Self {
            path: path.display().to_string(),
            about: about(&report, plan.as_ref()),
            is_live: cells.iter().any(|cell| cell.state == RunState::Running.as_str()),
            num_cells: cells.len(),
            num_ended: cells.iter().filter(|cell| ENDED.contains(&cell.state)).count(),
            axes: table::axes(&report),
            rows: rows(&report, &metrics),
            metrics: metrics.into_iter().map(Head::of).collect(),
            forests: forest::of(&report),
            has_baselines: report.axes.iter().any(|axis| axis.baseline.is_some()),
            strips: strips(&report, &mut notes),
            charts,
            notes,
            cells,
            name: report.name,
        })
    }
}

/// States of cells that have a result.
const ENDED: [&str; 3] = ["done", "collapsed", "diverged"];

impl Head {
    fn of(metric: Metric) -> Self {
        Self {
            name: metric.as_str(),
            title: metric.title(),
            lower_is_better: metric.lower_is_better(),
        }
    }
}

impl Shown {
    fn of(metric: Metric, value: f64, error: Option<f64>) -> Self {
        let decimals = metric.decimals();
        Self {
            value: value.to_string(),
            mean: if value.is_finite() { format!("{value:.decimals$}") } else { shown(value) },
            error: error.map(|error| format!("{error:.decimals$}")),
        }
    }

    /// The value of one measurement, with its own standard error if it was estimated.
    fn of_measurement(metric: Metric, measurement: &Measurement) -> Option<Self> {
        let of_samples =
            measurement.standard_errors.as_ref().and_then(|errors| error_of(metric, errors));
        let error = of_samples.or_else(|| metric.error_over_prompts(measurement));
        Some(Self::of(metric, metric.of(measurement)?, error))
    }
}

fn error_of(metric: Metric, errors: &StandardErrors) -> Option<f64> {
    match metric {
        Metric::Frechet => Some(errors.frechet),
        Metric::Precision => errors.precision,
        Metric::Recall => errors.recall,
        Metric::Density => errors.density,
        Metric::Coverage => errors.coverage,
        _ => None,
    }
}

/// The metrics that some entry has.
fn shown_metrics(report: &ComparisonReport) -> Vec<Metric> {
    let has = |metric: &Metric| {
        let measured = report.entries.iter().filter_map(|entry| entry.measurement.as_ref());
        measured.map(|measurement| metric.of(measurement)).any(|value| value.is_some())
    };
    report.metrics().into_iter().filter(has).collect()
}

fn about(report: &ComparisonReport, plan: Option<&PlanFile>) -> String {
    let values = |axis: &crate::compare::matrix::Axis| {
        let names: Vec<&str> = axis.values.iter().map(|value| value.name.as_str()).collect();
        if names.is_empty() {
            axis.name.clone()
        } else {
            format!("{} ({})", axis.name, names.join(", "))
        }
    };
    let axes: Vec<String> = report.axes.iter().map(values).collect();
    let varied = if axes.is_empty() { "one configuration".to_owned() } else { axes.join(" × ") };
    let seeds: std::collections::BTreeSet<u64> = match plan {
        Some(plan) => plan.cells.iter().map(|cell| cell.seed).collect(),
        None => report.entries.iter().filter_map(|entry| entry.seed).collect(),
    };
    let seeds =
        if seeds.len() == 1 { "1 seed".to_owned() } else { format!("{} seeds", seeds.len()) };
    let data = report.entries.iter().find_map(|entry| entry.measurement.as_ref());
    let data = data.map_or(String::new(), |m| format!(", measured against {}", m.dataset));
    format!("Compares {varied}, {seeds}{data}.")
}

fn rows(report: &ComparisonReport, metrics: &[Metric]) -> Vec<ResultRow> {
    let others = [EntryKind::Data, EntryKind::Teacher];
    let of_entry = |entry: &Entry| {
        let measurement = entry.measurement.as_ref();
        let value = |metric: &Metric| Shown::of_measurement(*metric, measurement?);
        ResultRow {
            kind: entry.kind,
            names: vec![entry.name.clone()],
            steps: entry.steps,
            own_steps: entry.own_steps,
            samples: measurement.map(|m| m.samples),
            seeds: "–".to_owned(),
            values: metrics.iter().map(value).collect(),
        }
    };
    let of_arm = |arm: &ArmAt<'_>| {
        let value = |metric: &Metric| {
            // A single seed has no spread, but its measurement may have an error.
            let alone = arm.measured.values().next().filter(|_| arm.measured.len() == 1);
            match alone {
                Some(measurement) => Shown::of_measurement(*metric, measurement),
                None => arm.estimate(*metric).map(|e| Shown::of(*metric, e.mean, e.standard_error)),
            }
        };
        ResultRow {
            kind: EntryKind::Cell,
            names: match arm.values.as_slice() {
                [] => vec![arm.name()],
                values => values.iter().map(|value| (*value).to_owned()).collect(),
            },
            steps: arm.steps,
            own_steps: arm.own_steps,
            samples: arm.measured.values().map(|m| m.samples).max(),
            seeds: table::seeds(arm),
            values: metrics.iter().map(value).collect(),
        }
    };
    let entries = others.iter().flat_map(|kind| report.of_kind(*kind)).map(of_entry);
    entries.chain(report.arms().iter().map(of_arm)).collect()
}

/// A metric by number of steps, one line per arm.
fn quality(report: &ComparisonReport, metric: Metric) -> Option<Chart> {
    // Coverage and density depend on the number of samples.
    let comparable = report.has_one_number_of_samples()
        || matches!(metric, Metric::Frechet | Metric::ToTeacher | Metric::ClassAgreement);
    let lines = plot::lines_of(report, metric);
    if metric == Metric::Shift || !comparable || lines.is_empty() {
        return None;
    }
    let of_arms = report.arms();
    let counts: std::collections::BTreeSet<u32> = of_arms.iter().map(|arm| arm.steps).collect();
    let counts: Vec<u32> = counts.into_iter().collect();
    let line = |(color, line): (usize, &plot::Line)| {
        let at = |count: &u32| {
            let place = f64::from(*count).log2();
            line.points.iter().find(|(x, _)| *x == place).map(|(_, estimate)| *estimate)
        };
        let found: Vec<_> = counts.iter().map(at).collect();
        let errors: Vec<_> = found.iter().map(|e| (*e)?.standard_error).collect();
        let values = found.iter().map(|e| Some((*e)?.mean)).collect();
        let errors = if errors.iter().any(Option::is_some) { errors } else { Vec::new() };
        Line { errors, ..Line::new(line.name.clone(), values).colored(color) }
    };
    let mut all: Vec<Line> = lines.iter().enumerate().map(line).collect();
    let of_data: Vec<&str> =
        report.of_kind(EntryKind::Data).map(|entry| entry.name.as_str()).collect();
    let level = |level: plot::Level| Line {
        is_level: true,
        // Real images are far from all models, which would then be close to each other.
        is_hidden: of_data.contains(&level.name.as_str()),
        ..Line::new(level.name, vec![Some(level.y); counts.len()])
    };
    all.extend(plot::levels_of(report, metric).into_iter().map(level));
    let places = counts.iter().map(ToString::to_string).collect();
    let id = format!("quality_{}", metric.as_str().replace(' ', "_"));
    let chart = Chart::over_places(&id, metric.title(), "steps", places);
    Some(Chart { lines: all, group: "steps", is_log: metric.lower_is_better(), ..chart }.finished())
}

/// The shift by timestep, one line per arm.
fn shift(shifts: &[Shift]) -> Option<Chart> {
    let timesteps = timesteps(shifts);
    let line = |(color, shift): (usize, &Shift)| {
        let at = |t: &i64| shift.points.iter().find(|point| point.0 == *t);
        let values = timesteps.iter().map(|t| Some(at(t)?.1.mean)).collect();
        let errors: Vec<_> = timesteps.iter().map(|t| at(t)?.1.standard_error).collect();
        let errors = if errors.iter().any(Option::is_some) { errors } else { Vec::new() };
        Line { errors, ..Line::new(shift.name.clone(), values).colored(color) }
    };
    let mut lines: Vec<Line> = shifts.iter().enumerate().map(line).collect();
    let chance = |t: &i64| {
        let of = |shift: &Shift| shift.points.iter().find(|point| point.0 == *t).map(|p| p.2.mean);
        let values: Vec<f64> = shifts.iter().filter_map(of).collect();
        Some(crate::compare::statistics::Estimate::of(&values)?.mean)
    };
    lines.push(Line {
        is_level: true,
        ..Line::new("chance", timesteps.iter().map(chance).collect())
    });
    let places = timesteps.iter().map(ToString::to_string).collect();
    let title = "Shift: energy distance to noised data";
    let chart = Chart::over_places("shift", title, "timestep", places);
    (!shifts.is_empty()).then(|| Chart { lines, ..chart }.finished())
}

fn strips(report: &ComparisonReport, notes: &mut Vec<String>) -> Vec<Strip> {
    let mut strips = Vec::new();
    let columns = report
        .image_rows
        .iter()
        .map(|(_, images)| images.size().first().copied().unwrap_or(0))
        .min();
    for (name, images) in &report.image_rows {
        // The same noise in each column.
        match strip(&images.narrow(0, 0, columns.unwrap_or(0))) {
            Ok(src) => strips.push(Strip { name: name.clone(), src }),
            Err(error) => notes.push(format!("{name}: {}", with_causes(&error))),
        }
    }
    strips
}

/// Every planned cell; without a plan, every cell that has an entry.
fn cells(
    report: &ComparisonReport,
    metrics: &[Metric],
    plan: Option<&PlanFile>,
    folder: &ComparisonFolder,
    base: &str,
) -> Vec<CellRow> {
    let mut names: Vec<(String, Option<u64>)> = match plan {
        Some(plan) => plan.cells.iter().map(|cell| (cell.name.clone(), Some(cell.seed))).collect(),
        None => {
            report.of_kind(EntryKind::Cell).map(|entry| (entry.name.clone(), entry.seed)).collect()
        }
    };
    names.dedup();
    let row = |(name, seed): (String, Option<u64>)| {
        let of_cell = || report.of_kind(EntryKind::Cell).filter(|entry| entry.name == name);
        let own = of_cell().find(|entry| entry.own_steps).or_else(|| of_cell().next());
        let run = folder.run_of(&name);
        let found = is_run(&run).then(|| RunState::of(&run).ok()).flatten();
        let state = match (own.map(|entry| entry.state), &found) {
            (Some(EntryState::Done), _) => "done",
            (Some(EntryState::Collapsed), _) => "collapsed",
            (Some(EntryState::Diverged), _) => "diverged",
            (Some(EntryState::Failed), _) => "failed",
            (None, Some((RunState::Completed, _))) => "trained",
            (None, Some((state, _))) => state.as_str(),
            (None, None) => "not started",
        };
        let value = |metric: &Metric| Shown::of_measurement(*metric, own?.measurement.as_ref()?);
        let has_report = run.join(FILE).is_file();
        CellRow {
            state,
            message: own.and_then(|entry| entry.message.clone()),
            seed,
            step: found.map(|(_, status)| status.step),
            values: metrics.iter().map(value).collect(),
            link: has_report.then(|| format!("{base}cells/{}/{}", encoded(&name), FILE)),
            name,
        }
    };
    names.into_iter().map(row).collect()
}

/// A name as a part of an address.
pub(super) fn encoded(name: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
            char::from(byte).to_string()
        }
        other => format!("%{other:02X}"),
    };
    name.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_encoded_for_addresses() {
        assert_eq!(encoded("a+b_seed0 é/#"), "a%2Bb_seed0%20%C3%A9%2F%23");
    }
}
