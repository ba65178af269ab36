//! Figures on a terminal.

use crate::report::metrics::Figure;

/// The characters of a sparkline, from low to high.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Levels(&'static [char]);

const BLOCKS: Levels = Levels(&['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█']);
/// For terminals that show ASCII only.
const ASCII: Levels = Levels(&['_', '.', '-', '=', '+', '*', '#', '@']);

impl Levels {
    /// Those that the locale of the environment can show.
    pub(super) fn of_locale() -> Self {
        let set = |name: &&str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self::of(["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(set).as_deref())
    }

    /// The first of the variables that is set decides; without one the locale is C.
    fn of(locale: Option<&str>) -> Self {
        let encoding =
            locale.and_then(|locale| locale.split_once('.')).map_or("", |(_, rest)| rest);
        let encoding: String = encoding.split('@').next().unwrap_or("").to_lowercase();
        if matches!(encoding.as_str(), "utf-8" | "utf8") { BLOCKS } else { ASCII }
    }

    /// A figure over its steps in at most `width` characters, each the mean of a part; NaN and infinity are `!`.
    pub(super) fn sparkline(self, figure: &Figure<'_>, width: usize) -> String {
        let Some([(_, low), (_, high)]) = figure.extremes() else {
            return "!".repeat(figure.values.len().min(width));
        };
        let size = figure.values.len().div_ceil(width).max(1);
        let level = |part: &[(u64, f64)]| {
            let mean = part.iter().map(|(_, value)| value).sum::<f64>() / part.len() as f64;
            if !mean.is_finite() {
                return '!';
            }
            let share = if high > low { (mean - low) / (high - low) } else { 0.0 };
            let last = self.0.len() - 1;
            self.0[((share * self.0.len() as f64) as usize).min(last)]
        };
        figure.values.chunks(size).map(level).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(values: &[f64]) -> Figure<'static> {
        Figure { name: "loss", values: (1..).zip(values.iter().copied()).collect() }
    }

    #[test]
    fn the_locale_decides_on_the_characters() {
        for locale in ["de_DE.UTF-8", "en_US.utf8", "C.UTF-8", "sr_RS.UTF-8@latin"] {
            assert_eq!(Levels::of(Some(locale)), BLOCKS, "{locale}");
        }
        for locale in [None, Some("C"), Some("POSIX"), Some("de_DE.ISO-8859-1"), Some("UTF-8")] {
            assert_eq!(Levels::of(locale), ASCII, "{locale:?}");
        }
    }

    #[test]
    fn a_sparkline_goes_from_low_to_high() {
        let rising: Vec<f64> = (0..8).map(f64::from).collect();
        assert_eq!(BLOCKS.sparkline(&figure(&rising), 8), "▁▂▃▄▅▆▇█");
        assert_eq!(ASCII.sparkline(&figure(&rising), 4), "_-*@");
        assert_eq!(ASCII.sparkline(&figure(&[2.0; 3]), 8), "___");
        assert_eq!(ASCII.sparkline(&figure(&[1.0, f64::NAN, 2.0]), 8), "_!@");
        assert_eq!(ASCII.sparkline(&figure(&[f64::INFINITY]), 8), "!");
    }
}
