use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use super::folder::{is_picture, list};
use super::{Error, Result};

/// The file that says which picture has which captions.
const METADATA: &str = "metadata.jsonl";

/// A picture and what may be said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captioned {
    /// The file, from the data set's folder.
    pub file_name: PathBuf,
    /// Phrasings of the caption, at least one.
    pub texts: Vec<String>,
}

/// A line of the file; more keys may stand there, as other programs have them.
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

/// The PNG files of a folder with their captions.
///
/// As the image folders of Hugging Face have them: a line `{"file_name": "0001.png", "text": "a cat"}` a picture in
/// `metadata.jsonl`, in the order of the lines; `text` may be a list of phrasings. Without that file, a `.txt` beside
/// each picture with one phrasing a line, in the order of the names.
///
/// # Errors
///
/// [`Error::Read`] and [`Error::NoPictures`]; [`Error::Captions`] with every line that cannot be read and every picture
/// that is not there, is no `.png` or has no caption.
pub fn read_captions(folder: &Path) -> Result<Vec<Captioned>> {
    let metadata = folder.join(METADATA);
    let (samples, problems) = if metadata.is_file() {
        from_lines(folder, &read_text(&metadata)?)
    } else {
        from_text_files(folder)?
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

fn from_lines(folder: &Path, text: &str) -> (Vec<Captioned>, Vec<String>) {
    let (mut samples, mut problems) = (Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let read = serde_json::from_str(line).map_err(|error| error.to_string());
        match read.and_then(|line| captioned(folder, line)) {
            Ok(sample) if !seen.insert(sample.file_name.clone()) => {
                let name = sample.file_name.display();
                problems.push(format!("{METADATA}:{number}: {name} has a line already"));
            }
            Ok(sample) => samples.push(sample),
            Err(problem) => problems.push(format!("{METADATA}:{number}: {problem}")),
        }
    }
    (samples, problems)
}

fn captioned(
    folder: &Path,
    Line { file_name, text }: Line,
) -> std::result::Result<Captioned, String> {
    let name = file_name.display();
    if !file_name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
    {
        return Err(format!("{name} is not below the folder"));
    }
    if !is_picture(&folder.join(&file_name)) {
        return Err(format!("{name} is no file ending in .png"));
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
            problems.push(format!("{name} has neither a .txt beside it nor a line in {METADATA}"));
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
