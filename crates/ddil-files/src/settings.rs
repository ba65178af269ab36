//! TOML files with `--set` overrides, read into any settings type. Errors name the line and column.
//!
//! [`Settings`] parses the text, applies overrides, and builds any `T: DeserializeOwned`; its structs should set
//! `deny_unknown_fields`. Overrides change the parsed values before `T` is built, so the same checks apply to the file
//! and the command line.

use std::{
    collections::BTreeSet,
    fmt, fs,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use serde_path_to_error::Segment;
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue},
};

use crate::file_terms::{Refusal, TABLE};
use crate::strict_value::StrictValue;
use crate::{Error, Invalid, Result};

/// Minimum similarity of a name that is suggested instead of an unknown one.
const MIN_SIMILARITY: f64 = 0.65;

/// A TOML document with overrides.
///
/// # Example
///
/// ```
/// use ddil_files::settings::Settings;
/// use serde::Deserialize;
///
/// #[derive(Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Train {
///     batch_size: u32,
///     lr: f64,
/// }
///
/// let mut settings = Settings::parse("train.toml", "batch_size = 8\nlr = 1e-4\n")?;
/// settings.set("batch_size=32")?;
/// let train: Train = settings.build()?;
/// assert_eq!((train.batch_size, train.lr), (32, 1e-4));
///
/// settings.set("batchsize=32")?;
/// let error = settings.build::<Train>().err().expect("there is no such key").to_string();
/// assert_eq!(error, "--set batchsize=32: unknown key `batchsize`; did you mean `batch_size`?");
/// # Ok::<(), ddil_files::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Settings {
    path: PathBuf,
    text: String,
    /// Always a table.
    values: Value,
    overrides: Vec<Override>,
}

#[derive(Clone, Debug)]
struct Override {
    text: String,
    key: Vec<String>,
}

