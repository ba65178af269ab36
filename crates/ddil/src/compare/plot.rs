//! Plots of a comparison, and of other measurements, as SVG.

use std::path::Path;
use std::sync::OnceLock;

use ddil_files::write_atomic;
use plotters::coord::Shift as Shifted;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::register_font;

use super::metric::Metric;
use super::report::{ComparisonReport, EntryKind, Shift, timesteps};
use super::statistics::Estimate;
use crate::error::{Error, Result};

/// A line with its label in the legend.
#[derive(Clone, Debug)]
pub struct Line {
    /// Label in the legend.
    pub name: String,
    /// Positions on the axis, with the measurement at each.
    pub points: Vec<(f64, Estimate)>,
}

/// A horizontal reference level.
#[derive(Clone, Debug)]
pub struct Level {
    /// Label in the legend.
    pub name: String,
    /// The level, in the units of the lines.
    pub(crate) y: f64,
}

/// One of several panels.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Title above it.
    pub title: String,
    /// Label below its axis.
    pub x_title: &'static str,
    /// Positions of the axis marks in order, with the text at each.
    pub x_marks: Vec<(f64, String)>,
    /// Scale of the measured values.
    pub y_scale: Scale,
    /// Lines, in the order of their colours.
    pub lines: Vec<Line>,
    /// Reference levels, dashed, in grey.
    pub levels: Vec<Level>,
}

/// The scale of an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// Linear, from 0.
    Linear,
    /// Logarithmic.
    Log,
}

type Refusal = Box<dyn std::error::Error>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shifted>;
type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<Marked, Marked>>;

/// An axis with marks at given positions, and the text at each.
struct Marked {
    low: f64,
    high: f64,
    marks: Vec<(f64, String)>,
}

impl Ranged for Marked {
    type ValueType = f64;
    type FormatOption = NoDefaultFormatting;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let share = (value - self.low) / (self.high - self.low);
        (f64::from(first) + share * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.marks.iter().map(|(mark, _)| *mark).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Marked {
    fn format_ext(&self, value: &f64) -> String {
        let found = self.marks.iter().find(|(mark, _)| mark == value);
        found.map_or(String::new(), |(_, label)| label.clone())
    }
}

const PANEL: (u32, u32) = (420, 340);
const LEGEND_LINE: u32 = 18;
const TEXT: (&str, u32) = ("sans-serif", 13);
const TITLE: (&str, u32) = ("sans-serif", 16);
const GREY: RGBColor = RGBColor(110, 110, 110);
/// The palette of Okabe and Ito, which most eyes can tell apart.
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// Fréchet distances and coverage by number of steps, one line per arm, with error bars of one standard error.
///
/// Dashed: the teacher's samples at full steps, and two halves of the real images. Coverage grows with the number of
/// samples, and is left out if the points of the lines have different numbers of samples.
///
/// # Errors
///
/// Errors of the plotting library.
pub fn quality(report: &ComparisonReport) -> std::result::Result<String, String> {
    let measured = report.metrics();
    let mut shown: Vec<Metric> = vec![Metric::Frechet, Metric::ToTeacher];
    if report.has_one_number_of_samples() {
        shown.push(Metric::Coverage);
    }
    shown.extend(Metric::OF_PROMPTS);
    shown.retain(|metric| measured.contains(metric));
    let panels = shown.into_iter().map(|metric| {
        let lines = lines_of(report, metric);
        let mut steps: Vec<u32> = report.arms().iter().map(|arm| arm.steps).collect();
        steps.sort_unstable();
        steps.dedup();
        // A distance to images has a scale; a share or a cosine, which may be negative, has none.
        let is_distance = matches!(metric, Metric::Frechet | Metric::ToTeacher);
        let y_scale = if is_distance { Scale::Log } else { Scale::Linear };
        Panel {
            title: metric.title().to_owned(),
            x_title: "steps",
            x_marks: steps.iter().map(|n| (f64::from(*n).log2(), n.to_string())).collect(),
            y_scale,
            lines,
            levels: levels_of(report, metric),
        }
    });
    draw(&panels.collect::<Vec<_>>())
}

/// The shift by timestep, one line per arm, with error bars of one standard error; the dashed line is chance.
///
/// # Errors
///
/// Errors of the plotting library.
pub fn shift(shifts: &[Shift]) -> std::result::Result<String, String> {
    let timesteps = timesteps(shifts);
    // From noise to data, in the order of sampling.
    let place = |t: i64| timesteps.iter().position(|known| *known == t).unwrap_or(0) as f64;
    let nulls: Vec<f64> =
        shifts.iter().flat_map(|shift| shift.points.iter().map(|point| point.2.mean)).collect();
    let levels = Estimate::of(&nulls).map(|null| Level { name: "chance".to_owned(), y: null.mean });
    let line = |shift: &Shift| Line {
        name: shift.name.clone(),
        points: shift.points.iter().map(|(t, energy, _)| (place(*t), *energy)).collect(),
    };
    let panel = Panel {
        title: "Shift: energy distance to noised data".to_owned(),
        x_title: "timestep",
        x_marks: timesteps.iter().map(|t| (place(*t), t.to_string())).collect(),
        y_scale: Scale::Linear,
        lines: shifts.iter().map(line).collect(),
        levels: levels.into_iter().collect(),
    };
    draw(&[panel])
}

/// Writes a plot; the file is complete or absent.
pub(super) fn write(path: &Path, plot: std::result::Result<String, String>) -> Result<()> {
    let svg = plot.map_err(|reason| Error::Plot { path: path.to_owned(), reason })?;
    Ok(write_atomic(path, svg.as_bytes())?)
}

/// The arms' lines by number of steps.
pub(crate) fn lines_of(report: &ComparisonReport, metric: Metric) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for arm in report.arms() {
        let Some(estimate) = arm.estimate(metric) else { continue };
        let (name, point) = (arm.name(), (f64::from(arm.steps).log2(), estimate));
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name, points: vec![point] }),
        }
    }
    lines
}

