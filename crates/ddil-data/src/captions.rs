use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use crate::folder::{is_picture, list};
use crate::layout::ENDINGS;
use crate::{Error, Result};

/// The files that may say which picture has which captions.
const LINES: &str = "metadata.jsonl";
const TABLE: &str = "metadata.csv";

/// A picture and what may be said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captioned {
    /// The file, from the data set's folder.
    pub file_name: PathBuf,
    /// Phrasings of the caption, at least one.
    pub texts: Vec<String>,
}

/// A line of such a file; more keys may stand there, as other programs have them.
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

/// The PNG and JPEG files of a folder with their captions.
///
/// As the image folders of Hugging Face have them: a line `{"file_name": "0001.png", "text": "a cat"}` a picture in
/// `metadata.jsonl`, in the order of the lines, where `text` may be a list of phrasings; or a row a picture in
/// `metadata.csv`, which has columns `file_name` and `text`. Without such a file, a `.txt` beside each picture with one
/// phrasing a line, in the order of the names.
///
/// # Errors
///
/// [`Error::Read`] and [`Error::NoPictures`]; [`Error::Captions`] with every line that cannot be read and every picture
/// that is not there, is of another format or has no caption, and if both files are there.
pub fn read_captions(folder: &Path) -> Result<Vec<Captioned>> {
    let [lines, table] = [LINES, TABLE].map(|name| folder.join(name));
    let (samples, problems) = match (lines.is_file(), table.is_file()) {
        (true, true) => {
            let problem = format!("both {LINES} and {TABLE} are there; keep the one that counts");
            (Vec::new(), vec![problem])
        }
        (true, false) => captioned(folder, LINES, of_lines(&read_text(&lines)?)),
        (false, true) => captioned(folder, TABLE, of_table(&read_text(&table)?)),
        (false, false) => from_text_files(folder)?,
    };
    if !problems.is_empty() {
        return Err(Error::Captions { path: folder.to_owned(), problems });
    }
    if samples.is_empty() {
        return Err(Error::NoPictures { path: folder.to_owned() });
    }
    Ok(samples)
}

/// Prompts in a text file, one a line; lines of white space are passed over.
///
/// # Errors
///
/// [`Error::Read`]; [`Error::Captions`] if there is no prompt.
pub fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let prompts = lines(&read_text(path)?);
    if prompts.is_empty() {
        let problems = vec!["no line of it has a prompt".to_owned()];
        return Err(Error::Captions { path: path.to_owned(), problems });
    }
    Ok(prompts)
}

/// Lines by their numbers, or what is wrong with them.
type Numbered = Vec<(u64, std::result::Result<Line, String>)>;

/// A JSON object a line; lines of white space are passed over.
fn of_lines(text: &str) -> Numbered {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let read =
        |line| serde_json::from_str(line).map_err(|error: serde_json::Error| error.to_string());
    lines.map(|(number, line)| (number, read(line))).collect()
}

/// A table with a row of names; a row may have line breaks within quotes, and is known by its first line.
fn of_table(text: &str) -> Numbered {
    let mut table = csv::Reader::from_reader(text.as_bytes());
    let names = match table.headers() {
        Ok(names) => names.clone(),
        Err(error) => return vec![(1, Err(error.to_string()))],
    };
    if let Some(missing) =
        ["file_name", "text"].iter().find(|name| !names.iter().any(|n| n == **name))
    {
        let found = first_of(&names);
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

/// The first of many names.
fn first_of(names: &csv::StringRecord) -> String {
    const SHOWN: usize = 20;
    let shown = names.iter().take(SHOWN).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The samples of a file and all that is wrong with it.
fn captioned(folder: &Path, file: &str, lines: Numbered) -> (Vec<Captioned>, Vec<String>) {
    let (mut samples, mut problems) = (Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for (number, line) in lines {
        match line.and_then(|line| sample(folder, line)) {
            Ok(sample) if !seen.insert(sample.file_name.clone()) => {
                let name = sample.file_name.display();
                problems.push(format!("{file}:{number}: {name} has a line already"));
            }
            Ok(sample) => samples.push(sample),
            Err(problem) => problems.push(format!("{file}:{number}: {problem}")),
        }
    }
    (samples, problems)
}

fn sample(folder: &Path, Line { file_name, text }: Line) -> std::result::Result<Captioned, String> {
    let name = file_name.display();
    if !file_name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
    {
        return Err(format!("{name} is not below the folder"));
    }
    if !is_picture(&folder.join(&file_name)) {
        return Err(format!("{name} is no file ending in {ENDINGS}"));
    }
    let texts = match text {
        Texts::One(text) => vec![text],
        Texts::Several(texts) => texts,
    };
    if texts.is_empty() {
        return Err(format!("{name} has an empty list of captions"));
    }
    Ok(Captioned { file_name, texts })
}

fn from_text_files(folder: &Path) -> Result<(Vec<Captioned>, Vec<String>)> {
    let (mut samples, mut problems) = (Vec::new(), Vec::new());
    for path in list(folder)?.into_iter().filter(|path| is_picture(path)) {
        let beside = path.with_extension("txt");
        let file_name = PathBuf::from(path.file_name().unwrap_or_default());
        if !beside.is_file() {
            let name = file_name.display();
            problems.push(format!(
                "{name} has neither a .txt beside it nor a line in {LINES} or {TABLE}"
            ));
            continue;
        }
        let texts = lines(&read_text(&beside)?);
        if texts.is_empty() {
            problems.push(format!("{} has no caption in it", beside.display()));
        }
        samples.push(Captioned { file_name, texts });
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