impl Settings {
    /// Reads a TOML file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read, [`Error::ConfigSyntax`] if it is not valid TOML.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        Self::parse(path, text)
    }

    /// Parses TOML text; errors refer to it as `path`.
    ///
    /// # Errors
    ///
    /// [`Error::ConfigSyntax`] if it is not valid TOML.
    pub fn parse(path: impl Into<PathBuf>, text: impl Into<String>) -> Result<Self> {
        let (path, text) = (path.into(), text.into());
        match text.parse() {
            Ok(table) => {
                Ok(Self { path, text, values: Value::Table(table), overrides: Vec::new() })
            }
            Err(error) => Err(Error::ConfigSyntax {
                place: place(&path, &text, error.span()),
                message: error.message().replace('\n', ", "),
            }),
        }
    }

    /// Overrides one value: `a.b=c`, where `c` is TOML; anything else is a string.
    ///
    /// Numbers index arrays, as in `stages.0.num_steps=8`. Unknown keys are reported by [`build`](Self::build).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOverride`] if `=` is missing, a part of the key is empty, or the key leads through a value that
    /// is neither a table nor an array.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let (key, value) = parse_assignment(assignment)?;
        insert(&mut self.values, &key, value).map_err(|reason| invalid(assignment, reason))?;
        self.overrides.push(Override { text: assignment.to_owned(), key });
        Ok(())
    }

    /// Whether the document contains `key` at the top level.
    pub fn has(&self, key: &str) -> bool {
        self.values.get(key).is_some()
    }

    /// Reads the values into a settings type.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownKey`] with the most similar known key; [`Error::InvalidSetting`] for a value that is missing,
    /// out of range or of the wrong type. Both name the place: line and column, or the override.
    pub fn build<T: DeserializeOwned>(&self) -> Result<T> {
        let retry = |values| read::<T>(values).err();
        read(self.values.clone()).map_err(|problem| self.explain(problem, &retry))
    }

    fn explain(&self, problem: Problem, retry: Retry<'_>) -> Error {
        if problem.message.starts_with("unknown field") {
            return self.unknown_key(problem);
        }
        let (key, message) = match Refusal::of(&problem.message, TABLE) {
            Refusal::Value { found, expected } => {
                self.refused_value(problem, found, expected, retry)
            }
            Refusal::Other(message) if problem.key.is_empty() => (problem.key, message),
            Refusal::Other(message) => {
                let message = format!("`{}`: {message}", problem.key.join("."));
                (problem.key, message)
            }
        };
        Error::InvalidSetting { place: self.place_of(&key), key: key.join("."), message }
    }

    fn unknown_key(&self, Problem { mut key, message }: Problem) -> Error {
        let names = backticked(&message);
        let (found, known) = names.split_first().map_or(("", &[][..]), |(a, b)| (a.as_str(), b));
        // Serde buffers the content of a tagged enum, so the path ends at the enum.
        if key.last().is_none_or(|last| last != found) {
            let rest = self.path_below(&key, |name, _| name == found);
            key.extend(rest.unwrap_or_else(|| vec![found.to_owned()]));
        }
        let (nearest, known) = (nearest(found, known), known.to_vec());
        Error::UnknownKey { place: self.place_of(&key), key: key.join("."), nearest, known }
    }

    /// The key of a value that is not allowed, and the message.
    fn refused_value(
        &self,
        problem: Problem,
        found: Option<String>,
        expected: String,
        retry: Retry<'_>,
    ) -> (Vec<String>, String) {
        let Some(key) = self.key_of_value(&problem, found.as_deref(), retry) else {
            let (key, found) = (problem.key, found.unwrap_or_else(|| "another value".to_owned()));
            let message = format!("`{}` contains {found}; expected {expected}", key.join("."));
            return (key, message);
        };
        let expected =
            self.names(&key, retry).filter(|_| expected.starts_with("text")).unwrap_or(expected);
        let value = child_at(&self.values, &key);
        let hint =
            value.and_then(Value::as_str).and_then(|text| nearest(text, &backticked(&expected)));
        let hint = hint.map_or(String::new(), |hint| format!("; did you mean `{hint}`?"));
        let value = found.filter(|found| found.starts_with("a list of ")).or(value.map(shown));
        let invalid = Invalid::new(key.join("."), value.unwrap_or_default(), expected);
        (key, format!("{invalid}{hint}"))
    }

    /// The key of the value that a problem is about, which may be below that of the problem: serde buffers the content of
    /// a tagged enum, so the path ends at the enum. `None` if there are several such values.
    fn key_of_value(
        &self,
        problem: &Problem,
        found: Option<&str>,
        retry: Retry<'_>,
    ) -> Option<Vec<String>> {
        let key = &problem.key;
        let is_found = |value: &Value| found.is_none_or(|found| is_shown(value, found));
        let value = child_at(&self.values, key)?;
        // A table may be the buffered one, in which another table is not allowed.
        let empty = value.is_table().then(|| self.retried(key, Value::Table(Table::new()), retry));
        let is_buffered = empty.is_some_and(|empty| empty.as_ref() != Some(&problem.message));
        if is_found(value) && !is_buffered {
            return Some(key.clone());
        }
        let below = match found {
            Some(_) => self.path_below(key, |_, value| is_found(value))?,
            None => self.path_to_problem(problem, retry)?,
        };
        Some([key.as_slice(), &below].concat())
    }

    /// The path below the key of a problem to the value that it is about, for a message that does not state the value.
    ///
    /// Another value of a wrong type does not change the message, one of the right type does. A value that is read before
    /// changes it in any case, and one that is read after it in none.
    fn path_to_problem(&self, problem: &Problem, retry: Retry<'_>) -> Option<Vec<String>> {
        let mut paths = Vec::new();
        search(child_at(&self.values, &problem.key)?, &|_, _| true, &[], &mut paths);
        let right = [Value::Float(1.0), Value::String(String::new()), Value::Array(Vec::new())];
        let is_same = |path: &[String], value: Value| {
            let key = [problem.key.as_slice(), path].concat();
            self.retried(&key, value, retry).as_ref() == Some(&problem.message)
        };
        paths.into_iter().find(|path| {
            is_same(path, Value::Boolean(true))
                && right.iter().any(|value| !is_same(path, value.clone()))
        })
    }

    /// The names of which a key takes one. Serde lists them only for a text.
    fn names(&self, key: &[String], retry: Retry<'_>) -> Option<String> {
        let problem = self.problem_with(key, Value::String(String::new()), retry)?;
        // Where a text is allowed, the message is about another mistake.
        let is_about_it =
            problem.message.starts_with("unknown variant ``") && key.starts_with(&problem.key);
        match is_about_it.then(|| Refusal::of(&problem.message, TABLE))? {
            Refusal::Value { expected, .. } => Some(expected),
            Refusal::Other(_) => None,
        }
    }

    /// The message about the same settings with another value.
    fn retried(&self, key: &[String], value: Value, retry: Retry<'_>) -> Option<String> {
        self.problem_with(key, value, retry).map(|problem| problem.message)
    }

    /// The problem of the same settings with another value.
    fn problem_with(&self, key: &[String], value: Value, retry: Retry<'_>) -> Option<Problem> {
        let mut values = self.values.clone();
        insert(&mut values, key, value).ok()?;
        retry(values)
    }

    /// The path from `key` to the only value below it with a property; `None` if there are none or several.
    fn path_below(
        &self,
        key: &[String],
        is_it: impl Fn(&str, &Value) -> bool,
    ) -> Option<Vec<String>> {
        let mut found = Vec::new();
        search(child_at(&self.values, key)?, &is_it, &[], &mut found);
        match found.as_slice() {
            [only] => Some(only.clone()),
            _ => None,
        }
    }

    /// Where a key was set: the override, else the position in the file, else the file.
    fn place_of(&self, key: &[String]) -> String {
        let mut overrides = self.overrides.iter().rev();
        if let Some(given) = overrides.find(|given| key.starts_with(&given.key)) {
            return format!("--set {}", given.text);
        }
        let span =
            DeTable::parse(&self.text).ok().and_then(|table| span_in_table(table.get_ref(), key));
        place(&self.path, &self.text, span)
    }
}