/// Reference levels: real images, and teachers at full steps.
pub(crate) fn levels_of(report: &ComparisonReport, metric: Metric) -> Vec<Level> {
    let most = report.of_kind(EntryKind::Teacher).map(|entry| entry.steps).max();
    let teachers = report.of_kind(EntryKind::Teacher).filter(|entry| Some(entry.steps) == most);
    let shown = report.of_kind(EntryKind::Data).chain(teachers);
    let level = |entry: &super::report::Entry| {
        let y = metric.of(entry.measurement.as_ref()?)?;
        let steps =
            if entry.steps == 0 { String::new() } else { format!(", {} steps", entry.steps) };
        Some(Level { name: format!("{}{steps}", entry.name), y })
    };
    shown.filter_map(level).collect()
}

/// An SVG of panels side by side, each with a legend below it.
///
/// # Errors
///
/// The reason why it could not be drawn, such as a font that cannot be read.
pub fn draw(panels: &[Panel]) -> std::result::Result<String, String> {
    drawn(panels).map_err(|refusal| refusal.to_string())
}

fn drawn(panels: &[Panel]) -> std::result::Result<String, Refusal> {
    ensure_font()?;
    let named =
        panels.iter().map(|panel| panel.lines.len() + panel.levels.len()).max().unwrap_or(0);
    let width = PANEL.0 * panels.len() as u32;
    let height = PANEL.1 + LEGEND_LINE * (named as u32 + 1);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, panel) in root.split_evenly((1, panels.len())).iter().zip(panels) {
            let (above, below) = area.split_vertically(PANEL.1);
            draw_panel(&above, panel)?;
            draw_legend(&below, panel)?;
        }
        root.present()?;
    }
    Ok(svg)
}

/// The font is read for the widths of letters; the SVG only names it.
fn ensure_font() -> std::result::Result<(), Refusal> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = REGISTERED.get_or_init(|| {
        register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular()).is_ok()
    });
    if *registered { Ok(()) } else { Err("the font cannot be read".into()) }
}

