//! Charts as data, for the library that draws them in the page.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Serialize, Serializer};

use super::metrics::{Metrics, evaluation_rank};

/// A chart with lines over a common axis.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Chart {
    /// Its name within the page.
    pub(crate) id: String,
    /// Its title.
    pub(crate) title: String,
    /// What a reader has to know about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    /// Label of the horizontal axis.
    pub(crate) x_title: &'static str,
    /// Charts of one group have linked cursors; empty for a chart of its own.
    pub(crate) group: &'static str,
    /// Whether the values may be drawn on a logarithmic scale: some are positive, and none is negative.
    pub(crate) may_be_log: bool,
    /// Whether the logarithmic scale is the first one shown.
    pub(crate) is_log: bool,
    /// Texts of equally spaced places, for an axis that is not a number.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) places: Vec<String>,
    /// Positions on the horizontal axis, increasing; indices for an axis of places.
    pub(crate) xs: Vec<f64>,
    /// The lines.
    pub(crate) lines: Vec<Line>,
}

/// A line of a chart.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Line {
    /// Its name in the legend.
    pub(crate) name: String,
    /// Index of its colour; none for a neutral one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) color: Option<usize>,
    /// Whether it is a level to compare with, and not a measurement at each position.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_level: bool,
    /// Whether it is shown only after a click in the legend.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_hidden: bool,
    /// A value for each position; none leaves a gap.
    #[serde(serialize_with = "rounded")]
    pub(crate) values: Vec<Option<f64>>,
    /// Standard errors, if there are any.
    #[serde(serialize_with = "rounded", skip_serializing_if = "Vec::is_empty")]
    pub(crate) errors: Vec<Option<f64>>,
    /// The smallest value at each position, if a position is a part of several.
    #[serde(serialize_with = "rounded", skip_serializing_if = "Vec::is_empty")]
    pub(crate) lows: Vec<Option<f64>>,
    /// The largest one.
    #[serde(serialize_with = "rounded", skip_serializing_if = "Vec::is_empty")]
    pub(crate) highs: Vec<Option<f64>>,
}

/// More points than a chart has pixels are reduced to this many parts: the mean of each, and its smallest and its largest
/// value.
const PARTS: usize = 600;

/// Six significant digits: more than a chart shows. NaN and infinity become gaps.
fn rounded<S: Serializer>(values: &[Option<f64>], serializer: S) -> Result<S::Ok, S::Error> {
    let round = |value: &Option<f64>| {
        let value = value.filter(|value| value.is_finite())?;
        format!("{value:.5e}").parse::<f64>().ok()
    };
    serializer.collect_seq(values.iter().map(round))
}

impl Line {
    /// A line without errors.
    pub(crate) fn new(name: impl Into<String>, values: Vec<Option<f64>>) -> Self {
        Self {
            name: name.into(),
            color: None,
            is_level: false,
            is_hidden: false,
            values,
            errors: Vec::new(),
            lows: Vec::new(),
            highs: Vec::new(),
        }
    }

    /// The same line in a colour.
    pub(crate) fn colored(self, color: usize) -> Self {
        Self { color: Some(color), ..self }
    }
}

impl Chart {
    /// A chart over steps, linked with the others; lines take colours in turn.
    fn over_steps(id: &str, title: &str, steps: &[u64], lines: Vec<Line>) -> Self {
        let xs = steps.iter().map(|step| *step as f64).collect();
        let (id, title) = (id.to_owned(), title.to_owned());
        let chart =
            Self { id, title, xs, lines, x_title: "update", group: "updates", ..Self::default() };
        chart.reduced().finished()
    }

    /// A chart over places, in this order.
    pub(crate) fn over_places(
        id: &str,
        title: &str,
        x_title: &'static str,
        places: Vec<String>,
    ) -> Self {
        let xs = (0..places.len()).map(|place| place as f64).collect();
        let (id, title) = (id.to_owned(), title.to_owned());
        Self { id, title, x_title, places, xs, ..Self::default() }
    }

    /// Notes whether a logarithmic scale is possible.
    pub(crate) fn finished(mut self) -> Self {
        let values =
            || self.lines.iter().flat_map(|line| line.values.iter().chain(&line.lows)).flatten();
        self.may_be_log = values().any(|value| *value > 0.0 && value.is_finite())
            && !values().any(|value| *value < 0.0);
        self.is_log &= self.may_be_log;
        self
    }

    /// Whether its positions are parts of several records.
    pub(crate) fn is_reduced(&self) -> bool {
        self.lines.iter().any(|line| !line.lows.is_empty())
    }