/// The parts of the key and the value of an assignment: `a.b=c`, where `c` is TOML; anything else is a string.
///
/// # Errors
///
/// [`Error::InvalidOverride`] if `=` is missing or a part of the key is empty.
pub fn parse_assignment(text: &str) -> Result<(Vec<String>, Value)> {
    let (key, value) =
        text.split_once('=').ok_or_else(|| invalid(text, "expected key=value".into()))?;
    let key: Vec<String> = key.split('.').map(|part| part.trim().to_owned()).collect();
    if key.iter().any(String::is_empty) {
        return Err(invalid(text, "the key has an empty part".into()));
    }
    Ok((key, parse_value(value)))
}

fn invalid(text: &str, reason: String) -> Error {
    Error::InvalidOverride { text: text.to_owned(), reason }
}

/// The settings as TOML with every value, for the copy that is stored with a run.
///
/// # Errors
///
/// [`Error::WriteSettings`] for values that TOML cannot represent, such as an integer beyond 63 bits.
pub fn to_toml(settings: &impl Serialize) -> Result<String> {
    toml::to_string(settings).map_err(|source| Error::WriteSettings { source })
}

/// One value as TOML on one line, as it appears after `=`.
///
/// # Errors
///
/// As [`to_toml`].
pub fn inline_toml(value: &impl Serialize) -> Result<String> {
    let value = Value::try_from(value).map_err(|source| Error::WriteSettings { source })?;
    Ok(value.to_string())
}

/// A setting with different values in two configs.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The full path of the key.
    pub key: String,
    /// The value in the first config as TOML; `None` if the key is absent.
    pub left: Option<String>,
    /// The value in the second config as TOML; `None` if the key is absent.
    pub right: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".into());
        write!(f, "{}: {} there, {} here", self.key, shown(&self.left), shown(&self.right))
    }
}

/// All settings with different values in two configs, in order of their keys.
///
/// # Errors
///
/// [`Error::WriteSettings`] for values that TOML cannot represent.
///
/// # Example
///
/// ```
/// use ddil_files::settings::differences;
///
/// let left = toml::toml! { lr = 0.1 }.to_owned();
/// let right = toml::toml! { lr = 0.2 }.to_owned();
/// assert_eq!(differences(&left, &right)?[0].to_string(), "lr: 0.1 there, 0.2 here");
/// # Ok::<(), ddil_files::Error>(())
/// ```
pub fn differences<T: Serialize>(left: &T, right: &T) -> Result<Vec<Difference>> {
    let to_value =
        |settings: &T| Value::try_from(settings).map_err(|source| Error::WriteSettings { source });
    let mut found = Vec::new();
    compare("", Some(&to_value(left)?), Some(&to_value(right)?), &mut found);
    Ok(found)
}

fn compare(key: &str, left: Option<&Value>, right: Option<&Value>, found: &mut Vec<Difference>) {
    match (left, right) {
        (Some(Value::Table(left)), Some(Value::Table(right))) => {
            let names: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
            for name in names {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                compare(&key, left.get(name), right.get(name), found);
            }
        }
        (left, right) if left != right => found.push(Difference {
            key: key.to_owned(),
            left: left.map(Value::to_string),
            right: right.map(Value::to_string),
        }),
        _ => {}
    }
}

/// A problem that serde found: the path of the key and the message.
struct Problem {
    key: Vec<String>,
    message: String,
}

/// The problem with other values, read as the same type.
type Retry<'a> = &'a dyn Fn(Value) -> Option<Problem>;

fn read<T: DeserializeOwned>(values: Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(StrictValue(values)).map_err(|error| Problem {
        key: key_of(error.path()),
        message: error.inner().message().to_owned(),
    })
}

/// The value as TOML; a table and a long list by their kind.
fn shown(value: &Value) -> String {
    const SHORT: usize = 60;
    match value {
        Value::Table(_) => TABLE.to_owned(),
        Value::Array(_) => Some(value.to_string())
            .filter(|text| text.len() <= SHORT)
            .unwrap_or_else(|| "a list".to_owned()),
        Value::Float(number) if number.abs() >= 1e15 => format!("{number:e}"),
        other => other.to_string(),
    }
}

