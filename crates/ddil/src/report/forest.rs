//! Paired differences as a forest plot: a row per difference, with its error, around zero.

use serde::Serialize;

use crate::compare::metric::Metric;
use crate::compare::{ComparisonReport, Difference};

use super::metrics::shown;

/// The differences in one metric.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Forest {
    title: &'static str,
    lower_is_better: bool,
    /// Where zero is, in percent of the width.
    zero: f64,
    ticks: Vec<Tick>,
    rows: Vec<ForestRow>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Tick {
    place: f64,
    label: String,
}

/// A difference. Places are in percent of the width.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct ForestRow {
    label: String,
    /// Values on the other axes, and the number of steps.
    at: String,
    num_seeds: usize,
    /// Exactly.
    value: String,
    shown: String,
    place: f64,
    /// From and to: one standard error on each side, then two.
    one: Option<[f64; 2]>,
    two: Option<[f64; 2]>,
    /// Standard errors between the difference and zero.
    num_errors: Option<String>,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Better,
    Worse,
    /// Within two standard errors of zero, or of unknown error.
    Open,
}

/// A plot for each metric in which there are differences.
pub(super) fn of(report: &ComparisonReport) -> Vec<Forest> {
    let differences = report.differences();
    report.metrics().into_iter().filter_map(|metric| Forest::of(metric, &differences)).collect()
}

impl Forest {
    fn of(metric: Metric, differences: &[Difference<'_>]) -> Option<Self> {
        let found: Vec<_> = differences
            .iter()
            .filter_map(|difference| {
                let (_, estimate) = difference.of.iter().find(|(of, _)| *of == metric)?;
                estimate.mean.is_finite().then_some((difference, *estimate))
            })
            .collect();
        let reach = |(_, estimate): &(&Difference<'_>, crate::compare::statistics::Estimate)| {
            let error = estimate.standard_error.filter(|error| error.is_finite()).unwrap_or(0.0);
            [estimate.mean - 2.0 * error, estimate.mean + 2.0 * error]
        };
        let ends: Vec<f64> = found.iter().flat_map(reach).collect();
        let low = ends.iter().copied().fold(0.0, f64::min);
        let high = ends.iter().copied().fold(0.0, f64::max);
        let scale = Scale::of(low, high);
        let rows = found.iter().map(|(difference, estimate)| {
            let error = estimate.standard_error.filter(|error| error.is_finite());
            let span = |times: f64| {
                error.map(|error| {
                    [-1.0, 1.0].map(|side| scale.place(estimate.mean + side * times * error))
                })
            };
            let mut at: Vec<String> = difference.others.iter().map(ToString::to_string).collect();
            at.push(steps(difference.steps));
            ForestRow {
                label: format!("{} − {}", difference.value, difference.baseline),
                at: at.join(", "),
                num_seeds: estimate.n,
                value: estimate.mean.to_string(),
                shown: estimate.shown(metric.decimals()),
                place: scale.place(estimate.mean),
                one: span(1.0),
                two: span(2.0),
                num_errors: estimate.standard_errors().map(|n| format!("{n:+.1}")),
                verdict: verdict(metric, estimate.standard_errors()),
            }
        });
        let rows: Vec<ForestRow> = rows.collect();
        (!rows.is_empty()).then(|| Self {
            title: metric.title(),
            lower_is_better: metric.lower_is_better(),
            zero: scale.place(0.0),
            ticks: scale.ticks(),
            rows,
        })
    }
}

/// `4 steps`.
fn steps(steps: u32) -> String {
    if steps == 1 { "1 step".to_owned() } else { format!("{steps} steps") }
}

fn verdict(metric: Metric, num_errors: Option<f64>) -> Verdict {
    match num_errors {
        Some(n) if n.abs() > 2.0 && (n < 0.0) == metric.lower_is_better() => Verdict::Better,
        Some(n) if n.abs() > 2.0 => Verdict::Worse,
        _ => Verdict::Open,
    }
}

/// The axis: a range that contains zero.
#[derive(Clone, Copy, Debug)]
struct Scale {
    low: f64,
    width: f64,
}

impl Scale {
    fn of(low: f64, high: f64) -> Self {
        let room = if high > low { 0.06 * (high - low) } else { 1.0 };
        Self { low: low - room, width: high - low + 2.0 * room }
    }

    /// In percent, to a hundredth.
    fn place(self, value: f64) -> f64 {
        (1e4 * (value - self.low) / self.width).round() / 100.0
    }

    fn ticks(self) -> Vec<Tick> {
        let step = crate::compare::plot::round_step(self.width / 3.5);
        let first = (self.low / step).ceil() as i64;
        let last = ((self.low + self.width) / step).floor() as i64;
        (first..=last)
            .map(|index| index as f64 * step)
            .map(|value| Tick { place: self.place(value), label: shown(value) })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_contains_zero_and_has_round_ticks() {
        let scale = Scale::of(-0.5, 1.5);
        let labels: Vec<String> = scale.ticks().into_iter().map(|tick| tick.label).collect();
        assert_eq!(labels, ["0", "1"]);
        assert!((scale.place(-0.62)).abs() < 1e-9 && (scale.place(1.62) - 100.0).abs() < 1e-9);
        assert_eq!(Scale::of(0.0, 0.0).place(0.0), 50.0);
    }

    #[test]
    fn a_difference_within_two_errors_is_open() {
        let of = |n| verdict(Metric::Frechet, n);
        assert_eq!([of(Some(-2.1)), of(Some(2.1))], [Verdict::Better, Verdict::Worse]);
        assert_eq!([of(Some(-1.9)), of(None)], [Verdict::Open; 2]);
        assert_eq!(verdict(Metric::Coverage, Some(3.0)), Verdict::Better);
    }
}