fn draw_panel(area: &Area<'_>, panel: &Panel) -> std::result::Result<(), Refusal> {
    let (low, high) = panel.y_range();
    let marks = panel.y_scale.marks(low, high).into_iter();
    let y = Marked { low, high, marks: marks.map(|y| (y, panel.y_scale.label(y))).collect() };
    let xs: Vec<f64> = panel.x_marks.iter().map(|(x, _)| *x).collect();
    let (left, right) = ends(&xs, 0.25);
    let x = Marked { low: left, high: right, marks: panel.x_marks.clone() };
    let mut chart: Chart<'_> = ChartBuilder::on(area)
        .caption(&panel.title, TITLE)
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_desc(panel.x_title)
        .label_style(TEXT)
        .draw()?;
    for (level, dash) in panel.levels.iter().zip(dashes()) {
        if let Some(y) = panel.y_scale.of(level.y) {
            let ends = [(left, y), (right, y)];
            chart.draw_series(DashedLineSeries::new(ends, dash.0, dash.1, GREY.into()))?;
        }
    }
    for (line, color) in panel.lines.iter().zip(colors()) {
        draw_line(&mut chart, panel.y_scale, line, color)?;
    }
    Ok(())
}

fn draw_line(
    chart: &mut Chart<'_>,
    scale: Scale,
    line: &Line,
    color: RGBColor,
) -> std::result::Result<(), Refusal> {
    let placed = |(x, estimate): &(f64, Estimate)| Some((*x, scale.of(estimate.mean)?));
    let mut points: Vec<(f64, f64)> = line.points.iter().filter_map(placed).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?;
    let bar = |(x, estimate): &(f64, Estimate)| {
        let error = estimate.standard_error?;
        let at = scale.of(estimate.mean)?;
        // A value below zero has no logarithm; the bar then ends at the point.
        let low = scale.of(estimate.mean - error).unwrap_or(at);
        Some(ErrorBar::new_vertical(
            *x,
            low,
            at,
            scale.of(estimate.mean + error)?,
            color.filled(),
            8,
        ))
    };
    chart.draw_series(line.points.iter().filter_map(bar))?;
    let alone = line.points.iter().filter(|(_, estimate)| estimate.standard_error.is_none());
    let cross = |(x, y)| Cross::new((x, y), 4, color.stroke_width(2));
    chart.draw_series(alone.filter_map(placed).map(cross))?;
    Ok(())
}

fn draw_legend(area: &Area<'_>, panel: &Panel) -> std::result::Result<(), Refusal> {
    let line = |i: usize| i as i32 * LEGEND_LINE as i32 + LEGEND_LINE as i32 / 2;
    let text = |i: usize, name: &str| Text::new(name.to_owned(), (95, line(i) - 6), TEXT);
    for (i, (item, color)) in panel.lines.iter().zip(colors()).enumerate() {
        let stroke = vec![(60, line(i)), (88, line(i))];
        area.draw(&PathElement::new(stroke, color.stroke_width(2)))?;
        area.draw(&text(i, &item.name))?;
    }
    let first = panel.lines.len();
    for (i, (item, dash)) in (first..).zip(panel.levels.iter().zip(dashes())) {
        let mut x = 60;
        while x < 88 {
            let stroke = vec![(x, line(i)), ((x + dash.0 as i32).min(88), line(i))];
            area.draw(&PathElement::new(stroke, GREY))?;
            x += (dash.0 + dash.1) as i32;
        }
        area.draw(&text(i, &item.name))?;
    }
    Ok(())
}

/// The colours in turn, darker after each cycle.
fn colors() -> impl Iterator<Item = RGBColor> {
    let darker = |round: u32| {
        let share = 0.75_f64.powi(round as i32);
        move |RGBColor(r, g, b): RGBColor| {
            let [r, g, b] = [r, g, b].map(|part| (f64::from(part) * share).round() as u8);
            RGBColor(r, g, b)
        }
    };
    (0..).flat_map(move |round| COLORS.map(darker(round)))
}

/// Lengths of a dash and of the gap after it.
fn dashes() -> impl Iterator<Item = (u32, u32)> {
    [(7, 4), (2, 3), (12, 3), (5, 8), (1, 6)].into_iter().cycle()
}

