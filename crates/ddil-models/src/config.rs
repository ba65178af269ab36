//! Reading and writing `config.json` in diffusers' format.

use std::io::Write as _;
use std::path::Path;

use ddil_files::{Invalid, JsonSettings};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::weights::{write_error, write_whole};

/// The file of a network's settings in its folder.
pub(crate) const FILE_NAME: &str = "config.json";
/// The diffusers release whose `config.json` is written.
const DIFFUSERS_VERSION: &str = "0.42.1";
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
        for (key, value) in JsonSettings::of(self).object() {
            size_problems(key, value, &mut problems);
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

/// The settings in a file.
pub(crate) fn read_file(path: &Path) -> Result<JsonSettings> {
    JsonSettings::read(path).map_err(|error| match error {
        ddil_files::Error::Json { path, source, .. } => {
            Error::InvalidJson { path, source: source.into() }
        }
        ddil_files::Error::Io { path, source, .. } => Error::Read { path, source: source.into() },
        other => Error::Read { path: path.into(), source: other.into() },
    })
}

/// Reads settings and reports all problems in one error.
pub(crate) fn from_file<C: Config>(
    what: &str,
    file: &JsonSettings,
    unknown_keys: UnknownKeys,
) -> Result<C> {
    let defaults = C::default();
    let mut keys = file.problems(&defaults);
    if unknown_keys == UnknownKeys::Refuse {
        let known = JsonSettings::of(&defaults);
        let known: Vec<_> = known.object().keys().map(String::as_str).collect();
        let expected = format!("one of {}", known.join(", "));
        let unknown = file.unknown(&defaults).into_iter();
        keys.extend(unknown.map(|key| Invalid::new(key, &file.object()[key], expected.clone())));
    }
    keys.sort_by(|left, right| left.field.cmp(&right.field));
    let mut problems = Vec::new();
    if file.object().contains_key(JsonSettings::CLASS) {
        problems.extend(file.class(&[C::CLASS_NAME]).err());
    }
    problems.extend(keys);
    match file.over(&defaults) {
        Ok(config) => {
            problems.extend(config.all_problems());
            if problems.is_empty() {
                return Ok(config);
            }
        }
        Err(problem) if problems.is_empty() => problems.push(problem),
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
    let mut file = JsonSettings::of(config).without_unset(C::OWN_KEYS).with_class(C::CLASS_NAME);
    file.object_mut().insert("_diffusers_version".into(), DIFFUSERS_VERSION.into());
    file.to_string()
}
