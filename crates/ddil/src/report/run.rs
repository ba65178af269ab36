//! The report of a run.

use std::fs;
use std::path::Path;

use ddil_evaluate::Measurement;
use ddil_files::with_causes;
use ddil_trainer::checkpoint;
use ddil_trainer::{RunEnvironment, SessionEnvironment};
use serde::Serialize;
use serde_json::Value;

use super::charts::{self, Chart, Line};
use super::metrics::{Figure, shown};
use super::page::{Moment, duration, size};
use super::samples::Samples;
use super::settings::{BesidePreset, RunConfig};
use super::summary::{FILE, METRICS, RunState, Summary, TIMINGS, size_on_disk};
use crate::compare::metric::Metric;
use crate::error::{Error, Result};
use crate::shell::quoted;

/// The data of a run's page.
#[derive(Debug, Serialize)]
pub(crate) struct RunPage {
    name: String,
    path: String,
    /// What the run is, in a sentence.
    about: String,
    /// The verb that runs it; empty if the config cannot be read.
    verb: &'static str,
    state: &'static str,
    is_live: bool,
    step: u64,
    total: Option<u64>,
    /// Share of the updates that are done, in percent.
    percent: Option<u64>,
    error: Option<String>,
    /// What the page could not show, and why.
    notes: Vec<String>,
    /// Names and values.
    facts: Vec<[String; 2]>,
    charts: Vec<Chart>,
    /// Whether charts show fewer points than there are.
    is_reduced: bool,
    num_records: usize,
    latest: Vec<Latest>,
    /// The same of shares of clipped values, which are many.
    clipped: Vec<Latest>,
    samples: Samples,
    measurements: Option<Measured>,
    beside: Option<BesidePreset>,
    /// The command that resumes the run, if it can be resumed.
    resume: Option<String>,
    checkpoints: Vec<CheckpointRow>,
    environment: Vec<[String; 2]>,
    /// Later sessions in another environment: the update at which each began, and what differs.
    sessions: Vec<(u64, Vec<[String; 2]>)>,
    log: Log,
    /// The report of the comparison that the run is a cell of.
    comparison: Option<String>,
}

/// The last value of a figure.
#[derive(Debug, Serialize)]
struct Latest {
    name: String,
    /// Exactly, as in the record.
    value: String,
    shown: String,
    step: u64,
    least: Option<Extreme>,
    most: Option<Extreme>,
    /// Number of values that were NaN or infinite.
    num_not_finite: usize,
}

#[derive(Debug, Serialize)]
struct Extreme {
    value: String,
    shown: String,
    step: u64,
}

/// Measurements of `ddil evaluate --json`.
#[derive(Debug, Serialize)]
struct Measured {
    names: Vec<&'static str>,
    rows: Vec<MeasuredRow>,
}

#[derive(Debug, Serialize)]
struct MeasuredRow {
    dataset: String,
    steps: u32,
    samples: u64,
    /// The exact value and the shown one, for each name.
    values: Vec<Option<[String; 2]>>,
}

#[derive(Debug, Serialize)]
struct CheckpointRow {
    folder: String,
    size: String,
    written: Option<Moment>,
    note: &'static str,
}

/// Warnings and errors of `run.log`.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Log {
    lines: Vec<LogLine>,
    num_left_out: usize,
}

#[derive(Debug, PartialEq, Serialize)]
struct LogLine {
    time: String,
    is_error: bool,
    text: String,
}

impl RunPage {
    /// Reads a run folder. A file that is missing or damaged leaves out its part of the page, with a note. `base` is the
    /// address of the folder as seen from the page.
    ///
    /// # Errors
    ///
    /// No readable status; figures that cannot be read.
    pub(super) fn read(folder: &Path, base: &str) -> Result<Self> {
        let summary = Summary::read(folder)?;
        let mut notes = notes(&summary);
        let measurements = or_note(measurements(folder), &mut notes);
        let samples = or_note(Samples::read(&folder.join("samples")), &mut notes);
        let environment = or_note(environment(folder), &mut notes);
        let checkpoints = or_note(checkpoints(folder), &mut notes);
        let log = or_note(Log::read(&folder.join("run.log")), &mut notes);
        let mut charts = charts::of_run(&summary.metrics, &summary.timings);
        charts.extend(measurements.iter().rev().find_map(shift_chart));
        let figures = summary.metrics.figures();
        let of_latest = |is_clipped: bool| {
            let figures = figures.iter().filter(|f| f.name.starts_with("clipped_") == is_clipped);
            figures.filter_map(Latest::of).collect::<Vec<_>>()
        };
        let (latest, clipped) = (of_latest(false), of_latest(true));
        let (facts, config) = (facts(&summary, folder), summary.config.as_ref().ok());
        let in_comparison = folder
            .parent()
            .filter(|parent| parent.ends_with("cells"))
            .and_then(Path::parent)
            .is_some_and(super::is_comparison);
        Ok(Self {
            name: summary.name(),
            path: folder.display().to_string(),
            about: config.map_or_else(|| "A run.".to_owned(), RunConfig::in_words),
            verb: config.map_or("", RunConfig::verb),
            state: summary.state.as_str(),
            is_live: summary.state == RunState::Running,
            step: summary.step,
            total: summary.total,
            percent: summary.total.map(|total| 100 * summary.step.min(total) / total.max(1)),
            error: summary.error.clone(),
            is_reduced: charts.iter().any(Chart::is_reduced),
            num_records: summary.metrics.steps.len(),
            latest,
            clipped,
            measurements: Measured::of(&measurements),
            beside: config.map(RunConfig::beside_preset),
            resume: config
                .filter(|_| {
                    summary.state != RunState::Completed && summary.state != RunState::Running
                })
                .map(|config| format!("ddil {} --resume {}", config.verb(), quoted(folder))),
            environment: environment.as_ref().map(|e| facts_of(&e.first)).unwrap_or_default(),
            sessions: environment
                .map(|e| e.later.iter().map(|s| (s.step, facts_of(s))).collect())
                .unwrap_or_default(),
            comparison: in_comparison.then(|| format!("{base}../../{FILE}")),
            notes,
            facts,
            charts,
            samples,
            checkpoints,
            log,
        })
    }
}

