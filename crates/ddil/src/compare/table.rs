//! Tables of a comparison, as rows of text; the first row contains the headings.

use super::metric::Metric;
use super::report::{ArmAt, ComparisonReport, Difference, Entry, EntryKind, Shift, timesteps};
use super::statistics::Estimate;

/// Real images and teachers first, then the arms, with these metrics.
pub fn summary(report: &ComparisonReport, metrics: &[Metric]) -> Vec<Vec<String>> {
    let mut heads = axes(report);
    heads.extend(["steps", "samples", "seeds"].map(str::to_owned));
    heads.extend(metrics.iter().map(|metric| metric.as_str().to_owned()));
    let mut rows = vec![heads];
    let others = [EntryKind::Data, EntryKind::Teacher];
    rows.extend(
        others.iter().flat_map(|kind| report.of_kind(*kind)).map(|e| of_entry(report, e, metrics)),
    );
    rows.extend(report.arms().iter().map(|arm| of_arm(arm, metrics)));
    rows
}

/// Arms against baselines; only the headings if there is nothing to compare.
pub(crate) fn differences(report: &ComparisonReport, metrics: &[Metric]) -> Vec<Vec<String>> {
    let mut heads = ["difference", "elsewhere", "steps", "seeds"].map(str::to_owned).to_vec();
    heads.extend(metrics.iter().map(|metric| metric.as_str().to_owned()));
    let mut rows = vec![heads];
    rows.extend(report.differences().iter().map(|row| of_difference(row, metrics)));
    rows
}

/// One row per arm, one column per timestep, and chance at the end.
pub fn shift(shifts: &[Shift]) -> Vec<Vec<String>> {
    let timesteps = timesteps(shifts);
    let mut rows = vec![vec!["at timestep".to_owned()]];
    rows[0].extend(timesteps.iter().map(ToString::to_string));
    let cell = |estimate: Option<Estimate>| {
        estimate.map_or("-".to_owned(), |estimate| estimate.shown(Metric::Shift.decimals()))
    };
    for Shift { name, points } in shifts {
        let mut row = vec![name.clone()];
        row.extend(
            timesteps
                .iter()
                .map(|t| cell(points.iter().find(|point| point.0 == *t).map(|point| point.1))),
        );
        rows.push(row);
    }
    let mut chance = vec!["chance".to_owned()];
    chance.extend(timesteps.iter().map(|t| {
        let at = |shift: &Shift| shift.points.iter().find(|point| point.0 == *t).map(|p| p.2.mean);
        let values: Vec<f64> = shifts.iter().filter_map(at).collect();
        cell(Estimate::of(&values).map(|e| Estimate { standard_error: None, ..e }))
    }));
    rows.push(chance);
    rows
}

/// A table in Markdown.
pub fn markdown(rows: &[Vec<String>]) -> String {
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let Some((heads, rows)) = rows.split_first() else { return String::new() };
    let rule: String = heads.iter().map(|_| " --- |").collect();
    let rest: String = rows.iter().map(line).collect();
    format!("{}|{rule}\n{rest}", line(heads))
}

/// At least one column, for entries without axes.
pub(crate) fn axes(report: &ComparisonReport) -> Vec<String> {
    match report.axes.as_slice() {
        [] => vec!["model".to_owned()],
        axes => axes.iter().map(|axis| axis.name.clone()).collect(),
    }
}

fn of_entry(report: &ComparisonReport, entry: &Entry, metrics: &[Metric]) -> Vec<String> {
    let mut row = vec![String::new(); axes(report).len()];
    row[0].clone_from(&entry.name);
    row.push(if entry.steps == 0 { "-".to_owned() } else { entry.steps.to_string() });
    let measurement = entry.measurement.as_ref();
    row.push(measurement.map_or("-".to_owned(), |m| m.samples.to_string()));
    row.push("-".to_owned());
    row.extend(metrics.iter().map(|&metric| {
        let value = measurement.and_then(|m| metric.of(m));
        value.map_or("-".to_owned(), |value| format!("{value:.*}", metric.decimals()))
    }));
    row
}

fn of_arm(arm: &ArmAt<'_>, metrics: &[Metric]) -> Vec<String> {
    let mut row: Vec<String> = match arm.values.as_slice() {
        [] => vec![arm.name()],
        values => values.iter().map(|value| (*value).to_owned()).collect(),
    };
    let samples = arm.measured.values().map(|m| m.samples).max();
    row.push(format!("{}{}", arm.steps, if arm.own_steps { "" } else { "*" }));
    row.push(samples.map_or("-".to_owned(), |n| n.to_string()));
    row.push(seeds(arm));
    row.extend(metrics.iter().map(|&metric| {
        arm.estimate(metric).map_or("-".to_owned(), |estimate| estimate.shown(metric.decimals()))
    }));
    row
}

/// The number of measured cells, and how the others ended.
pub(crate) fn seeds(arm: &ArmAt<'_>) -> String {
    let counts = [
        (arm.num_collapsed, "collapsed"),
        (arm.num_diverged, "diverged"),
        (arm.num_failed, "failed"),
    ];
    let endings = counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!(", {n} {what}"));
    arm.measured.len().to_string() + &endings.collect::<String>()
}

fn of_difference(difference: &Difference<'_>, metrics: &[Metric]) -> Vec<String> {
    let Difference { axis, value, baseline, others, steps, of } = difference;
    let elsewhere = if others.is_empty() { "-".to_owned() } else { others.join(", ") };
    let seeds = of.iter().map(|(_, estimate)| estimate.n).max().unwrap_or(0);
    let mut row = vec![
        format!("{axis}: {value} - {baseline}"),
        elsewhere,
        steps.to_string(),
        seeds.to_string(),
    ];
    row.extend(metrics.iter().map(|&metric| {
        let found = of.iter().find(|(of, _)| *of == metric);
        found.map_or("-".to_owned(), |(_, estimate)| {
            let errors =
                estimate.standard_errors().map_or(String::new(), |n| format!(" ({n:+.1})"));
            format!("{}{errors}", estimate.shown(metric.decimals()))
        })
    }));
    row
}
