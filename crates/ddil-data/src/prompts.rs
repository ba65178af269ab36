//! Files of prompts, in every form in which these are published.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ddil_files::listed;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::texts::{Table, Texts, lines, parse_lines, read_text};
use crate::{Error, Result};

/// Keys and columns that contain a prompt, in order of preference.
const TEXT: [&str; 3] = ["text", "prompt", "caption"];
/// Columns that identify an image, in order of preference.
const IMAGE: [&str; 2] = ["file_name", "image_id"];

/// Which captions of an image are prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Captions {
    /// The first: one prompt per image, as in most evaluations.
    First,
    /// All: every caption is a prompt.
    #[default]
    All,
}

/// A prompt of a file; see [`read_prompts`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prompt {
    /// The text, without spaces at either end; never empty.
    pub text: String,
    /// The name of the image that it describes, or its number in a file without names; `None` if the file has neither.
    pub image: Option<String>,
}

/// The prompts of a file, in its order.
///
/// The ending of the file name, in any case, sets the form:
///
/// | file | prompts | image |
/// | --- | --- | --- |
/// | `.jsonl` | one object per line, with `text`, `prompt` or `caption`: a text or a list of phrasings | `file_name` or `image_id` |
/// | `.csv`, `.tsv` | the column `text`, `prompt` or `caption`, in any case | the column `file_name` or `image_id` |
/// | `.json` | `captions_*.json` of [COCO](https://cocodataset.org/#format-data), in the order of its images | `file_name` or `id` |
/// | any other | one per line; blank lines are ignored | none |
///
/// Where several keys or columns are present, the first of those above counts. With [`Captions::First`], only the first
/// caption of each image is returned, and the first of a list of phrasings.
///
/// # Errors
///
/// [`Error::Read`], also for text that is not UTF-8; [`Error::Prompts`] with every line, row or annotation without a
/// prompt, and for a table without such a column, a COCO file without captions, and a file without prompts.
///
/// # Example
///
/// ```
/// use ddil_data::{Captions, read_prompts};
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("captions_val.json");
/// let coco = r#"{
///     "images": [{"id": 7, "file_name": "000007.jpg"}, {"id": 3, "file_name": "000003.jpg"}],
///     "annotations": [
///         {"id": 1, "image_id": 3, "caption": "A cat."},
///         {"id": 2, "image_id": 7, "caption": "A dog."},
///         {"id": 3, "image_id": 7, "caption": "A dog on grass."}
///     ]
/// }"#;
/// std::fs::write(&path, coco)?;
///
/// let first = read_prompts(&path, Captions::First)?;
/// assert_eq!((first[0].text.as_str(), first[0].image.as_deref()), ("A dog.", Some("000007.jpg")));
/// assert_eq!(first[1].text, "A cat.");
/// assert_eq!(read_prompts(&path, Captions::All)?.len(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_prompts(path: &Path, captions: Captions) -> Result<Vec<Prompt>> {
    let text = read_text(path)?;
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let Found { entries, mut problems } = match ending.as_str() {
        "jsonl" => from_objects(&text),
        "csv" => from_table(&text, b','),
        "tsv" => from_table(&text, b'\t'),
        "json" => from_coco(&text),
        _ => from_lines(&text),
    };
    if entries.is_empty() && problems.is_empty() {
        problems.push("it contains no prompts".to_owned());
    }
    if !problems.is_empty() {
        return Err(Error::Prompts { path: path.to_owned(), problems });
    }
    Ok(chosen(entries, captions))
}

/// Captions of one image, or of none; at least one.
struct Entry {
    image: Option<String>,
    texts: Vec<String>,
}

/// The content of a file and all its problems.
#[derive(Default)]
struct Found {
    entries: Vec<Entry>,
    problems: Vec<String>,
}

impl Found {
    fn problem(problem: impl Into<String>) -> Self {
        Self { entries: Vec::new(), problems: vec![problem.into()] }
    }

    /// Adds what is at a place, if each of its texts contains something.
    fn add(&mut self, place: &str, image: Option<String>, texts: &[String]) {
        let texts: Vec<String> = texts.iter().map(|text| text.trim().to_owned()).collect();
        if texts.is_empty() || texts.iter().any(String::is_empty) {
            self.problems.push(format!("{place}: the prompt is empty"));
        } else {
            self.entries.push(Entry { image, texts });
        }
    }
}

/// The prompts among the captions.
fn chosen(entries: Vec<Entry>, captions: Captions) -> Vec<Prompt> {
    let mut seen = BTreeSet::new();
    let mut prompts = Vec::new();
    for Entry { image, texts } in entries {
        let count = match captions {
            Captions::All => texts.len(),
            Captions::First => {
                let is_new = image.as_ref().is_none_or(|image| seen.insert(image.clone()));
                usize::from(is_new)
            }
        };
        let texts = texts.into_iter().take(count);
        prompts.extend(texts.map(|text| Prompt { text, image: image.clone() }));
    }
    prompts
}

fn from_lines(text: &str) -> Found {
    let entry = |text| Entry { image: None, texts: vec![text] };
    Found { entries: lines(text).into_iter().map(entry).collect(), problems: Vec::new() }
}