    /// One position for each of [`PARTS`] parts, if there are more than twice as many.
    fn reduced(mut self) -> Self {
        if self.xs.len() <= 2 * PARTS {
            return self;
        }
        let size = self.xs.len().div_ceil(PARTS);
        for line in &mut self.lines {
            let of_parts = |reduce: fn(&mut dyn Iterator<Item = f64>) -> Option<f64>| {
                let parts = line.values.chunks(size);
                parts.map(|part| reduce(&mut finite(part))).collect::<Vec<_>>()
            };
            let lows = of_parts(|values| values.reduce(f64::min));
            let highs = of_parts(|values| values.reduce(f64::max));
            (line.values, line.lows, line.highs) = (of_parts(|values| mean(values)), lows, highs);
        }
        let middle = |part: &[f64]| f64::midpoint(part[0], part[part.len() - 1]);
        self.xs = self.xs.chunks(size).map(|part| middle(part).floor()).collect();
        self
    }
}

fn finite(values: &[Option<f64>]) -> impl Iterator<Item = f64> {
    values.iter().flatten().copied().filter(|value| value.is_finite())
}

/// Charts of all figures of a run: known ones together, each of the others by itself.
pub(crate) fn of_run(metrics: &Metrics, seconds: &Metrics) -> Vec<Chart> {
    let mut rest: BTreeMap<&str, &Vec<Option<f64>>> =
        metrics.columns.iter().map(|(name, column)| (name.as_str(), column)).collect();
    let mut charts = Vec::new();
    for Family { id, title, is_log, name_of } in FAMILIES {
        let names: Vec<(&str, String)> =
            rest.keys().filter_map(|key| Some((*key, name_of(key)?))).collect();
        let lines = names.iter().filter_map(|(key, name)| {
            let line = Line::new(name.clone(), rest.remove(key)?.clone());
            Some(match color_of(name) {
                Some(color) => line.colored(color),
                None => line,
            })
        });
        let lines: Vec<Line> = lines.collect();
        if !lines.is_empty() {
            let chart = Chart::over_steps(id, title, &metrics.steps, lines);
            charts.push(Chart { is_log: *is_log, ..chart }.finished());
        }
    }
    let clipped: Vec<Clipped<'_>> = rest.iter().filter_map(|(k, v)| Clipped::of(k, v)).collect();
    rest.retain(|key, _| !key.starts_with("clipped_"));
    charts.extend(clipped_over_steps(&metrics.steps, &clipped));
    charts.extend(clipped_over_timesteps(&clipped));
    let others = rest.into_iter().map(|(name, column)| {
        let line = Line::new(name, column.clone()).colored(0);
        Chart::over_steps(name, &title_of(name), &metrics.steps, vec![line])
    });
    // Evaluations first: they are what a run is for.
    let (mut evaluations, others): (Vec<_>, Vec<_>) =
        others.partition(|chart| chart.id.starts_with(EVALUATION));
    evaluations.sort_by_key(|chart| evaluation_rank(&chart.id));
    charts.splice(charts.len().min(1)..charts.len().min(1), evaluations);
    charts.extend(others);
    charts.extend(throughput(seconds));
    charts
}

/// The start of the names of figures that an evaluation during the training writes.
pub(crate) const EVALUATION: &str = "eval_";

/// Figures that are drawn in one chart.
struct Family {
    id: &'static str,
    title: &'static str,
    is_log: bool,
    /// The name of a figure's line; none if it is of another family.
    name_of: fn(&str) -> Option<String>,
}

const FAMILIES: &[Family] = &[
    Family { id: "loss", title: "Loss by source of the state", is_log: true, name_of: loss },
    Family { id: "critic_loss", title: "Loss of the critic", is_log: true, name_of: critic_loss },
    Family { id: "grad_norm", title: "Gradient norm", is_log: true, name_of: grad_norm },
    Family { id: "learning_rate", title: "Learning rate", is_log: false, name_of: learning_rate },
    Family { id: "share", title: "Share of the sources in a batch", is_log: false, name_of: share },
];

fn loss(key: &str) -> Option<String> {
    if key == "loss" { Some(ALL.to_owned()) } else { key.strip_prefix("loss_").map(in_words) }
}

fn critic_loss(key: &str) -> Option<String> {
    (key == "critic_loss").then(|| "critic".to_owned())
}

fn grad_norm(key: &str) -> Option<String> {
    of_network(key, "grad_norm")
}

fn learning_rate(key: &str) -> Option<String> {
    of_network(key, "learning_rate")
}

fn share(key: &str) -> Option<String> {
    key.strip_prefix("share_").map(in_words)
}

/// The network that a figure is of: the student without a prefix.
fn of_network(key: &str, figure: &str) -> Option<String> {
    let prefix = key.strip_suffix(figure)?;
    if prefix.is_empty() {
        Some("student".to_owned())
    } else {
        prefix.strip_suffix('_').map(in_words)
    }
}

const ALL: &str = "all";

