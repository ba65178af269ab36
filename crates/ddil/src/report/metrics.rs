//! The figures of a run, as columns.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use ddil_files::open_regular_file;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The lines of a record such as `metrics.jsonl`, as columns.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Metrics {
    /// The step of each line, increasing.
    pub(crate) steps: Vec<u64>,
    /// A value per line; none where the line has no such figure, NaN where it was NaN or infinite.
    pub(crate) columns: BTreeMap<String, Vec<Option<f64>>>,
    /// Numbers of the complete lines that could not be read, counted from 1.
    pub(crate) damaged: Vec<usize>,
}

/// The values of one figure that are present, in order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Figure<'a> {
    /// Its name in the record.
    pub(crate) name: &'a str,
    /// Steps and values; NaN where the value was NaN or infinite.
    pub(crate) values: Vec<(u64, f64)>,
}

impl Metrics {
    /// Reads a record; a missing file is empty.
    ///
    /// The last line may be incomplete, because the run is writing it; it is left out. Other lines that are no records
    /// are noted in [`damaged`](Self::damaged).
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut metrics = Self::default();
        let file = match open_regular_file(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(metrics),
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        let (mut reader, mut line) = (BufReader::new(file), Vec::new());
        for number in 1.. {
            line.clear();
            reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
            if !line.ends_with(b"\n") {
                break;
            }
            if metrics.add(&line).is_none() {
                metrics.damaged.push(number);
            }
        }
        Ok(metrics)
    }

    /// Adds a line; none if it is no record of a later step.
    fn add(&mut self, line: &[u8]) -> Option<()> {
        let mut values: Map<String, Value> = serde_json::from_slice(line).ok()?;
        let step = values.remove("step")?.as_u64()?;
        if self.steps.last().is_some_and(|last| step <= *last) {
            return None;
        }
        let index = self.steps.len();
        self.steps.push(step);
        for (name, value) in values {
            // JSON has no NaN and no infinity: they are written as null.
            let value = if value.is_null() { Some(f64::NAN) } else { value.as_f64() };
            let column = self.columns.entry(name).or_default();
            column.resize(index, None);
            column.push(value);
        }
        for column in self.columns.values_mut() {
            column.resize(index + 1, None);
        }
        Some(())
    }

    /// All figures with at least one value: those of whole networks first, then by name.
    pub(crate) fn figures(&self) -> Vec<Figure<'_>> {
        let mut all: Vec<Figure<'_>> = Vec::new();
        for (name, column) in &self.columns {
            let present = self.steps.iter().zip(column);
            let values: Vec<_> = present.filter_map(|(s, v)| Some((*s, (*v)?))).collect();
            if !values.is_empty() {
                all.push(Figure { name, values });
            }
        }
        all.sort_by_key(|figure| (rank(figure.name), evaluation_rank(figure.name)));
        all
    }
}

/// The order of figures: losses, gradients, evaluations, then the others, and clipped shares last.
fn rank(name: &str) -> usize {
    const ORDER: [&str; 5] = ["loss", "grad_norm", "learning_rate", "eval_", "share_"];
    if name.starts_with("clipped_") {
        return ORDER.len() + 1;
    }
    ORDER.iter().position(|start| name.starts_with(start)).unwrap_or(ORDER.len())
}

/// The order of evaluations: distances, which decide, before the others.
pub(super) fn evaluation_rank(name: &str) -> usize {
    const FIRST: [&str; 2] = ["eval_frechet", "eval_kid"];
    FIRST.iter().position(|first| *first == name).unwrap_or(FIRST.len())
}

impl Figure<'_> {
    /// The last value and its step.
    pub(crate) fn last(&self) -> Option<(u64, f64)> {
        self.values.last().copied()
    }

    /// The smallest and the largest finite value, each with the first step that has it.
    pub(crate) fn extremes(&self) -> Option<[(u64, f64); 2]> {
        let mut finite = self.values.iter().copied().filter(|(_, value)| value.is_finite());
        let first = finite.next()?;
        Some(finite.fold([first, first], |[low, high], next| {
            let is_low = next.1 < low.1;
            let is_high = next.1 > high.1;
            [if is_low { next } else { low }, if is_high { next } else { high }]
        }))
    }
}

/// A number for a reader: four significant digits, without insignificant zeros.
pub(crate) fn shown(value: f64) -> String {
    if !value.is_finite() {
        return "NaN or infinite".to_owned();
    }
    let text = if value != 0.0 && !(1e-3..1e6).contains(&value.abs()) {
        format!("{value:.3e}")
    } else {
        let digits = 3 - value.abs().max(1e-3).log10().floor() as i32;
        format!("{value:.*}", digits.clamp(0, 6) as usize)
    };
    let (digits, exponent) =
        text.split_once('e').map_or((text.as_str(), None), |(d, e)| (d, Some(e)));
    let digits = if digits.contains('.') {
        digits.trim_end_matches('0').trim_end_matches('.')
    } else {
        digits
    };
    let digits = if digits == "-0" { "0" } else { digits };
    exponent.map_or(digits.to_owned(), |exponent| format!("{digits}e{exponent}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(text: &str) -> Metrics {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, text).expect("it is writable");
        Metrics::read(&path).expect("it is readable")
    }

    #[test]
    fn columns_have_a_value_per_line() {
        let found = read("{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":null,\"grad_norm\":3}\n");
        assert_eq!(found.steps, [1, 2]);
        assert_eq!(found.columns["grad_norm"], [None, Some(3.0)]);
        let loss = &found.columns["loss"];
        assert_eq!(loss[0], Some(0.5));
        assert!(loss[1].is_some_and(f64::is_nan));
        assert!(found.damaged.is_empty());
        let figures = found.figures();
        let names: Vec<&str> = figures.iter().map(|figure| figure.name).collect();
        assert_eq!(names, ["loss", "grad_norm"]);
        assert_eq!(figures[0].extremes(), Some([(1, 0.5); 2]));
    }

    #[test]
    fn a_line_that_is_being_written_is_left_out() {
        let found = read("{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"lo");
        assert_eq!((found.steps, found.damaged), (vec![1], vec![]));
    }

    #[test]
    fn damaged_lines_are_counted_and_skipped() {
        let found = read("{\"step\":1}\nnonsense\n[1]\n{\"step\":1}\n{\"loss\":1}\n{\"step\":3}\n");
        assert_eq!((found.steps, found.damaged), (vec![1, 3], vec![2, 3, 4, 5]));
    }

    #[test]
    fn a_missing_file_is_empty_and_a_folder_is_an_error() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert!(
            Metrics::read(&folder.path().join("none")).expect("it is no error").steps.is_empty()
        );
        assert!(Metrics::read(folder.path()).is_err());
    }

    #[test]
    fn numbers_have_four_significant_digits() {
        let of = [0.0, 0.033_805, 12.0, 1234.56, 7.142_857e-7, -0.5, 2.5e7, 0.001].map(shown);
        assert_eq!(of, ["0", "0.03381", "12", "1235", "7.143e-7", "-0.5", "2.5e7", "0.001"]);
        assert_eq!(shown(f64::INFINITY), "NaN or infinite");
    }
}
