//! Measurements, as `results.json` and as a table.

use std::fmt::Write as _;
use std::path::Path;

use ddil_core::Priors;
use ddil_files::{ensure_version, first_version, read_json, write_json};
use ddil_metrics::{FeatureExtractor, ImageInput, Reference, standard_errors};
use ddil_pipelines::{Card, SamplePlan};
use ddil_schedulers::{SolverConfig, Thresholding};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::Result;
use crate::evaluation::{FeatureScores, Scores, ShiftRow, score};

/// The only version of the row format so far.
const FORMAT_VERSION: u32 = 1;

/// One measurement: the model, how it was sampled, and how its samples compare with the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Version of the row: 1, which rows without this field also have.
    #[serde(default = "first_version")]
    pub format_version: u32,
    /// The dataset that samples are compared with, and the part of it.
    pub dataset: String,
    /// The number of images in it; none if its file does not contain the number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_samples: Option<u64>,
    /// `teacher`, `progressive`, ..; `data` for real samples against real samples.
    pub method: String,
    /// Priors of the sources at the end of training; none for a teacher.
    pub priors: Option<Priors>,
    /// Treatment of clean data beyond the data's range.
    pub thresholding: Thresholding,
    /// Guidance scale of the sampling; none if it is distilled into the model or not used.
    pub guidance_scale: Option<f64>,
    /// Network steps per sample.
    pub steps: u32,
    /// The multistep solver; none for DDIM and for latent consistency models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solver: Option<SolverConfig>,
    /// Seed of the run.
    pub seed: u64,
    /// Number of training updates.
    pub updates: u64,
    /// Duration of the training in seconds.
    pub seconds: f64,
    /// Number of samples compared.
    pub samples: u64,
    /// The features on which they were compared.
    pub extractor: String,
    /// How images were converted for the extractor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<ImageInput>,
    /// Kernel distance to the dataset (KID), of all samples; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<f64>,
    /// Fréchet distance to the dataset.
    pub frechet: f64,
    /// Fréchet distance to the teacher's own samples at its full number of steps, if they were drawn: these are what a
    /// student of a guided teacher is trained to match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frechet_to_teacher: Option<f64>,
    /// Share of samples near real ones; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<f64>,
    /// Share of real samples near generated ones; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recall: Option<f64>,
    /// Density of real samples around generated ones; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// Share of real samples with a generated one nearby; none if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<f64>,
    /// Standard errors, if they were requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standard_errors: Option<StandardErrors>,
    /// Distance between the states visited at inference and those of training, by timestep.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shift: Vec<ShiftRow>,
}

/// Standard errors of the metrics of a [`Measurement`]: how much they would differ for other samples of the same model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StandardErrors {
    /// The number of random halves they were estimated from.
    pub halves: u32,
    /// Of the Fréchet distance.
    pub frechet: f64,
    /// Of the kernel distance; none, like those below, if the reference has statistics alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<f64>,
    /// Of the precision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<f64>,
    /// Of the recall.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recall: Option<f64>,
    /// Of the density.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// Of the coverage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<f64>,
}

impl Measurement {
    /// The scores of images that no model generated; `method` names them.
    pub(crate) fn of(
        method: &str,
        scores: &Scores,
        reference: &Reference,
        extractor: &dyn FeatureExtractor,
    ) -> Self {
        let prdc = scores.by_features.map(|scores| scores.prdc);
        Self {
            format_version: FORMAT_VERSION,
            dataset: reference.name().to_owned(),
            reference_samples: reference.statistics().num_samples(),
            method: method.to_owned(),
            priors: None,
            thresholding: Thresholding::None,
            guidance_scale: None,
            steps: 0,
            solver: None,
            seed: 0,
            updates: 0,
            seconds: 0.0,
            samples: scores.samples,
            extractor: extractor.id().to_owned(),
            input: Some(extractor.input().clone()),
            kid: scores.by_features.map(|scores| scores.kid),
            frechet: scores.frechet,
            frechet_to_teacher: None,
            precision: prdc.map(|prdc| prdc.precision),
            recall: prdc.map(|prdc| prdc.recall),
            density: prdc.map(|prdc| prdc.density),
            coverage: prdc.map(|prdc| prdc.coverage),
            standard_errors: None,
            shift: Vec::new(),
        }
    }

