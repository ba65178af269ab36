//! Text files of captions and prompts.

use std::{fs, path::Path};

use serde::Deserialize;

use crate::{Error, Result};

/// One text, or alternative phrasings of the same content.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub(crate) enum Texts {
    One(String),
    Several(Vec<String>),
}

impl From<Texts> for Vec<String> {
    fn from(texts: Texts) -> Self {
        match texts {
            Texts::One(text) => vec![text],
            Texts::Several(texts) => texts,
        }
    }
}

/// The content of a file of UTF-8 text, without a byte order mark.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path);
    let mut text = text.map_err(|source| Error::Read { path: path.to_owned(), source })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// The lines that are not blank, without the spaces around them.
pub(crate) fn lines(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(str::to_owned).collect()
}

/// A line or row with its number and its content or problem.
pub(crate) type Numbered<T> = Vec<(u64, std::result::Result<T, String>)>;

/// One JSON object per line; blank lines are ignored.
pub(crate) fn parse_lines<T: serde::de::DeserializeOwned>(text: &str) -> Numbered<T> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let read =
        |line: &str| ddil_files::parse_json(line.as_bytes()).map_err(|error| error.to_string());
    lines.map(|(number, line)| (number, read(line))).collect()
}

/// A table with a row of names.
pub(crate) struct Table {
    /// The names of the columns.
    pub(crate) names: csv::StringRecord,
    /// The rows, each as long as the names. A row with line breaks in quotes is numbered by its first line.
    pub(crate) rows: Numbered<csv::StringRecord>,
}

impl Table {
    /// Parses a table; the error is that of the first row.
    pub(crate) fn parse(text: &str, delimiter: u8) -> std::result::Result<Self, String> {
        let mut table = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(text.as_bytes());
        let names = table.headers().map_err(|error| error.to_string())?.clone();
        let mut rows = Vec::new();
        loop {
            let number = table.position().line();
            let mut row = csv::StringRecord::new();
            let read = match table.read_record(&mut row) {
                Ok(false) => return Ok(Self { names, rows }),
                Ok(true) => Ok(row),
                Err(error) => Err(error.to_string()),
            };
            rows.push((number, read));
        }
    }

    /// The first column with one of these names, in any case; the names come in order of preference.
    pub(crate) fn column(&self, names: &[&str]) -> Option<usize> {
        let of_name =
            |name: &&str| self.names.iter().position(|n| n.trim().eq_ignore_ascii_case(name));
        names.iter().find_map(of_name)
    }
}
