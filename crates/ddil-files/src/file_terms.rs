//! Messages of serde in the terms of a file: serde names types of Rust, which the author of a file need not know.

use std::borrow::Cow;

use serde::de::{DeserializeOwned, Error as _};

use crate::mistaken_content;
use crate::python_json::{with_quoted_words, without_mark};

/// Parses JSON; an error is in the terms of a file instead of those of Rust's types.
///
/// A byte order mark at the start is ignored. Python writes numbers that are not finite as bare words, which are not
/// JSON: `Infinity`, `-Infinity` and `NaN` are read as texts.
///
/// # Errors
///
/// The parser's error with line and column.
///
/// # Example
///
/// ```
/// #[derive(Debug, serde::Deserialize)]
/// struct Status {
///     step: u32,
/// }
///
/// let error = ddil_files::parse_json::<Status>(br#"{"step": -1}"#).unwrap_err();
/// let expected = "found -1; expected a whole number from 0 to 4294967295 at line 1 column 11";
/// assert_eq!(error.to_string(), expected);
/// ```
pub fn parse_json<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    let json = without_mark(json);
    let parsed = serde_json::from_slice(json).or_else(|error| match with_quoted_words(json) {
        Cow::Owned(quoted) if error.is_syntax() => {
            // If the text is not JSON for another reason too, the first place is the one to report.
            let again: serde_json::Result<T> = serde_json::from_slice(&quoted);
            again.map_err(|second| if second.is_data() { second } else { error })
        }
        _ => Err(error),
    });
    parsed.map_err(|error| match mistaken_content(json) {
        Some(found) => serde_json::Error::custom(found),
        None => in_json_terms(error),
    })
}

/// The same error in the terms of a file, for one that did not come from [`parse_json`].
///
/// # Example
///
/// ```
/// let error = serde_json::from_value::<Vec<u8>>(serde_json::json!([300])).unwrap_err();
/// let error = ddil_files::in_json_terms(error);
/// assert_eq!(error.to_string(), "found 300; expected a whole number from 0 to 255");
/// ```
pub fn in_json_terms(error: serde_json::Error) -> serde_json::Error {
    // The constructor recognises the place at the end of the text.
    if error.is_data() { serde_json::Error::custom(json_text(&error)) } else { error }
}

/// The message of an error in the terms of a file, with its place.
pub(crate) fn json_text(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = match error.line() {
        0 => String::new(),
        line => format!(" at line {line} column {}", error.column()),
    };
    let message = text.strip_suffix(&place).unwrap_or(&text);
    format!("{}{place}", Refusal::of(message, OBJECT))
}

/// Keys with values, in JSON.
pub(crate) const OBJECT: &str = "an object";
/// Keys with values, in TOML.
#[cfg(feature = "settings")]
pub(crate) const TABLE: &str = "a table";

/// What a message of serde states.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A value is not allowed.
    Value {
        /// The value, or its kind; `None` if the message does not state it.
        found: Option<String>,
        /// The values that are allowed.
        expected: String,
    },
    /// Another problem.
    Other(String),
}

impl Refusal {
    /// The statement of a message without a place; `table` is the format's term for keys with values.
    pub(crate) fn of(message: &str, table: &str) -> Self {
        if let Some(allowed) = message.strip_prefix("expected ") {
            return Self::Value { found: None, expected: expected(allowed, table) };
        }
        if let Some(key) = message.strip_prefix("duplicate field ") {
            return Self::Other(format!("the key {key} occurs twice"));
        }
        if message.ends_with(", expected string only") {
            // The parser of TOML states another kind of value than it found.
            return Self::Value { found: None, expected: "text".to_owned() };
        }
        let parts = message.rsplit_once(", expected ");
        let value = parts.and_then(|(left, allowed)| {
            let found = Some(found(left, table)?);
            Some(Self::Value { found, expected: expected(allowed, table) })
        });
        value.unwrap_or_else(|| {
            let message = message.replace("missing field", "missing key");
            Self::Other(message.replace("unknown field", "unknown key"))
        })
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Value { found: Some(found), expected } => {
                write!(f, "found {found}; expected {expected}")
            }
            Self::Value { found: None, expected } => write!(f, "expected {expected}"),
            Self::Other(message) => f.write_str(message),
        }
    }
}