/// The value, or its default with a note about the error.
fn or_note<T: Default>(found: Result<T>, notes: &mut Vec<String>) -> T {
    found.unwrap_or_else(|error| {
        notes.push(with_causes(&error));
        T::default()
    })
}

fn notes(summary: &Summary) -> Vec<String> {
    let mut notes = Vec::new();
    if let Err(error) = &summary.config {
        notes.push(format!("The config could not be read: {error}"));
    }
    for (name, metrics) in [(METRICS, &summary.metrics), (TIMINGS, &summary.timings)] {
        if let Some(first) = metrics.damaged.first() {
            let count = metrics.damaged.len();
            notes.push(format!(
                "{name}: {count} lines are not records of later updates and were left out, the first is line {first}"
            ));
        }
    }
    notes
}

fn facts(summary: &Summary, folder: &Path) -> Vec<[String; 2]> {
    let mut facts = Vec::new();
    let mut add = |name: &str, value: String| facts.push([name.to_owned(), value]);
    let total = summary.total.map_or(String::new(), |total| format!(" of {total}"));
    add("Updates", format!("{}{total}", summary.step));
    if let Some(seconds) = summary.seconds() {
        add("Training time", duration(seconds));
        if seconds > 0.0 {
            let done = summary.timings.steps.last().copied().unwrap_or(0);
            add("Updates per second", shown(done as f64 / seconds));
        }
    }
    if let Some(modified) = summary.modified {
        add("Last change", Moment::of(modified).shown);
    }
    add("Size on disk", size(size_on_disk(folder)));
    facts
}

impl Latest {
    fn of(figure: &Figure<'_>) -> Option<Self> {
        let (step, value) = figure.last()?;
        let extreme = |(step, value): (u64, f64)| Extreme {
            value: value.to_string(),
            shown: shown(value),
            step,
        };
        let [least, most] =
            figure.extremes().map_or([None, None], |found| found.map(|e| Some(extreme(e))));
        Some(Self {
            name: figure.name.to_owned(),
            value: value.to_string(),
            shown: shown(value),
            step,
            least,
            most,
            num_not_finite: figure.values.iter().filter(|(_, value)| !value.is_finite()).count(),
        })
    }
}

type ValueOf = fn(&Measurement) -> Option<f64>;

/// The metrics of the table, with their names.
const COLUMNS: [(&str, ValueOf); 14] = [
    ("Fréchet", |m| m.frechet),
    ("to teacher", |m| m.frechet_to_teacher),
    ("missing classes to teacher", |m| Metric::MissingToTeacher.of(m)),
    ("class agreement", |m| m.class_agreement),
    ("KID", |m| m.kid),
    ("precision", |m| m.precision),
    ("recall", |m| m.recall),
    ("density", |m| m.density),
    ("coverage", |m| m.coverage),
    ("CLIP cosine", |m| Metric::ClipCosine.of(m)),
    ("CLIP score", |m| m.clip_score.as_ref().map(|score| score.torchmetrics)),
    ("diversity", |m| Metric::Diversity.of(m)),
    ("CLIP distance", |m| Metric::ClipDistance.of(m)),
    ("LPIPS", |m| Metric::Lpips.of(m)),
];

