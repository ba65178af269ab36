use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use ddil_files::listed;
use serde::Deserialize;

use crate::files::{is_image, list};
use crate::layout::EXTENSIONS;
use crate::texts::{Numbered, Table, Texts, lines, parse_lines, read_text};
use crate::{Error, Result};

/// Files that assign captions to images.
const LINES: &str = "metadata.jsonl";
const TABLE: &str = "metadata.csv";

/// An image file with its captions; see [`read_captions`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionedImage {
    /// The path of the file, relative to the folder of the data set.
    pub file_name: PathBuf,
    /// The captions, at least one: alternative phrasings of the same content.
    pub texts: Vec<String>,
}

/// A line of such a file; other keys, as other programs write them, are ignored.
#[derive(Deserialize)]
struct Line {
    file_name: PathBuf,
    text: Texts,
}

/// The captions of the PNG and JPEG files in a folder.
///
/// The format is that of Hugging Face's image folders: `metadata.jsonl` with one line `{"file_name": "0001.png",
/// "text": "a cat"}` per image, where `text` may be a list of phrasings, or `metadata.csv` with the columns `file_name`
/// and `text` and one row per image. Images are returned in the order of the lines. Without such a file, each image
/// needs a `.txt` file of the same name with one phrasing per line; images are sorted by name.
///
/// # Errors
///
/// [`Error::Read`] and [`Error::NoImages`]; [`Error::Captions`] if both files exist, and with every line that cannot be
/// read and every image that is missing, has another format or has no caption.
///
/// # Example
///
/// ```
/// use ddil_data::read_captions;
///
/// let folder = tempfile::tempdir()?;
/// // Only the names of the images are read.
/// std::fs::write(folder.path().join("0.png"), b"")?;
/// std::fs::write(folder.path().join("0.txt"), "a cat\na photo of a cat\n")?;
///
/// let images = read_captions(folder.path())?;
/// assert_eq!(images[0].file_name.to_str(), Some("0.png"));
/// assert_eq!(images[0].texts, ["a cat", "a photo of a cat"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_captions(folder: &Path) -> Result<Vec<CaptionedImage>> {
    let [lines, table] = [LINES, TABLE].map(|name| folder.join(name));
    let (samples, problems) = match (lines.is_file(), table.is_file()) {
        (true, true) => {
            let problem = format!("both {LINES} and {TABLE} exist; keep only one");
            (Vec::new(), vec![problem])
        }
        (true, false) => captioned(folder, LINES, parse_lines(&read_text(&lines)?)),
        (false, true) => captioned(folder, TABLE, parse_table(&read_text(&table)?)),
        (false, false) => from_text_files(folder)?,
    };
    if !problems.is_empty() {
        return Err(Error::Captions { path: folder.to_owned(), problems });
    }
    if samples.is_empty() {
        return Err(Error::NoImages { path: folder.to_owned() });
    }
    Ok(samples)
}

/// Parses a table with a header row.
fn parse_table(text: &str) -> Numbered<Line> {
    let table = match Table::parse(text, b',') {
        Ok(table) => table,
        Err(problem) => return vec![(1, Err(problem))],
    };
    let column = |name| table.names.iter().position(|n| n == name).ok_or(name);
    let (file_name, text) = match (column("file_name"), column("text")) {
        (Ok(file_name), Ok(text)) => (file_name, text),
        (Err(missing), _) | (_, Err(missing)) => {
            let found = listed(&table.names);
            let problem = format!("there is no column `{missing}`; the columns are {found}");
            return vec![(1, Err(problem))];
        }
    };
    let line = |row: csv::StringRecord| Line {
        file_name: PathBuf::from(&row[file_name]),
        text: Texts::One(row[text].to_owned()),
    };
    table.rows.into_iter().map(|(number, row)| (number, row.map(line))).collect()
}

/// The samples of a file and all its problems.
fn captioned(
    folder: &Path,
    file: &str,
    lines: Numbered<Line>,
) -> (Vec<CaptionedImage>, Vec<String>) {
    let (mut samples, mut problems) = (Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for (number, line) in lines {
        match line.and_then(|line| sample(folder, line)) {
            Ok(sample) if !seen.insert(sample.file_name.clone()) => {
                let name = sample.file_name.display();
                problems.push(format!("{file}:{number}: {name} is listed twice"));
            }
            Ok(sample) => samples.push(sample),
            Err(problem) => problems.push(format!("{file}:{number}: {problem}")),
        }
    }
    (samples, problems)
}

fn sample(
    folder: &Path,
    Line { file_name, text }: Line,
) -> std::result::Result<CaptionedImage, String> {
    let name = file_name.display();
    if !file_name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
    {
        return Err(format!("{name} is not inside the folder"));
    }
    if !is_image(&folder.join(&file_name)) {
        return Err(format!("{name} does not exist or does not end in {EXTENSIONS}"));
    }
    let texts = Vec::from(text);
    if texts.is_empty() {
        return Err(format!("{name} has an empty list of captions"));
    }
    Ok(CaptionedImage { file_name, texts })
}

fn from_text_files(folder: &Path) -> Result<(Vec<CaptionedImage>, Vec<String>)> {
    let (mut samples, mut problems) = (Vec::new(), Vec::new());
    for path in list(folder)?.into_iter().filter(|path| is_image(path)) {
        let text_file = path.with_extension("txt");
        let file_name = PathBuf::from(path.file_name().unwrap_or_default());
        if !text_file.is_file() {
            let name = file_name.display();
            problems.push(format!(
                "{name} has no caption: neither a .txt file of the same name nor a line in {LINES} or {TABLE}"
            ));
            continue;
        }
        let texts = lines(&read_text(&text_file)?);
        if texts.is_empty() {
            problems.push(format!("{} contains no caption", text_file.display()));
        }
        samples.push(CaptionedImage { file_name, texts });
    }
    Ok((samples, problems))
}