/// The value in the first part of a message, or its kind.
fn found(message: &str, table: &str) -> Option<String> {
    if let Some(name) = message.strip_prefix("unknown variant ") {
        return Some(format!("{:?}", within_backticks(name)));
    }
    if let Some(len) = message.strip_prefix("invalid length ") {
        return Some(list_of(len));
    }
    let kinds = ["invalid type: ", "invalid value: "];
    let value = kinds.iter().find_map(|kind| message.strip_prefix(kind))?;
    let plain = ["integer ", "floating point ", "boolean ", "character ", "string "];
    if let Some(value) = plain.iter().find_map(|kind| value.strip_prefix(kind)) {
        let quoted = value.starts_with('"');
        return Some(if quoted { value } else { within_backticks(value) }.to_owned());
    }
    Some(match value {
        "map" | "newtype variant" | "tuple variant" | "struct variant" | "enum" => table.to_owned(),
        "sequence" | "byte array" => "a list".to_owned(),
        "unit variant" => "text".to_owned(),
        "unit value" | "null" => "null".to_owned(),
        "Option value" | "newtype struct" => "a value".to_owned(),
        other => other.to_owned(),
    })
}

/// The allowed values in the last part of a message.
fn expected(allowed: &str, table: &str) -> String {
    if let Some(names) = allowed.strip_prefix("one of ") {
        return alternatives(&names.split(", ").collect::<Vec<_>>());
    }
    let text = match allowed {
        "a string" | "a borrowed string" | "variant identifier" | "unit variant" => "text",
        "path string" | "a borrowed path" | "os string" => "a path",
        "a boolean" => "true or false",
        "a character" => "one character",
        "a sequence" => "a list",
        "an empty array" => "an empty list",
        "fewer elements in array" => "fewer values",
        "fewer elements in map" => "fewer keys",
        "option" | "any value" => "a value",
        "unit" => "null",
        "field identifier" => "a key",
        "a map" | "newtype variant" | "tuple variant" | "struct variant" => table,
        "map with a single key" => return format!("{table} with a single key"),
        "string or map" | "wanted string or table" => return format!("text or {table}"),
        _ => {
            return number(allowed).or_else(|| composite(allowed, table)).unwrap_or(allowed.into());
        }
    };
    text.to_owned()
}

/// The values of a numeric type of Rust.
fn number(allowed: &str) -> Option<String> {
    let (nonzero, name) = match allowed.strip_prefix("a nonzero ") {
        Some(name) => (true, name),
        None => (false, allowed),
    };
    let to = |max: u32| format!("a whole number from {} to {max}", u32::from(nonzero));
    Some(match name {
        "f32" | "f64" => "a number".to_owned(),
        "u8" => to(u8::MAX.into()),
        "u16" => to(u16::MAX.into()),
        "u32" => to(u32::MAX),
        // Their limits are of no use to a reader.
        "u64" | "u128" | "usize" if nonzero => "a whole number above 0".to_owned(),
        "u64" | "u128" | "usize" => "a whole number, 0 or more".to_owned(),
        "i8" => format!("a whole number from {} to {}", i8::MIN, i8::MAX),
        "i16" => format!("a whole number from {} to {}", i16::MIN, i16::MAX),
        "i32" => format!("a whole number from {} to {}", i32::MIN, i32::MAX),
        "i64" | "i128" | "isize" => "a whole number".to_owned(),
        _ => return None,
    })
}

/// The values of a type of Rust that consists of others.
fn composite(allowed: &str, table: &str) -> Option<String> {
    if allowed.starts_with("internally tagged enum ") {
        return Some(format!("{table} with a `kind`"));
    }
    let lists = ["a tuple of size ", "an array of length "];
    if let Some(len) = lists.iter().find_map(|start| allowed.strip_prefix(start)) {
        return Some(list_of(len));
    }
    if allowed.starts_with("tuple struct ") || allowed.starts_with("tuple variant ") {
        let len = allowed.split_once(" with ").and_then(|(_, end)| end.split(' ').next());
        return Some(len.map_or("a list".to_owned(), list_of));
    }
    let tables = ["struct ", "struct variant ", "adjacently tagged enum "];
    if tables.iter().any(|start| allowed.starts_with(start)) {
        return Some(table.to_owned());
    }
    if allowed.starts_with("variant index ") {
        return Some("text".to_owned());
    }
    let ends = [" elements in sequence", " element in sequence"];
    if let Some(len) = ends.iter().find_map(|end| allowed.strip_suffix(end)) {
        return Some(list_of(len));
    }
    allowed.starts_with("enum ").then(|| format!("text or {table}"))
}

fn list_of(len: &str) -> String {
    format!("a list of {len} {}", if len == "1" { "value" } else { "values" })
}

fn within_backticks(text: &str) -> &str {
    // As in "integer `1` as i128".
    let text = text.split_once("` as ").map_or(text, |(number, _)| number);
    let text = text.strip_prefix('`').unwrap_or(text);
    text.strip_suffix('`').unwrap_or(text)
}

/// `a, b or c`.
pub(crate) fn alternatives(names: &[&str]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => names.concat(),
    }
}
