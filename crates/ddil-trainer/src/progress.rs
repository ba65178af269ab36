//! Progress of a run: a bar on a terminal, and periodic log lines elsewhere.

use std::{
    fmt::Write,
    io::IsTerminal,
    sync::OnceLock,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Target of progress lines in the log; a terminal, which shows the bar, can leave them out.
pub(crate) const TARGET: &str = "ddil::progress";

/// Minimum time between two lines in the log.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Minimum time between two updates of the bar.
const BAR_INTERVAL: Duration = Duration::from_millis(100);
/// Weight of the last step in the smoothed speed.
const NEWEST_SHARE: f64 = 0.05;

/// The screen, shared by the bar and log messages so that their lines do not mix.
#[derive(Clone, Debug)]
pub(crate) struct Screen {
    bars: MultiProgress,
    is_terminal: bool,
}

impl Screen {
    /// The standard error stream; one per program.
    pub(crate) fn stderr() -> &'static Self {
        static SCREEN: OnceLock<Screen> = OnceLock::new();
        SCREEN.get_or_init(|| Self {
            bars: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
            is_terminal: std::io::stderr().is_terminal(),
        })
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Runs a function that writes to the screen while the bar is hidden.
    pub(crate) fn suspend<T>(&self, write: impl FnOnce() -> T) -> T {
        if self.is_terminal { self.bars.suspend(write) } else { write() }
    }
}

/// Shows the progress of a run.
///
/// On a terminal (standard error), as a bar. In any case as lines in the log: at the first step, the last, and every
/// ten seconds in between.
///
/// # Example
///
/// ```
/// use ddil_trainer::Progress;
///
/// let mut progress = Progress::new("train", 0, 100);
/// for step in 1..=100 {
///     progress.update(step, &[("loss".to_owned(), 1.0 / step as f64)]);
/// }
/// progress.finish();
/// ```
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    label: String,
    num_steps: u64,
    rate: Rate,
    last_line: Option<Instant>,
    last_drawn: Option<Instant>,
}

impl Progress {
    /// Starts after step `step`, 0 for a new run; `label` names the activity.
    pub fn new(label: &str, first_step: u64, num_steps: u64) -> Self {
        let screen = Screen::stderr();
        let bar = screen.is_terminal.then(|| {
            let bar = screen.bars.add(ProgressBar::new(num_steps));
            bar.set_style(style());
            bar.set_prefix(label.to_owned());
            bar.set_position(first_step);
            bar
        });
        let rate = Rate::start(first_step, Instant::now());
        let label = label.to_owned();
        Self { bar, label, num_steps, rate, last_line: None, last_drawn: None }
    }

    /// Records that a step is done. The figures are shown in the given order.
    pub fn update(&mut self, step: u64, figures: &[(String, f64)]) {
        let now = Instant::now();
        self.rate.note(step, now);
        let is_due =
            |last: Option<Instant>, interval| last.is_none_or(|last| now - last >= interval);
        let line_is_due = step >= self.num_steps || is_due(self.last_line, LINE_INTERVAL);
        let bar_is_due = self.bar.is_some() && is_due(self.last_drawn, BAR_INTERVAL);
        if !(line_is_due || bar_is_due) {
            return;
        }
        let steps_left = self.num_steps.saturating_sub(step);
        let text = describe(self.rate.steps_per_second, steps_left, figures);
        if line_is_due {
            self.last_line = Some(now);
            tracing::info!(target: TARGET, "{} {step}/{}  {text}", self.label, self.num_steps);
        }
        if let Some(bar) = &self.bar {
            self.last_drawn = Some(now);
            bar.set_position(step);
            bar.set_message(text);
        }
    }

    /// Shows an activity between two steps on the bar, such as writing a checkpoint; the next [`update`](Self::update)
    /// replaces it.
    pub(crate) fn set_activity(&mut self, what: &'static str) {
        if let Some(bar) = &self.bar {
            // Drawn at once: the work that follows may take minutes, and the next step has to be drawn too.
            bar.set_message(what);
            bar.force_draw();
            self.last_drawn = None;
        }
    }