/// Whether a message shows this value as `found`.
fn is_shown(value: &Value, found: &str) -> bool {
    match value {
        Value::String(text) => found == format!("{text:?}"),
        Value::Float(number) => {
            let found = found.parse();
            found == Ok(*number) || number.is_nan() && found.is_ok_and(f64::is_nan)
        }
        Value::Array(_) => found.starts_with("a list"),
        Value::Table(_) | Value::Datetime(_) => found == TABLE,
        other => found == other.to_string(),
    }
}

/// The value as TOML if it parses; otherwise a string, whose quotes the shell removed.
fn parse_value(text: &str) -> Value {
    match text.trim().parse() {
        Ok(Value::Datetime(_)) | Err(_) => Value::String(text.to_owned()),
        Ok(value) => value,
    }
}

fn insert(target: &mut Value, key: &[String], value: Value) -> Result<(), String> {
    let Some((first, rest)) = key.split_first() else {
        *target = value;
        return Ok(());
    };
    match target {
        Value::Table(table) => {
            let empty = Value::Table(Table::new());
            insert(table.entry(first.as_str()).or_insert(empty), rest, value)
        }
        Value::Array(items) => {
            let count = items.len();
            let item = first.parse().ok().and_then(|index: usize| items.get_mut(index));
            let item = item.ok_or(format!("`{first}` is not one of its {count} entries"))?;
            insert(item, rest, value)
        }
        other => Err(format!("`{first}` cannot be set below a value of type {}", other.type_str())),
    }
}

fn child_at<'a>(value: &'a Value, key: &[String]) -> Option<&'a Value> {
    key.iter().try_fold(value, |value, part| match value {
        Value::Table(table) => table.get(part),
        Value::Array(items) => items.get(part.parse::<usize>().ok()?),
        _ => None,
    })
}

fn search(
    value: &Value,
    is_it: &dyn Fn(&str, &Value) -> bool,
    path: &[String],
    found: &mut Vec<Vec<String>>,
) {
    let children: Vec<(String, &Value)> = match value {
        Value::Table(table) => table.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(items) => {
            items.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect()
        }
        _ => return,
    };
    for (key, value) in children {
        let path = [path, std::slice::from_ref(&key)].concat();
        search(value, is_it, &path, found);
        if is_it(&key, value) {
            found.push(path);
        }
    }
}

fn key_of(path: &serde_path_to_error::Path) -> Vec<String> {
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Map { key } => Some(key.clone()),
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

/// The span of the deepest part of a key that the file contains.
fn span_in_table(table: &DeTable<'_>, key: &[String]) -> Option<Range<usize>> {
    let (first, rest) = key.split_first()?;
    let (name, value) = table.iter().find(|(name, _)| name.get_ref() == first.as_str())?;
    span_in_value(value.get_ref(), rest).or(Some(name.span()))
}

fn span_in_value(value: &DeValue<'_>, key: &[String]) -> Option<Range<usize>> {
    match value {
        DeValue::Table(table) => span_in_table(table, key),
        DeValue::Array(items) => {
            let (first, rest) = key.split_first()?;
            let item: &Spanned<DeValue<'_>> = items.get(first.parse::<usize>().ok()?)?;
            span_in_value(item.get_ref(), rest).or(Some(item.span()))
        }
        _ => None,
    }
}

/// `file:line:column`, counted from 1, columns in characters; the file alone without a span.
fn place(path: &Path, text: &str, span: Option<Range<usize>>) -> String {
    let before = span.and_then(|span| text.get(..span.start));
    let Some(before) = before else { return path.display().to_string() };
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("{}:{line}:{column}", path.display())
}

/// The words in backticks in a message of serde: first the one found, then those allowed.
fn backticked(message: &str) -> Vec<String> {
    message.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn nearest(found: &str, known: &[String]) -> Option<String> {
    known
        .iter()
        .map(|name| (similarity(found, name), name))
        .filter(|(similarity, _)| *similarity >= MIN_SIMILARITY)
        .max_by(|(left, _), (right, _)| left.total_cmp(right))
        .map(|(_, name)| name.clone())
}

/// Similarity from 0 to 1: high for few edits (`edn`, `end`), a common beginning (`lr`, `learning_rate`), or one name
/// within the other (`steps`, `num_steps`).
fn similarity(left: &str, right: &str) -> f64 {
    let shorter = left.len().min(right.len());
    let within = shorter >= 3 && (left.contains(right) || right.contains(left));
    strsim::normalized_damerau_levenshtein(left, right)
        .max(strsim::jaro(left, right))
        .max(if within { 0.75 } else { 0.0 })
}
