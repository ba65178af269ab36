//! Measurements as tables for a terminal.

use std::fmt::Write as _;

use ddil_evaluate::{MeanOverPrompts, Measurement, StandardErrors};

/// A table for a terminal, one line per measurement; empty if none is compared with a reference.
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
    if rows.iter().all(|(_, m)| m.frechet.is_none()) {
        return String::new();
    }
    let cells: Vec<Vec<String>> = std::iter::once(HEADS.map(str::to_owned).to_vec())
        .chain(rows.iter().map(|(name, m)| {
            let rate = |rate: Option<f64>| rate.map_or("-".to_owned(), |x| format!("{x:.3}"));
            let rates = [m.precision, m.recall, m.density, m.coverage].map(rate);
            let mut row = vec![
                name.clone(),
                if m.steps == 0 { "-".to_owned() } else { m.steps.to_string() },
                m.samples.to_string(),
                m.frechet.map_or("-".to_owned(), |x| format!("{x:.2}")),
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

/// The text of a number of a measurement, if it has it.
type Shown = fn(&Measurement) -> Option<String>;

/// A table of the metrics of images of prompts, one line per measurement; empty without any.
///
/// A `+-` beside a number is its standard error over prompts.
pub fn prompt_table(rows: &[(String, Measurement)]) -> String {
    let with_prompts: Vec<_> = rows.iter().filter(|(_, m)| m.prompts.is_some()).collect();
    let columns: [(&str, Shown); 6] = [
        ("clip cosine", |m| m.clip_score.as_ref().map(|score| with_error(score.cosine, 4))),
        ("100 max(cos, 0)", |m| {
            m.clip_score.as_ref().map(|score| format!("{:.2}", score.torchmetrics))
        }),
        ("diversity", |m| Some(with_error(m.diversity.as_ref()?.euclidean?, 3))),
        ("clip distance", |m| Some(with_error(m.diversity.as_ref()?.clip_cosine_distance?, 4))),
        ("lpips", |m| Some(with_error(m.diversity.as_ref()?.lpips?, 4))),
        ("height x width", |m| m.image_size.map(|[height, width]| format!("{height}x{width}"))),
    ];
    let shown: Vec<_> = columns
        .iter()
        .filter(|(_, value)| with_prompts.iter().any(|(_, m)| value(m).is_some()))
        .collect();
    if shown.is_empty() {
        return String::new();
    }
    let mut heads: Vec<String> =
        ["model", "steps", "prompts", "images of each"].map(str::to_owned).to_vec();
    heads.extend(shown.iter().map(|(head, _)| (*head).to_owned()));
    let mut cells = vec![heads];
    for (name, m) in with_prompts {
        let steps = if m.steps == 0 { "-".to_owned() } else { m.steps.to_string() };
        let (count, each) =
            m.prompts.as_ref().map_or((0, 0), |set| (set.count, set.images_per_prompt));
        let mut row = vec![name.clone(), steps, count.to_string(), each.to_string()];
        row.extend(shown.iter().map(|(_, value)| value(m).unwrap_or("-".to_owned())));
        cells.push(row);
    }
    aligned(&cells)
}

/// A table of what samples of classes show, one line per measurement; empty without any.
pub(crate) fn class_table(rows: &[(String, Measurement)]) -> String {
    let of_classes: Vec<_> = rows
        .iter()
        .filter(|(_, m)| m.class_agreement.is_some() || m.missing_classes.is_some())
        .collect();
    if of_classes.is_empty() {
        return String::new();
    }
    let with_missing = of_classes.iter().any(|(_, m)| m.missing_classes.is_some());
    let number = |value: Option<f64>, decimals: usize| {
        value.map_or("-".to_owned(), |value| format!("{value:.decimals$}"))
    };
    let mut heads = vec!["model", "steps", "class agreement"];
    if with_missing {
        heads.extend(["missing classes", "their agreement", "their distance to teacher"]);
    }
    let mut cells = vec![heads.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for (name, m) in of_classes {
        let mut row = vec![name.clone(), m.steps.to_string(), number(m.class_agreement, 3)];
        if with_missing {
            let missing = m.missing_classes.as_ref();
            row.extend([
                missing.map_or("-".to_owned(), |missing| missing.classes.len().to_string()),
                number(missing.and_then(|missing| missing.class_agreement), 3),
                number(missing.and_then(|missing| missing.frechet_to_teacher), 2),
            ]);
        }
        cells.push(row);
    }
    aligned(&cells)
}

/// A mean with its standard error.
fn with_error(value: MeanOverPrompts, decimals: usize) -> String {
    let mean = format!("{:.decimals$}", value.mean);
    value.standard_error.map_or(mean.clone(), |error| format!("{mean} +- {error:.decimals$}"))
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