/// The same colour for a source or a network in every chart; neutral for all together.
fn color_of(name: &str) -> Option<usize> {
    match name {
        ALL => None,
        "forward" => Some(0),
        "student" => Some(1),
        "teacher" => Some(2),
        "noise" => Some(3),
        "critic" => Some(4),
        _ => Some(5),
    }
}

fn in_words(name: &str) -> String {
    name.replace('_', " ")
}

/// `eval_frechet` as `Evaluation: frechet`, and other names with spaces.
fn title_of(name: &str) -> String {
    match name.strip_prefix(EVALUATION) {
        Some(metric) => format!("Evaluation: {}", in_words(metric)),
        None => in_words(name),
    }
}

/// A figure `clipped_<place>_<timestep>`.
struct Clipped<'a> {
    place: String,
    timestep: i64,
    values: &'a [Option<f64>],
}

impl<'a> Clipped<'a> {
    fn of(name: &str, values: &'a [Option<f64>]) -> Option<Self> {
        let (place, timestep) = name.strip_prefix("clipped_")?.rsplit_once('_')?;
        Some(Self { place: in_words(place), timestep: timestep.parse().ok()?, values })
    }
}

/// The places with the colour of each: that of the source, in another line style for each network.
fn places_of(clipped: &[Clipped<'_>]) -> Vec<(usize, String)> {
    let places: BTreeSet<&str> = clipped.iter().map(|figure| figure.place.as_str()).collect();
    let parts = |place: &str| -> (String, Option<usize>) {
        let source = place.rsplit_once(' ').and_then(|(network, source)| {
            Some((network.to_owned(), color_of(source).filter(|color| *color < NUM_SOURCES)?))
        });
        source.map_or((String::new(), None), |(network, color)| (network, Some(color)))
    };
    let networks: BTreeSet<String> = places.iter().map(|place| parts(place).0).collect();
    let mut num_others = 0;
    let colored = |place: &str| {
        let (network, color) = parts(place);
        let style = networks.iter().filter(|n| !n.is_empty()).position(|n| *n == network);
        let color = color.unwrap_or_else(|| {
            num_others += 1;
            NUM_SOURCES + (num_others - 1) % (NUM_COLORS - NUM_SOURCES)
        });
        (color + NUM_COLORS * style.unwrap_or(0), place.to_owned())
    };
    places.into_iter().map(colored).collect()
}

/// The colours of the page; from there on, lines are dashed.
const NUM_COLORS: usize = 7;
/// The first of them are for the sources.
const NUM_SOURCES: usize = 4;

/// The mean of the values that are present; none without any.
fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, n), value| (sum + value, n + 1));
    (count > 0).then(|| sum / f64::from(count))
}