/// A table of the measurements, with the metrics that at least one of them has.
impl Measured {
    fn of(measurements: &[Measurement]) -> Option<Self> {
        let is_present = |(_, of): &&(&str, ValueOf)| measurements.iter().any(|m| of(m).is_some());
        let columns: Vec<_> = COLUMNS.iter().filter(is_present).collect();
        let exact = |value: f64| [value.to_string(), shown(value)];
        let row = |measurement: &Measurement| MeasuredRow {
            dataset: measurement.dataset.clone(),
            steps: measurement.steps,
            samples: measurement.samples,
            values: columns.iter().map(|(_, of)| of(measurement).map(exact)).collect(),
        };
        (!measurements.is_empty()).then(|| Self {
            names: columns.iter().map(|(name, _)| *name).collect(),
            rows: measurements.iter().map(row).collect(),
        })
    }
}

fn measurements(folder: &Path) -> Result<Vec<Measurement>> {
    let path = folder.join("results.json");
    if path.is_file() { Ok(Measurement::read_all(&path)?) } else { Ok(Vec::new()) }
}

fn shift_chart(measurement: &Measurement) -> Option<Chart> {
    let rows = &measurement.shift;
    let places = rows.iter().map(|row| row.timestep.to_string()).collect();
    let title = "Shift: energy distance to noised data";
    let chart = Chart::over_places("shift", title, "timestep", places);
    let measured = rows.iter().map(|row| Some(row.energy)).collect();
    let chance = rows.iter().map(|row| Some(row.null)).collect();
    let chance = Line { is_level: true, ..Line::new("chance", chance) };
    let lines = vec![Line::new("student", measured).colored(1), chance];
    (!rows.is_empty()).then(|| Chart { lines, ..chart }.finished())
}

/// The checkpoints, newest first, and the model of the best evaluation.
fn checkpoints(folder: &Path) -> Result<Vec<CheckpointRow>> {
    let row = |path: &Path, note: &'static str| CheckpointRow {
        folder: path.strip_prefix(folder).unwrap_or(path).display().to_string(),
        size: size(size_on_disk(path)),
        written: Moment::of_file(path),
        note,
    };
    let paths = checkpoint::list(&folder.join("checkpoints"))?;
    let mut rows: Vec<CheckpointRow> = paths.iter().map(|path| row(path, "")).collect();
    if let Some(newest) = rows.last_mut() {
        newest.note = "newest";
    }
    rows.reverse();
    let best = folder.join("best");
    rows.extend(best.is_dir().then(|| row(&best, "model of the best evaluation")));
    Ok(rows)
}

fn environment(folder: &Path) -> Result<Option<RunEnvironment>> {
    if !folder.join("environment.json").is_file() {
        return Ok(None);
    }
    Ok(Some(RunEnvironment::from_folder(folder)?))
}

/// Facts by name; those of tables under the names of both.
fn facts_of(session: &SessionEnvironment) -> Vec<[String; 2]> {
    fn add(name: &str, value: &Value, facts: &mut Vec<[String; 2]>) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    add(&format!("{name}.{key}"), value, facts);
                }
            }
            Value::Null => {}
            Value::String(text) => facts.push([name.to_owned(), text.clone()]),
            other => facts.push([name.to_owned(), other.to_string()]),
        }
    }
    let mut facts = Vec::new();
    for (name, value) in &session.facts {
        add(name, value, &mut facts);
    }
    facts
}

impl Log {
    /// Reads the newest warnings and errors of a log; a missing file has none.
    fn read(path: &Path) -> Result<Self> {
        const MOST: usize = 50;
        if !path.is_file() {
            return Ok(Self::default());
        }
        let content = fs::read(path).map_err(Error::io("read", path))?;
        let text = String::from_utf8_lossy(&content);
        let mut lines: Vec<LogLine> = text.lines().filter_map(LogLine::of).collect();
        let num_left_out = lines.len().saturating_sub(MOST);
        lines.drain(..num_left_out);
        Ok(Self { lines, num_left_out })
    }
}

impl LogLine {
    /// A line such as `2026-11-30T17:25:49.715065Z  WARN ddil_trainer::session: ..`; none for other levels.
    fn of(line: &str) -> Option<Self> {
        let (time, rest) = line.split_once(' ')?;
        let (level, text) = rest.trim_start().split_once(' ')?;
        let is_error = match level {
            "WARN" => false,
            "ERROR" => true,
            _ => return None,
        };
        // The module is of no interest to a reader.
        let text = text.split_once(": ").map_or(text, |(_, text)| text);
        let time = time.get(..16).unwrap_or(time).replace('T', " ");
        Some(Self { time, is_error, text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_read_without_their_module() {
        let line = "2026-11-30T17:25:49.715065Z  WARN ddil_trainer::session: a/b is damaged: <b>";
        let found = LogLine::of(line).expect("it is a warning");
        assert_eq!((found.time.as_str(), found.is_error), ("2026-11-30 17:25", false));
        assert_eq!(found.text, "a/b is damaged: <b>");
        for other in ["", "nonsense", "2026-11-30T17:25:49Z  INFO ddil::progress: distill 1/300"] {
            assert_eq!(LogLine::of(other), None, "{other}");
        }
        assert!(LogLine::of("x ERROR y: z").is_some_and(|line| line.is_error));
    }
}
