use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use crate::folder::{is_image, list};
use crate::layout::EXTENSIONS;
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

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum Texts {
    One(String),
    Several(Vec<String>),
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

/// The prompts in a text file, one per line; blank lines are ignored.
///
/// # Errors
///
/// [`Error::Read`]; [`Error::Captions`] if the file contains no prompt.
pub fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let prompts = lines(&read_text(path)?);
    if prompts.is_empty() {
        let problems = vec!["it contains no prompt".to_owned()];
        return Err(Error::Captions { path: path.to_owned(), problems });
    }
    Ok(prompts)
}

/// Line numbers with the line or its problem.
type Numbered = Vec<(u64, std::result::Result<Line, String>)>;

/// Parses one JSON object per line; blank lines are ignored.
fn parse_lines(text: &str) -> Numbered {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let read =
        |line| serde_json::from_str(line).map_err(|error: serde_json::Error| error.to_string());
    lines.map(|(number, line)| (number, read(line))).collect()
}

/// Parses a table with a header row. A row with line breaks in quotes is numbered by its first line.
fn parse_table(text: &str) -> Numbered {
    let mut table = csv::Reader::from_reader(text.as_bytes());
    let names = match table.headers() {
        Ok(names) => names.clone(),
        Err(error) => return vec![(1, Err(error.to_string()))],
    };
    if let Some(missing) =
        ["file_name", "text"].iter().find(|name| !names.iter().any(|n| n == **name))
    {
        let found = joined(&names);
        return vec![(1, Err(format!("there is no column `{missing}`; the columns are {found}")))];
    }
    let mut rows = Vec::new();
    let mut row = csv::StringRecord::new();
    loop {
        let number = table.position().line();
        let read = match table.read_record(&mut row) {
            Ok(false) => return rows,
            Ok(true) => row.deserialize(Some(&names)),
            Err(error) => Err(error),
        };
        rows.push((number, read.map_err(|error| error.to_string())));
    }
}

/// The first 20 names.
fn joined(names: &csv::StringRecord) -> String {
    const SHOWN: usize = 20;
    let shown = names.iter().take(SHOWN).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The samples of a file and all its problems.
fn captioned(folder: &Path, file: &str, lines: Numbered) -> (Vec<CaptionedImage>, Vec<String>) {
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
    let texts = match text {
        Texts::One(text) => vec![text],
        Texts::Several(texts) => texts,
    };
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

fn lines(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(str::to_owned).collect()
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}