impl Panel {
    /// From the smallest to the largest value drawn, with a margin, on the axis's scale.
    fn y_range(&self) -> (f64, f64) {
        let of_line = |line: &Line| {
            let spread = |(_, e): &(f64, Estimate)| {
                let error = e.standard_error.unwrap_or(0.0);
                [e.mean - error, e.mean, e.mean + error]
            };
            line.points.iter().flat_map(spread).collect::<Vec<_>>()
        };
        let values = self.lines.iter().flat_map(of_line).chain(self.levels.iter().map(|l| l.y));
        let mut placed: Vec<f64> = values.filter_map(|y| self.y_scale.of(y)).collect();
        if self.y_scale == Scale::Linear {
            placed.push(0.0);
        }
        ends(&placed, 0.0)
    }
}

impl Scale {
    /// The position of a value on the axis; none if it has no logarithm or is NaN.
    fn of(self, value: f64) -> Option<f64> {
        let placed = match self {
            Self::Linear => value,
            Self::Log => value.log10(),
        };
        placed.is_finite().then_some(placed)
    }

    /// Round values between two positions on the axis.
    fn marks(self, low: f64, high: f64) -> Vec<f64> {
        match self {
            Self::Linear => {
                let step = round_step((high - low) / 5.0);
                let first = (low / step).ceil() as i64;
                let last = (high / step).floor() as i64;
                (first..=last).map(|i| i as f64 * step).collect()
            }
            Self::Log => {
                let digits: &[f64] = if high - low > 2.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
                let powers = low.floor() as i32..=high.ceil() as i32;
                let of = |power| digits.iter().map(move |digit| digit.log10() + f64::from(power));
                powers.flat_map(of).filter(|mark| (low..=high).contains(mark)).collect()
            }
        }
    }

    fn label(self, place: f64) -> String {
        match self {
            Self::Linear => tidy(place),
            Self::Log => tidy(10.0_f64.powf(place)),
        }
    }
}

/// The smallest 1, 2 or 5 times a power of ten that is not below a value.
pub(crate) fn round_step(least: f64) -> f64 {
    let power = 10.0_f64.powf(least.log10().floor());
    let digit = [1.0, 2.0, 5.0].into_iter().find(|digit| digit * power >= least * (1.0 - 1e-9));
    digit.unwrap_or(10.0) * power
}

/// Without insignificant digits.
fn tidy(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// From the minimum to the maximum, with a margin of a twentieth on each side; at least 1 wide if they are equal.
fn ends(values: &[f64], least_room: f64) -> (f64, f64) {
    let low = values.iter().copied().reduce(f64::min).unwrap_or(0.0);
    let high = values.iter().copied().reduce(f64::max).unwrap_or(1.0);
    let room = if high > low { ((high - low) / 20.0).max(least_room) } else { 0.5 };
    (low - room, high + room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_between_the_ends() {
        let of_line = Scale::Linear.marks(-0.01, 0.42).into_iter().map(tidy);
        assert_eq!(of_line.collect::<Vec<_>>(), ["0", "0.1", "0.2", "0.3", "0.4"]);
        let of_log = Scale::Log.marks(0.1, 1.5).into_iter().map(|mark| Scale::Log.label(mark));
        assert_eq!(of_log.collect::<Vec<_>>(), ["2", "5", "10", "20"]);
        assert_eq!(Scale::Log.marks(-1.5, 3.2).len(), 5);
        assert_eq!([0.25, 100.0, -0.000_01, 0.1 + 0.2].map(tidy), ["0.25", "100", "0", "0.3"]);
    }

    #[test]
    fn values_without_a_logarithm_are_not_plotted() {
        assert_eq!(Scale::Log.of(100.0), Some(2.0));
        assert_eq!([0.0, -1.0, f64::NAN].map(|value| Scale::Log.of(value)), [None; 3]);
        assert_eq!(Scale::Linear.of(f64::INFINITY), None);
    }

    #[test]
    fn ends_leave_room() {
        assert_eq!(ends(&[0.0, 20.0], 0.0), (-1.0, 21.0));
        assert_eq!(ends(&[3.0], 0.0), (2.5, 3.5));
        assert_eq!(ends(&[], 0.0), (-0.05, 1.05));
    }

    #[test]
    fn many_lines_have_many_colors() {
        let first: Vec<RGBColor> = colors().take(20).collect();
        let distinct = |i: usize| first[..i].iter().all(|earlier| *earlier != first[i]);
        // Black stays black.
        assert!((0..20).filter(|i| i % 7 != 6).all(distinct));
    }
}