    /// Removes the bar from the screen.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Leaves the bar on the screen in its last state; so does dropping.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn style() -> ProgressStyle {
    // A wide message is truncated to the terminal's width: a line that wraps could not be redrawn.
    ProgressStyle::with_template("{prefix} {bar:16} {pos}/{len}  {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Steps per second, smoothed.
#[derive(Debug)]
struct Rate {
    step: u64,
    at: Instant,
    steps_per_second: Option<f64>,
}

impl Rate {
    fn start(step: u64, at: Instant) -> Self {
        Self { step, at, steps_per_second: None }
    }

    fn note(&mut self, step: u64, now: Instant) {
        let seconds = (now - self.at).as_secs_f64();
        if step <= self.step || seconds <= 0.0 {
            return;
        }
        let newest = (step - self.step) as f64 / seconds;
        self.steps_per_second = Some(match self.steps_per_second {
            // Seconds per step are averaged, not steps per second, so that the estimate of the time left is unbiased.
            Some(rate) => 1.0 / ((1.0 - NEWEST_SHARE) / rate + NEWEST_SHARE / newest),
            None => newest,
        });
        (self.step, self.at) = (step, now);
    }
}

fn describe(rate: Option<f64>, steps_left: u64, figures: &[(String, f64)]) -> String {
    let mut text = String::new();
    if let Some(rate) = rate {
        let left = duration(steps_left as f64 / rate);
        // Writing to a string cannot fail.
        let _ = match rate {
            0.1.. => write!(text, "{rate:.1} it/s  {left} left"),
            _ => write!(text, "{:.0} s/it  {left} left", 1.0 / rate),
        };
    }
    // Too many to read in passing; the record contains them.
    let of_many = ["clipped_", "conditioned_class_"];
    let is_shown = |name: &str| !of_many.iter().any(|prefix| name.starts_with(prefix));
    let shown = figures.iter().filter(|(name, _)| is_shown(name));
    for (name, value) in shown {
        let separator = if text.is_empty() { "" } else { "  " };
        let _ = write!(text, "{separator}{name} {}", number(*value));
    }
    text
}

/// Four decimals; scientific notation for very small and very large numbers.
fn number(value: f64) -> String {
    if value != 0.0 && value.is_finite() && !(1e-3..1e6).contains(&value.abs()) {
        format!("{value:.2e}")
    } else {
        format!("{value:.4}")
    }
}

/// `42s`, `3m05s`, `2h07m`, `1d03h`.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    let two =
        |large: u64, unit: char, small: u64, rest: char| format!("{large}{unit}{small:02}{rest}");
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => two(seconds / 60, 'm', seconds % 60, 's'),
        3600..86400 => two(seconds / 3600, 'h', seconds / 60 % 60, 'm'),
        _ => two(seconds / 86400, 'd', seconds / 3600 % 24, 'h'),
    }
}

#[cfg(test)]
mod tests {
    use indicatif::{InMemoryTerm, TermLike};

    use super::*;

    /// A bar on a terminal with `columns` columns, and its terminal.
    fn on_a_terminal(columns: u16) -> (InMemoryTerm, ProgressBar) {
        let terminal = InMemoryTerm::new(10, columns);
        let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
        let bar = ProgressBar::with_draw_target(Some(2000), target);
        bar.set_style(style());
        bar.set_prefix("distill");
        (terminal, bar)
    }

    #[test]
    fn a_bar_stays_on_one_line_however_narrow_the_terminal() {
        let figures = ["loss", "grad_norm", "learning_rate", "loss_forward", "loss_student"];
        let figures = figures.map(|name| (name.to_owned(), 0.123_456));
        for columns in [60, 80, 110] {
            let (terminal, bar) = on_a_terminal(columns);
            for step in [1, 700, 2000] {
                bar.set_position(step);
                bar.set_message(describe(Some(12.34), 24680, &figures));
                bar.force_draw();
                let shown = terminal.contents();
                assert_eq!(shown.lines().count(), 1, "{columns}: {shown}");
                assert!(shown.chars().count() <= columns.into(), "{columns}: {shown}");
                assert!(shown.contains("33m20s left"), "{columns}: {shown}");
            }
            assert_eq!(terminal.width(), columns);
        }
    }

    #[test]
    fn lines_are_tidy() {
        let figures = [("loss", 0.123_456), ("lr", 1e-4), ("grad_norm", 12.0), ("zero", 0.0)];
        let figures = figures.map(|(name, value)| (name.to_owned(), value));
        assert_eq!(
            describe(Some(12.34), 24680, &figures),
            "12.3 it/s  33m20s left  loss 0.1235  lr 1.00e-4  grad_norm 12.0000  zero 0.0000"
        );
        assert_eq!(describe(Some(0.02), 10, &[]), "50 s/it  8m20s left");
        assert_eq!(describe(None, 10, &[("loss".to_owned(), f64::NAN)]), "loss NaN");
    }

    #[test]
    fn durations_have_two_parts() {
        let shown = [0.4, 59.0, 60.0, 3599.0, 7_620.0, 97_200.0].map(duration);
        assert_eq!(shown, ["0s", "59s", "1m00s", "59m59s", "2h07m", "1d03h"]);
    }

    #[test]
    fn the_rate_settles_at_the_speed_and_starts_where_the_run_does() {
        let start = Instant::now();
        let mut rate = Rate::start(1000, start);
        assert_eq!(rate.steps_per_second, None);
        for step in 1..=200 {
            rate.note(1000 + step, start + Duration::from_millis(250 * step));
        }
        let settled = rate.steps_per_second.expect("steps were noted");
        assert!((settled - 4.0).abs() < 1e-9, "{settled}");
    }
}