/// The number or the name of an image.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(untagged, expecting = "expected a whole number or a text")]
enum Id {
    Number(i64),
    Name(String),
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// A line of JSON; other keys, as other programs write them, are ignored.
#[derive(Deserialize)]
struct Line {
    text: Option<Texts>,
    prompt: Option<Texts>,
    caption: Option<Texts>,
    file_name: Option<String>,
    image_id: Option<Id>,
}

fn from_objects(text: &str) -> Found {
    let mut found = Found::default();
    for (number, line) in parse_lines(text) {
        let place = format!("line {number}");
        let Line { text, prompt, caption, file_name, image_id } = match line {
            Ok(line) => line,
            Err(problem) => {
                found.problems.push(format!("{place}: {problem}"));
                continue;
            }
        };
        let image = file_name.or_else(|| image_id.map(|id| id.to_string()));
        match text.or(prompt).or(caption) {
            Some(texts) => found.add(&place, image, &Vec::from(texts)),
            None => found.problems.push(format!("{place}: no key `{}`", TEXT.join("`, `"))),
        }
    }
    found
}

fn from_table(text: &str, delimiter: u8) -> Found {
    let table = match Table::parse(text, delimiter) {
        Ok(table) => table,
        Err(problem) => return Found::problem(format!("line 1: {problem}")),
    };
    let Some(column) = table.column(&TEXT) else {
        let (expected, found) = (TEXT.join("`, `"), listed(&table.names));
        return Found::problem(format!("no column `{expected}`; the columns are {found}"));
    };
    let image = table.column(&IMAGE);
    let mut found = Found::default();
    for (number, row) in table.rows {
        let place = format!("line {number}");
        match row {
            Ok(row) => {
                let image = image.map(|column| row[column].to_owned());
                let image = image.filter(|image| !image.is_empty());
                found.add(&place, image, &[row[column].to_owned()]);
            }
            Err(problem) => found.problems.push(format!("{place}: {problem}")),
        }
    }
    found
}

/// A file of COCO; each kind has `images` and `annotations`.
#[derive(Deserialize)]
#[serde(expecting = "an object with `images` and `annotations`")]
struct Coco {
    images: Option<Vec<CocoImage>>,
    annotations: Option<Vec<Annotation>>,
}

#[derive(Deserialize)]
struct CocoImage {
    id: Id,
    file_name: Option<String>,
}

/// An annotation of any kind.
#[derive(Deserialize)]
struct Annotation {
    image_id: Id,
    caption: Option<String>,
    keypoints: Option<IgnoredAny>,
    segments_info: Option<IgnoredAny>,
    bbox: Option<IgnoredAny>,
}

impl Annotation {
    /// Another kind of annotation, if it has no caption.
    fn other_kind(&self) -> Option<&'static str> {
        match self {
            Self { caption: Some(_), .. } => None,
            Self { keypoints: Some(_), .. } => Some("keypoints of persons"),
            Self { segments_info: Some(_), .. } => Some("panoptic segmentations"),
            Self { bbox: Some(_), .. } => Some("object instances"),
            _ => Some("no captions"),
        }
    }
}

/// Reads a file of captions in COCO's form.
fn from_coco(text: &str) -> Found {
    const EXPECTED: &str =
        "expected COCO's captions_*.json; prompts in JSON lines need the ending .jsonl";
    // Derived readers accept a list for an object.
    if !text.trim_start().starts_with('{') {
        return Found::problem(format!("it is not a JSON object: {EXPECTED}"));
    }
    let Coco { images, annotations } = match ddil_files::parse_json(text.as_bytes()) {
        Ok(coco) => coco,
        Err(error) => return Found::problem(format!("{error}: {EXPECTED}")),
    };
    let (images, annotations) = match (images, annotations) {
        (Some(images), Some(annotations)) => (images, annotations),
        (None, _) => return Found::problem(format!("it has no `images`: {EXPECTED}")),
        (_, None) => return Found::problem(format!("it has no `annotations`: {EXPECTED}")),
    };
    if let Some(kind) = annotations.first().and_then(Annotation::other_kind) {
        return Found::problem(format!("its annotations are {kind}: {EXPECTED}"));
    }
    by_image(&images, annotations)
}

/// The captions of each image, in the order of the images.
fn by_image(images: &[CocoImage], annotations: Vec<Annotation>) -> Found {
    let mut found = Found::default();
    let mut texts: BTreeMap<&Id, Vec<String>> =
        images.iter().map(|image| (&image.id, Vec::new())).collect();
    for (index, Annotation { image_id, caption, .. }) in annotations.into_iter().enumerate() {
        let caption = caption.filter(|caption| !caption.trim().is_empty());
        match (texts.get_mut(&image_id), caption) {
            (Some(texts), Some(caption)) => texts.push(caption),
            (None, _) => found.problems.push(format!(
                "annotations[{index}]: its image {image_id} is not among the {} of `images`",
                images.len()
            )),
            (_, None) => found
                .problems
                .push(format!("annotations[{index}]: no caption of the image {image_id}")),
        }
    }
    for CocoImage { id, file_name } in images {
        let name = file_name.clone().unwrap_or_else(|| id.to_string());
        match texts.remove(id) {
            Some(texts) if texts.is_empty() => {
                found.problems.push(format!("the image {name} has no caption"));
            }
            Some(texts) => found.add(&name, Some(name.clone()), &texts),
            None => found.problems.push(format!("the image {id} is listed twice")),
        }
    }
    found
}