fn clipped_over_steps(steps: &[u64], clipped: &[Clipped<'_>]) -> Option<Chart> {
    let line = |(color, place): (usize, String)| {
        let of_place: Vec<_> = clipped.iter().filter(|figure| figure.place == place).collect();
        let at = |index: usize| mean(of_place.iter().filter_map(|figure| figure.values[index]));
        Line::new(place, (0..steps.len()).map(at).collect()).colored(color)
    };
    let lines: Vec<Line> = places_of(clipped).into_iter().map(line).collect();
    let chart = Chart::over_steps("clipped", "Share of clipped values", steps, lines);
    let note = "Network and source of the state; mean over timesteps.".to_owned();
    (!chart.lines.is_empty()).then_some(Chart { note: Some(note), ..chart })
}

/// The number of lines of the record that a chart over timesteps averages.
const NEWEST: usize = 10;

fn clipped_over_timesteps(clipped: &[Clipped<'_>]) -> Option<Chart> {
    let timesteps: BTreeSet<i64> = clipped.iter().map(|figure| figure.timestep).collect();
    let line = |(color, place): (usize, String)| {
        let at = |timestep: &i64| {
            let is_here =
                |figure: &&Clipped<'_>| figure.place == place && figure.timestep == *timestep;
            let figure = clipped.iter().find(is_here)?;
            mean(figure.values.iter().rev().take(NEWEST).flatten().copied())
        };
        Line::new(place.clone(), timesteps.iter().rev().map(at).collect()).colored(color)
    };
    let places = timesteps.iter().rev().map(ToString::to_string).collect();
    let title = "Share of clipped values by timestep";
    let chart = Chart::over_places("clipped_timesteps", title, "timestep", places);
    let lines: Vec<Line> = places_of(clipped).into_iter().map(line).collect();
    let note = Some(format!("From noise to data; mean of the last {NEWEST} records."));
    (!lines.is_empty()).then(|| Chart { note, lines, ..chart }.finished())
}

/// Updates per second between two lines of `timings.jsonl`, which contains the seconds spent so far.
fn throughput(timings: &Metrics) -> Option<Chart> {
    let spent = timings.columns.get("seconds")?;
    let points: Vec<(u64, f64)> =
        timings.steps.iter().zip(spent).filter_map(|(step, s)| Some((*step, (*s)?))).collect();
    let start = std::iter::once((0, 0.0)).chain(points.iter().copied());
    let rate = start.zip(&points).map(|(before, now)| {
        let seconds = now.1 - before.1;
        (seconds > 0.0).then(|| (now.0 - before.0) as f64 / seconds)
    });
    let line = Line::new("updates per second", rate.collect()).colored(0);
    let steps: Vec<u64> = points.iter().map(|(step, _)| *step).collect();
    (!steps.is_empty())
        .then(|| Chart::over_steps("throughput", "Updates per second", &steps, vec![line]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(columns: &[(&str, Vec<Option<f64>>)]) -> Metrics {
        let steps = (1..=columns[0].1.len() as u64).collect();
        let columns = columns.iter().map(|(name, values)| ((*name).to_owned(), values.clone()));
        Metrics { steps, columns: columns.collect(), damaged: Vec::new() }
    }

    #[test]
    fn every_figure_is_in_one_chart() {
        let names = [
            "loss",
            "loss_forward",
            "loss_student",
            "grad_norm",
            "critic_grad_norm",
            "critic_loss",
            "learning_rate",
            "share_forward",
            "gan_real",
            "eval_frechet",
            "clipped_teacher_forward_999",
            "clipped_student_rollout_499",
        ];
        let columns: Vec<_> =
            names.iter().map(|name| (*name, vec![Some(0.5), Some(0.25)])).collect();
        let charts = of_run(&metrics(&columns), &Metrics::default());
        let ids: Vec<&str> = charts.iter().map(|chart| chart.id.as_str()).collect();
        let expected = [
            "loss",
            "eval_frechet",
            "critic_loss",
            "grad_norm",
            "learning_rate",
            "share",
            "clipped",
            "clipped_timesteps",
            "gan_real",
        ];
        assert_eq!(ids, expected);
        let names =
            |chart: &Chart| chart.lines.iter().map(|line| line.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&charts[0]), ["all", "forward", "student"]);
        assert_eq!(names(&charts[3]), ["critic", "student"]);
        assert_eq!(names(&charts[6]), ["student rollout", "teacher forward"]);
        assert_eq!(charts[7].places, ["999", "499"]);
        assert_eq!(charts[7].lines[1].values, [Some(0.375), None]);
    }

    #[test]
    fn a_reduced_line_keeps_its_extremes() {
        let mut values: Vec<Option<f64>> = (0..100_000).map(|i| Some(f64::from(i % 7))).collect();
        values[54_321] = Some(1e3);
        values[54_400] = Some(-1e3);
        values[70_000] = Some(f64::NAN);
        let charts = of_run(&metrics(&[("loss", values)]), &Metrics::default());
        let (chart, line) = (&charts[0], &charts[0].lines[0]);
        assert!(chart.is_reduced() && chart.xs.len() <= PARTS, "{}", chart.xs.len());
        let lengths = [&line.values, &line.lows, &line.highs].map(Vec::len);
        assert_eq!(lengths, [chart.xs.len(); 3]);
        assert!(chart.xs.is_sorted());
        assert!(line.highs.contains(&Some(1e3)) && line.lows.contains(&Some(-1e3)));
        // The first part has 167 values of 0 to 6.
        assert_eq!((line.lows[0], line.highs[0]), (Some(0.0), Some(6.0)));
        assert!(line.values[0].is_some_and(|mean| (mean - 3.0).abs() < 0.05));
        assert!(!chart.may_be_log, "a value is negative");
    }

    #[test]
    fn as_many_points_as_pixels_stay() {
        for (count, expected) in [(1200, 1200), (1201, 401)] {
            let values = (0..count).map(|i| Some(f64::from(i))).collect();
            let charts = of_run(&metrics(&[("loss", values)]), &Metrics::default());
            assert_eq!((charts[0].xs.len(), charts[0].lines[0].values.len()), (expected, expected));
        }
    }

    #[test]
    fn throughput_is_the_slope_of_the_seconds() {
        let timings = Metrics {
            steps: vec![10, 20],
            columns: [("seconds".to_owned(), vec![Some(5.0), Some(7.0)])].into(),
            damaged: Vec::new(),
        };
        let chart = throughput(&timings).expect("there are timings");
        assert_eq!(chart.lines[0].values, [Some(2.0), Some(5.0)]);
    }

    #[test]
    fn numbers_that_are_not_finite_are_gaps() {
        let line = Line::new("loss", vec![Some(f64::NAN), Some(0.123_456_789), None]);
        let json = serde_json::to_value(&line).expect("it is serialisable");
        assert_eq!(json["values"], serde_json::json!([null, 0.123_457, null]));
    }
}
