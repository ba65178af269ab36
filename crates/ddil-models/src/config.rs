//! Reading and writing `config.json` in diffusers' format.

use std::io::Write as _;
use std::path::Path;

use ddil_files::Invalid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::weights::{write_error, write_whole};

/// The file of a network's settings in its folder.
pub(crate) const FILE_NAME: &str = "config.json";
/// The diffusers release whose `config.json` is written.
const DIFFUSERS_VERSION: &str = "0.42.1";
/// Size limit of a `config.json`; published ones have less than ten KiB.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Upper bound of integers in a network's settings: far above every published width, vocabulary or count, and low
/// enough that a product of three does not overflow.
const MAX_NUMBER: u64 = 1 << 20;
/// The longest list in a network's settings.
const MAX_LIST: usize = 10_000;

/// How to treat an unknown key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownKeys {
    /// An error that names it, because it may be a setting that changes the output.
    #[default]
    Refuse,
    /// Ignore it.
    Ignore,
}

/// Settings of a network in a `config.json`.
pub(crate) trait Config: Default + Serialize + DeserializeOwned {
    /// The value of `_class_name`.
    const CLASS_NAME: &'static str;
    /// Keys that diffusers' class of that name does not have; written only if they are set.
    const OWN_KEYS: &'static [&'static str] = &[];

    /// The problems of settings whose types are all correct.
    fn problems(&self) -> Vec<Invalid>;

    /// Numbers and lists beyond the limits; if there are none, all other problems.
    fn all_problems(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        for (key, value) in to_map(self) {
            size_problems(&key, &value, &mut problems);
        }
        if problems.is_empty() { self.problems() } else { problems }
    }

    /// An error unless there is no problem.
    fn ensure_valid(&self) -> Result<()> {
        match self.all_problems() {
            problems if problems.is_empty() => Ok(()),
            problems => Err(Error::InvalidConfig { what: Self::CLASS_NAME.into(), problems }),
        }
    }
}

/// The numbers and lists of a setting that exceed the limits.
fn size_problems(key: &str, value: &Value, problems: &mut Vec<Invalid>) {
    match value {
        Value::Number(number) if number.is_u64() && number.as_u64() > Some(MAX_NUMBER) => {
            problems.push(Invalid::new(key, number, format!("at most {MAX_NUMBER}")));
        }
        Value::Array(items) if items.len() > MAX_LIST => {
            let found = format!("{} entries long", items.len());
            problems.push(Invalid::new(key, found, format!("at most {MAX_LIST}")));
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                size_problems(&format!("{key}[{i}]"), item, problems);
            }
        }
        Value::Object(object) => {
            for (name, item) in object {
                size_problems(&format!("{key}.{name}"), item, problems);
            }
        }
        _ => {}
    }
}

/// The JSON object in a file of at most [`MAX_FILE_BYTES`].
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = ddil_files::read_text_bounded(path, MAX_FILE_BYTES)
        .map_err(|source| Error::Read { path: path.into(), source: source.into() })?;
    serde_json::from_str(&text)
        .map_err(|source| Error::InvalidJson { path: path.into(), source: source.into() })
}

/// Reads settings from a JSON object and reports all problems in one error.
pub(crate) fn from_object<C: Config>(
    what: &str,
    object: &Map<String, Value>,
    unknown_keys: UnknownKeys,
) -> Result<C> {
    let known = to_map(&C::default());
    let mut problems = Vec::new();
    for (key, value) in object {
        if key == "_class_name" {
            if value != C::CLASS_NAME {
                problems.push(Invalid::new(key, value, format!("\"{}\"", C::CLASS_NAME)));
            }
        } else if key.starts_with('_') {
            // `_diffusers_version`, `_name_or_path` and similar keys describe the origin of a file.
        } else if known.contains_key(key) {
            // Each alone, so that one invalid value does not hide the next.
            if let Err(source) = serde_json::from_value::<C>(json!({ key.as_str(): value })) {
                problems.push(Invalid::new(key, value, source.to_string()));
            }
        } else if unknown_keys == UnknownKeys::Refuse {
            let keys: Vec<_> = known.keys().map(String::as_str).collect();
            problems.push(Invalid::new(key, value, format!("one of {}", keys.join(", "))));
        }
    }
    let mut settings = object.clone();
    settings.retain(|key, _| known.contains_key(key));
    match serde_json::from_value::<C>(Value::Object(settings)) {
        Ok(config) => {
            problems.extend(config.all_problems());
            if problems.is_empty() {
                return Ok(config);
            }
        }
        // Every value has already been parsed alone.
        Err(source) if problems.is_empty() => {
            problems.push(Invalid::new("settings", source, "one value per key"));
        }
        Err(_) => {}
    }
    Err(Error::InvalidConfig { what: what.to_owned(), problems })
}

/// Replaces a file by a text atomically.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    write_whole(path, |file| file.write_all(text.as_bytes()).map_err(|e| write_error(path, e)))
}

/// The settings in diffusers' format: class name, version, sorted keys; [`Config::OWN_KEYS`] only if they are set.
pub(crate) fn to_json<C: Config>(config: &C) -> String {
    let mut object = to_map(config);
    object.retain(|key, value| !(value.is_null() && C::OWN_KEYS.contains(&key.as_str())));
    object.insert("_class_name".into(), C::CLASS_NAME.into());
    object.insert("_diffusers_version".into(), DIFFUSERS_VERSION.into());
    let mut text = format!("{:#}", Value::Object(object));
    text.push('\n');
    text
}

pub(crate) fn to_map<C: Config>(config: &C) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        // Plain structs of numbers, names and lists; a test of each config serialises it.
        other => unreachable!("{} is not a JSON object: {other:?}", C::CLASS_NAME),
    }
}