    /// Adds the standard errors of the metrics, from random halves of the images with these features.
    ///
    /// # Errors
    ///
    /// Errors of the metrics; too few images for half of them.
    pub(crate) fn add_standard_errors(
        &mut self,
        reference: &Reference,
        features: &Tensor,
        halves: u32,
    ) -> Result<()> {
        let values = |half: &Tensor| {
            let scores = score(reference, half)?;
            let others = scores.by_features.map(|FeatureScores { kid, prdc }| {
                [kid, prdc.precision, prdc.recall, prdc.density, prdc.coverage]
            });
            Ok(std::iter::once(scores.frechet).chain(others.into_iter().flatten()).collect())
        };
        let found = standard_errors(features, halves, 0, values)?;
        let at = |index: usize| found.get(index).copied();
        self.standard_errors = Some(StandardErrors {
            halves,
            frechet: found[0],
            kid: at(1),
            precision: at(2),
            recall: at(3),
            density: at(4),
            coverage: at(5),
        });
        Ok(())
    }

    /// Adds the known properties of the model and of its sampling.
    #[must_use]
    pub(crate) fn of_model(self, card: &Card, plan: &SamplePlan) -> Self {
        Self {
            method: card.method.clone(),
            priors: card.priors,
            thresholding: plan.thresholding.clone(),
            guidance_scale: (plan.guidance_scale != 1.0).then_some(plan.guidance_scale),
            steps: plan.steps,
            solver: plan.solver.clone(),
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
/// Errors of the file system; [`Error::Files`](crate::Error::Files) if the file contains something else, or
/// if another version wrote a row.
pub fn read(path: &Path) -> Result<Vec<Measurement>> {
    /// The version of a row, whatever else it contains.
    #[derive(Deserialize)]
    struct VersionOnly {
        #[serde(default = "first_version")]
        format_version: u32,
    }
    let versions: Vec<VersionOnly> = read_json(path)?;
    versions.iter().try_for_each(|row| ensure_version(path, row.format_version, FORMAT_VERSION))?;
    Ok(read_json(path)?)
}

/// Adds a measurement to a file that contains an array of them, or creates the file.
///
/// # Errors
///
/// As [`read`]; a file with other contents is left unchanged.
pub fn append(path: &Path, measurement: &Measurement) -> Result<()> {
    let mut all = if path.exists() { read(path)? } else { Vec::new() };
    all.push(measurement.clone());
    Ok(write_json(path, &all)?)
}

/// Writes measurements as an array and replaces an existing file.
///
/// # Errors
///
/// Errors of the file system.
pub(crate) fn write(path: &Path, rows: &[(String, Measurement)]) -> Result<()> {
    let measurements: Vec<&Measurement> = rows.iter().map(|(_, m)| m).collect();
    Ok(write_json(path, &measurements)?)
}

/// A table for a terminal, one line per measurement.
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
            let rate = |rate: Option<f64>| rate.map_or("-".to_owned(), |x| format!("{x:.3}"));
            let rates = [m.precision, m.recall, m.density, m.coverage].map(rate);
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

/// A table of kernel distances, and of standard errors if there are any, one line per measurement; empty without either.
pub(crate) fn details(rows: &[(String, Measurement)]) -> String {
    let with_errors = rows.iter().any(|(_, m)| m.standard_errors.is_some());
    let scaled = |value: Option<f64>| value.map_or("-".to_owned(), |x| format!("{:.3}", 1e3 * x));
    let shown = |value: Option<f64>| value.map_or("-".to_owned(), |x| format!("{x:.3}"));
    let mut heads = vec!["model", "kid x1000"];
    if with_errors {
        heads.extend([
            "+- frechet",
            "+- kid",
            "+- precision",
            "+- recall",
            "+- density",
            "+- coverage",
        ]);
    }
    let mut cells = vec![heads.iter().map(|&head| head.to_owned()).collect::<Vec<_>>()];
    for (name, m) in rows.iter().filter(|(_, m)| m.kid.is_some() || m.standard_errors.is_some()) {
        let mut row = vec![name.clone(), scaled(m.kid)];
        if with_errors {
            let errors = m.standard_errors.as_ref();
            let of = |field: fn(&StandardErrors) -> Option<f64>| errors.and_then(field);
            row.extend([shown(of(|e| Some(e.frechet))), scaled(of(|e| e.kid))]);
            row.extend(
                [of(|e| e.precision), of(|e| e.recall), of(|e| e.density), of(|e| e.coverage)]
                    .map(shown),
            );
        }
        cells.push(row);
    }
    if cells.len() == 1 { String::new() } else { aligned(&cells) }
}

/// A table of the shift, one line per timestep, one column per model.
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

/// Columns of equal width: the first left-aligned, numbers right-aligned, a rule below the headings.
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
