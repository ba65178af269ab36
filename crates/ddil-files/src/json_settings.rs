//! Settings in the JSON files of diffusers and transformers.

use std::fmt;
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::file_terms::{OBJECT, Refusal, alternatives, json_text};
use crate::{Error, Invalid, Result, parse_json, read_text_bounded};

/// Size limit of a file: a published one has less than ten KiB, an explicit list of a thousand betas needs thirty.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The settings in a JSON file of diffusers or transformers: one object with the keys of one class.
///
/// [`over`](Self::over) reads them as a settings type. Absent keys have the default values passed to it. Keys that
/// begin with `_`, such as `_diffusers_version`, describe the origin of a file and are never unknown. A settings type is
/// one that serde writes as a JSON object; another one is a panic.
///
/// # Example
///
/// ```
/// use ddil_files::JsonSettings;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Debug, PartialEq, Serialize, Deserialize)]
/// struct Scheduler {
///     beta_start: f64,
///     beta_schedule: String,
/// }
///
/// let defaults = Scheduler { beta_start: 1e-4, beta_schedule: "linear".to_owned() };
/// let file = JsonSettings::parse(r#"{"_class_name": "DDIMScheduler", "beta_start": 0.001}"#)?;
/// assert_eq!(file.class(&["DDIMScheduler", "LCMScheduler"])?, "DDIMScheduler");
/// assert_eq!(file.over(&defaults)?, Scheduler { beta_start: 0.001, ..defaults });
///
/// let defaults = Scheduler { beta_start: 1e-4, beta_schedule: "linear".to_owned() };
/// let file = JsonSettings::parse(r#"{"beta_start": "small", "shift": 3}"#)?;
/// assert_eq!(file.unknown(&defaults), ["shift"]);
/// let invalid = file.over(&defaults).unwrap_err();
/// assert_eq!(invalid.to_string(), r#"`beta_start` is "small"; expected a number"#);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct JsonSettings(Map<String, Value>);

impl JsonSettings {
    /// The key of the class.
    pub const CLASS: &str = "_class_name";

    /// Reads a regular file of at most 16 MiB.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be read, [`Error::Json`] if it is not a JSON object.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = read_text_bounded(path, MAX_FILE_BYTES).map_err(Error::io("read", path))?;
        Self::parse(&text).map_err(Error::json("read", path))
    }

    /// Reads the text of a file.
    ///
    /// As in [`parse_json`], a byte order mark is ignored, and Python's `Infinity`, `-Infinity` and `NaN` are texts.
    ///
    /// # Errors
    ///
    /// The parser's error if it is not a JSON object.
    pub fn parse(text: &str) -> serde_json::Result<Self> {
        parse_json(text.as_bytes()).map(Self)
    }

    /// The keys of a settings type with their values.
    ///
    /// # Panics
    ///
    /// If the type is not serialized as a JSON object.
    pub fn of(settings: &impl Serialize) -> Self {
        match serde_json::to_value(settings) {
            Ok(Value::Object(keys)) => Self(keys),
            other => panic!("settings must be a JSON object, not {other:?}"),
        }
    }

    /// All keys with their values.
    pub fn object(&self) -> &Map<String, Value> {
        &self.0
    }

    /// All keys with their values, to be changed.
    pub fn object_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.0
    }

    /// The one of `classes` that the file is for.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if its `_class_name` is absent or not one of these.
    pub fn class<'a>(&self, classes: &[&'a str]) -> Result<&'a str, Invalid> {
        let found = self.0.get(Self::CLASS);
        let name = found.map_or(Some(""), Value::as_str);
        let known = classes.iter().find(|class| Some(**class) == name);
        known.copied().ok_or_else(|| {
            let shown = name.map(|name| format!("`{name}`"));
            let shown = shown.unwrap_or_else(|| found.unwrap_or(&Value::Null).to_string());
            Invalid::new(Self::CLASS, shown, alternatives(classes))
        })
    }

    /// The keys that are neither in `defaults` nor about the origin of the file.
    pub fn unknown(&self, defaults: &impl Serialize) -> Vec<&str> {
        let known = Self::of(defaults).0;
        let keys = self.0.keys().map(String::as_str);
        keys.filter(|key| !key.starts_with('_') && !known.contains_key(*key)).collect()
    }

    /// Every known key with a value of the wrong type.
    pub fn problems<T: Serialize + DeserializeOwned>(&self, defaults: &T) -> Vec<Invalid> {
        let defaults = Self::of(defaults).0;
        // Each alone, so that one invalid value does not hide the next.
        let problem = |(key, value): (&String, &Value)| {
            let message_with = |value: Value| {
                let mut one = defaults.clone();
                *one.get_mut(key)? = value;
                serde_json::from_value::<T>(Value::Object(one)).err().map(|e| e.to_string())
            };
            let message = message_with(value.clone())?;
            // Serde lists the names of a choice only for a text.
            let names = message_with(Value::String(String::new()));
            let names = names.filter(|names| names.starts_with("unknown variant"));
            let is_within = value.is_array() || value.is_object();
            let message = names.filter(|_| !is_within).unwrap_or(message);
            Some(Invalid::new(key, value, expected(&message, value)))
        };
        self.0.iter().filter_map(problem).collect()
    }

    /// The settings: `defaults` with the values of this file. Unknown keys are ignored.
    ///
    /// # Errors
    ///
    /// The first of [`problems`](Self::problems).
    pub fn over<T: Serialize + DeserializeOwned>(&self, defaults: &T) -> Result<T, Invalid> {
        let mut settings = Self::of(defaults).0;
        for (key, value) in &mut settings {
            if let Some(given) = self.0.get(key) {
                value.clone_from(given);
            }
        }
        serde_json::from_value(Value::Object(settings)).map_err(|error| {
            let first = self.problems(defaults).into_iter().next();
            let problem = || Invalid::new("settings", json_text(&error), "values that agree");
            first.unwrap_or_else(problem)
        })
    }

    /// The same without those of `keys` whose value is null: keys that the class does not have unless they are set.
    #[must_use]
    pub fn without_unset(mut self, keys: &[&str]) -> Self {
        self.0.retain(|key, value| !(value.is_null() && keys.contains(&key.as_str())));
        self
    }

    /// The same with the name of its class.
    #[must_use]
    pub fn with_class(mut self, class: &str) -> Self {
        self.0.insert(Self::CLASS.to_owned(), class.into());
        self
    }
}

impl From<Map<String, Value>> for JsonSettings {
    fn from(object: Map<String, Value>) -> Self {
        Self(object)
    }
}

/// The text of the file as diffusers writes it: sorted keys, two spaces, a newline at the end.
impl fmt::Display for JsonSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = serde_json::to_string_pretty(&self.0).map_err(|_| fmt::Error)?;
        writeln!(f, "{text}")
    }
}

/// The allowed values in a message of serde, in the terms of a JSON file.
fn expected(message: &str, value: &Value) -> String {
    match Refusal::of(message, OBJECT) {
        // A value within a list or an object.
        Refusal::Value { found: Some(found), expected }
            if value.is_array() && found != "a list" || value.is_object() && found != OBJECT =>
        {
            format!("{expected}, not {found}")
        }
        Refusal::Value { expected, .. } | Refusal::Other(expected) => expected,
    }
}
