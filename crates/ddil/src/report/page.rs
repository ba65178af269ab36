//! From data to a page: one file that needs no network.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ddil_files::{open_regular_file, write_atomic};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, Value, context};
use serde::Serialize;
use time::OffsetDateTime;

use crate::error::{Error, Result};

/// How every report begins. A file that begins otherwise was not written here, and is not replaced.
const MARK: &str =
    "<!doctype html>\n<!-- Written by `ddil report`; a later call replaces this file. -->\n";

const TEMPLATES: [(&str, &str); 4] = [
    ("page.html", include_str!("assets/page.html")),
    ("parts.html", include_str!("assets/parts.html")),
    ("run.html", include_str!("assets/run.html")),
    ("comparison.html", include_str!("assets/comparison.html")),
];

const STYLES: [&str; 2] = [include_str!("assets/uplot.min.css"), include_str!("assets/report.css")];

/// Libraries with the notices that their licences require, then what connects them with the page.
const SCRIPTS: [&str; 4] = [
    concat!(
        "/*\n",
        include_str!("assets/uplot.LICENSE"),
        "*/\n",
        include_str!("assets/uplot.min.js")
    ),
    concat!(
        "/* sortable-tablesort 4.1.7, in the public domain (The Unlicense) */\n",
        include_str!("assets/sortable.min.js")
    ),
    include_str!("assets/sortable.a11y.min.js"),
    include_str!("assets/report.js"),
];

/// Renders a template as a page and writes it in one step, over a file that [`ensure_replaceable`] has checked.
///
/// # Errors
///
/// [`Error::Report`] if the template fails; errors of the file system.
pub(super) fn write(path: &Path, template: &str, page: &impl Serialize) -> Result<()> {
    let html = render(template, page)
        .map_err(|error| Error::Report { path: path.to_owned(), reason: format!("{error:#}") })?;
    Ok(write_atomic(path, html.as_bytes())?)
}

/// Checks that nothing but an earlier report is in the way.
///
/// # Errors
///
/// [`Error::Report`] for another file; errors of the file system.
pub(super) fn ensure_replaceable(path: &Path) -> Result<()> {
    let extension = path.extension().and_then(|end| end.to_str()).unwrap_or_default();
    if !["html", "htm"].iter().any(|known| extension.eq_ignore_ascii_case(known)) && !path.exists()
    {
        let reason = "a report is HTML; choose a name that ends in .html".to_owned();
        return Err(Error::Report { path: path.to_owned(), reason });
    }
    let file = match open_regular_file(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("replace", path)(error)),
    };
    let mut start = Vec::new();
    file.take(MARK.len() as u64).read_to_end(&mut start).map_err(Error::io("read", path))?;
    if start == MARK.as_bytes() {
        return Ok(());
    }
    let reason = "the file exists and is not a report of ddil, so it is not replaced; move it away, or choose another \
                  file with --output";
    Err(Error::Report { path: path.to_owned(), reason: reason.to_owned() })
}

fn render(template: &str, page: &impl Serialize) -> std::result::Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    for (name, text) in TEMPLATES {
        environment.add_template(name, text)?;
    }
    let (styles, scripts) = (STYLES.join("\n"), SCRIPTS.map(str::trim_end));
    let html = environment.get_template(template)?.render(context! {
        page => Value::from(Serde(page)),
        styles,
        scripts,
        written => Value::from(Serde(Moment::now())),
        version => env!("CARGO_PKG_VERSION"),
    })?;
    Ok(MARK.to_owned() + &html)
}

/// A point in time, for a reader and for a program.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Moment {
    /// As `2026-11-30 18:05 UTC`.
    pub(crate) shown: String,
    /// As `2026-11-30T18:05:09Z`.
    pub(crate) iso: String,
}

impl Moment {
    /// The present.
    pub(crate) fn now() -> Self {
        Self::of(SystemTime::now())
    }

    /// A time of the system.
    pub(crate) fn of(time: SystemTime) -> Self {
        let at = OffsetDateTime::from(time);
        let date = format!("{:04}-{:02}-{:02}", at.year(), u8::from(at.month()), at.day());
        let (hour, minute, second) = (at.hour(), at.minute(), at.second());
        Self {
            shown: format!("{date} {hour:02}:{minute:02} UTC"),
            iso: format!("{date}T{hour:02}:{minute:02}:{second:02}Z"),
        }
    }

    /// When a file was last written, if the system knows.
    pub(crate) fn of_file(path: &Path) -> Option<Self> {
        fs::metadata(path).and_then(|found| found.modified()).ok().map(Self::of)
    }
}

/// The content of a PNG file as an address, for the `src` of an image.
pub(crate) fn png_address(png: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(png))
}

/// A size for a reader, as `3.2 MB`; 1 MB is a million bytes.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 || value >= 9.95 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A duration for a reader, as `42 s`, `3 min 5 s`, `2 h 7 min`, `1 d 3 h`.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = if seconds.is_finite() { seconds.max(0.0).round() as u64 } else { 0 };
    let two = |large: u64, unit: &str, small: u64, rest: &str| {
        if small == 0 {
            format!("{large} {unit}")
        } else {
            format!("{large} {unit} {small} {rest}")
        }
    };
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86400 => two(seconds / 3600, "h", seconds / 60 % 60, "min"),
        _ => two(seconds / 86400, "d", seconds / 3600 % 24, "h"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn sizes_and_durations_are_short() {
        let sizes = [0, 999, 1000, 12_345, 999_999, 3_200_000_000].map(size);
        assert_eq!(sizes, ["0 B", "999 B", "1.0 kB", "12 kB", "1.0 MB", "3.2 GB"]);
        let durations = [0.4, 185.0, 7620.0, 97_200.0, f64::NAN, 120.0].map(duration);
        assert_eq!(durations, ["0 s", "3 min 5 s", "2 h 7 min", "1 d 3 h", "0 s", "2 min"]);
    }

    #[test]
    fn moments_are_in_utc() {
        let of = |seconds| Moment::of(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(of(951_827_696).iso, "2000-02-29T12:34:56Z");
        assert_eq!(of(951_827_696).shown, "2000-02-29 12:34 UTC");
    }

    #[test]
    fn only_reports_are_replaced() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("report.html");
        ensure_replaceable(&path).expect("there is nothing");
        fs::write(&path, format!("{MARK}<html>")).expect("it is writable");
        ensure_replaceable(&path).expect("it is a report");
        for other in ["", "<!doctype html>\n<html>my notes</html>"] {
            fs::write(&path, other).expect("it is writable");
            let error = ensure_replaceable(&path).expect_err("it is another file");
            assert!(error.to_string().contains("--output"), "{error}");
        }
        assert!(ensure_replaceable(folder.path()).is_err());
    }
}
