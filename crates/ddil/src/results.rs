//! What was measured, as `results.json` and as a table.

use std::fmt::Write as _;
use std::path::Path;

use ddil_core::Priors;
use ddil_files::{ensure_version, first_version, read_json, write_json};
use ddil_metrics::FeatureExtractor;
use ddil_pipelines::{Card, SamplePlan};
use ddil_schedulers::Thresholding;
use ddil_trainer::Result;
use serde::{Deserialize, Serialize};

use crate::evaluation::{Reference, Scores, ShiftRow};

/// The only version of a row so far.
const FORMAT_VERSION: u32 = 1;

/// One measurement: which model, sampled how, and how its samples compare with the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Version of the row; 1, which is also what rows without it are of.
    #[serde(default = "first_version")]
    pub format_version: u32,
    /// The dataset that samples are compared with, and which part of it.
    pub dataset: String,
    /// `teacher`, `progressive`, ..; `data` for real samples against real samples.
    pub method: String,
    /// Priors of the sources at the end of training; none for a teacher.
    pub priors: Option<Priors>,
    /// What was done with clean data beyond their range.
    pub thresholding: Thresholding,
    /// Guidance scale of the sampling; none where it is baked in or there is none.
    pub guidance_scale: Option<f64>,
    /// Network steps a sample.
    pub steps: u32,
    /// The run's seed.
    pub seed: u64,
    /// Updates of the training.
    pub updates: u64,
    /// Seconds of the training.
    pub seconds: f64,
    /// How many samples were compared.
    pub samples: u64,
    /// Which features they were compared on.
    pub extractor: String,
    /// Fréchet distance to the dataset.
    pub frechet: f64,
    /// Fréchet distance to the teacher's own samples at its full number of steps, where they were drawn: what a
    /// student of a guided teacher is to learn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frechet_to_teacher: Option<f64>,
    /// Share of samples near real ones.
    pub precision: f64,
    /// Share of real samples near generated ones.
    pub recall: f64,
    /// How thick real samples lie around generated ones.
    pub density: f64,
    /// Share of real samples with a generated one near.
    pub coverage: f64,
    /// How far the states met at inference are from those of training, timestep by timestep.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shift: Vec<ShiftRow>,
}

impl Measurement {
    /// The scores of something that is no model; `method` says what.
    pub fn of(
        method: &str,
        scores: &Scores,
        reference: &Reference,
        extractor: &dyn FeatureExtractor,
    ) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            dataset: reference.name.clone(),
            method: method.to_owned(),
            priors: None,
            thresholding: Thresholding::None,
            guidance_scale: None,
            steps: 0,
            seed: 0,
            updates: 0,
            seconds: 0.0,
            samples: scores.samples,
            extractor: extractor.id().to_owned(),
            frechet: scores.frechet,
            frechet_to_teacher: None,
            precision: scores.prdc.precision,
            recall: scores.prdc.recall,
            density: scores.prdc.density,
            coverage: scores.prdc.coverage,
            shift: Vec::new(),
        }
    }

    /// The same with what is known of the model and of how it was sampled.
    #[must_use]
    pub fn of_model(self, card: &Card, plan: &SamplePlan) -> Self {
        Self {
            method: card.method.clone(),
            priors: card.priors,
            thresholding: plan.thresholding.clone(),
            guidance_scale: (plan.guidance_scale != 1.0).then_some(plan.guidance_scale),
            steps: plan.steps,
            seed: card.seed,
            updates: card.updates,
            seconds: card.seconds,
            ..self
        }
    }
}

/// The measurements in a file.
///
/// # Errors
///
/// What the file system refuses; [`Error::Files`](ddil_trainer::Error::Files) if the file holds something else, and
/// if another version wrote one of them.
pub fn read(path: &Path) -> Result<Vec<Measurement>> {
    /// What a row says of itself, whatever else it holds.
    #[derive(Deserialize)]
    struct Said {
        #[serde(default = "first_version")]
        format_version: u32,
    }
    let said: Vec<Said> = read_json(path)?;
    said.iter().try_for_each(|row| ensure_version(path, row.format_version, FORMAT_VERSION))?;
    Ok(read_json(path)?)
}

/// Adds a measurement to a file that holds an array of them, or starts one.
///
/// # Errors
///
/// As [`read`]: a file that holds something else is left as it is.
pub fn append(path: &Path, measurement: &Measurement) -> Result<()> {
    let mut all = if path.exists() { read(path)? } else { Vec::new() };
    all.push(measurement.clone());
    Ok(write_json(path, &all)?)
}

/// Writes measurements as an array, in place of what was there.
///
/// # Errors
///
/// What the file system refuses.
pub fn write(path: &Path, rows: &[(String, Measurement)]) -> Result<()> {
    let measurements: Vec<&Measurement> = rows.iter().map(|(_, m)| m).collect();
    Ok(write_json(path, &measurements)?)
}

/// A table for a terminal, one line a measurement.
pub fn table(rows: &[(String, Measurement)]) -> String {
    const HEADS: [&str; 9] = [
        "model",
        "steps",
        "samples",
        "frechet",
        "to teacher",
        "precision",
        "recall",
        "density",
        "coverage",
    ];
    let cells: Vec<Vec<String>> = std::iter::once(HEADS.map(str::to_owned).to_vec())
        .chain(rows.iter().map(|(name, m)| {
            let rates = [m.precision, m.recall, m.density, m.coverage].map(|x| format!("{x:.3}"));
            let mut row = vec![
                name.clone(),
                if m.steps == 0 { "-".to_owned() } else { m.steps.to_string() },
                m.samples.to_string(),
                format!("{:.2}", m.frechet),
                m.frechet_to_teacher.map_or("-".to_owned(), |x| format!("{x:.2}")),
            ];
            row.extend(rates);
            row
        }))
        .collect();
    aligned(&cells)
}

/// A table of the shift, one line a timestep, one column a model.
pub fn shift_table(rows: &[(String, Measurement)]) -> String {
    let with_shift: Vec<_> = rows.iter().filter(|(_, m)| !m.shift.is_empty()).collect();
    let Some((_, first)) = with_shift.first() else { return String::new() };
    let mut cells = vec![vec!["timestep".to_owned(), "null".to_owned()]];
    cells[0].extend(with_shift.iter().map(|(name, _)| name.clone()));
    for (i, row) in first.shift.iter().enumerate() {
        let mut line = vec![row.timestep.to_string(), format!("{:.4}", row.null)];
        line.extend(with_shift.iter().map(|(_, m)| {
            m.shift.get(i).map_or(String::new(), |shift| format!("{:.4}", shift.energy))
        }));
        cells.push(line);
    }
    aligned(&cells)
}

/// Columns of equal width: the first to the left, numbers to the right, a rule below the heads.
pub(crate) fn aligned(cells: &[Vec<String>]) -> String {
    let columns = cells.first().map_or(0, Vec::len);
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for (i, row) in cells.iter().enumerate() {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Writing to a string does not fail.
            let _ = match column {
                0 => write!(text, "{cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
        if i == 0 {
            let total = widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1);
            text.push_str(&"-".repeat(total));
            text.push('\n');
        }
    }
    text
}
