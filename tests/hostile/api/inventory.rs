//! The public functions of a crate, read from its sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::inputs::repository;

/// `Type::function`, or `function` if it is free, of every public function that has arguments.
pub(crate) fn functions_of(krate: &str) -> BTreeSet<String> {
    let with_arguments = |(name, takes): (String, bool)| takes.then_some(name);
    all_of(krate).into_iter().filter_map(with_arguments).collect()
}

/// The same with those that have none.
pub(crate) fn all_functions_of(krate: &str) -> BTreeSet<String> {
    all_of(krate).into_iter().map(|(name, _)| name).collect()
}

fn all_of(krate: &str) -> Vec<(String, bool)> {
    let mut files = Vec::new();
    collect(&repository().join("crates").join(krate).join("src"), &mut files);
    files.iter().flat_map(|file| functions_in(&fs::read_to_string(file).expect("text"))).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            files.push(path);
        }
    }
}

/// Every public function that is documented, and whether it has arguments. As rustfmt lays them out: items begin at the margin, functions of an
/// `impl` are set in by four.
fn functions_in(source: &str) -> Vec<(String, bool)> {
    let own = source.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let (mut found, mut owner) = (Vec::new(), None);
    let lines: Vec<&str> = own.lines().collect();
    for (i, line) in lines.iter().enumerate() {
        if let Some(header) = line.strip_prefix("impl") {
            owner = Some(owner_of(header));
        } else if let Some(header) = line.strip_prefix("pub trait ") {
            owner = Some(word(header));
        } else if *line == "}" {
            owner = None;
        }
        let is_trait = owner.is_some() && is_in_trait(&lines[..i]);
        let declared = line.trim_start();
        let name =
            ["pub fn ", "pub const fn "].iter().find_map(|start| declared.strip_prefix(start));
        let name = name.or_else(|| declared.strip_prefix("fn ").filter(|_| is_trait));
        let is_hidden = i > 0 && lines[i - 1].trim() == "#[doc(hidden)]";
        let Some(name) = name.filter(|_| !is_hidden).map(word) else { continue };
        let of_type = line.starts_with(' ').then_some(owner.as_ref()).flatten();
        let whole = of_type.map_or(name.clone(), |owner| format!("{owner}::{name}"));
        found.push((whole, takes_arguments(&lines[i..])));
    }
    found
}

/// Whether the innermost item that is open here is a public trait.
fn is_in_trait(before: &[&str]) -> bool {
    let opened = before
        .iter()
        .rev()
        .find(|line| **line == "}" || line.starts_with("impl") || line.starts_with("pub trait "));
    opened.is_some_and(|line| line.starts_with("pub trait "))
}

/// The type after `impl`, without its parameters.
fn owner_of(header: &str) -> String {
    let header = match header.strip_prefix('<') {
        Some(generic) => skip_generic(generic),
        None => header,
    };
    let header = header.split_once(" for ").map_or(header, |(_, owner)| owner);
    word(header.trim_start())
}

fn skip_generic(text: &str) -> &str {
    let mut depth = 1;
    for (at, c) in text.char_indices() {
        depth += i32::from(c == '<') - i32::from(c == '>');
        if depth == 0 {
            return &text[at + 1..];
        }
    }
    text
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Whether there is more between the brackets than `self`.
fn takes_arguments(lines: &[&str]) -> bool {
    // The arrow of a bound such as `Fn(u8) -> u8` is not a bracket.
    let text = lines.iter().take(20).copied().collect::<String>().replace("->", "  ");
    let text = text.trim_start().trim_start_matches("pub ").trim_start_matches("const ");
    let Some(open) = opening_bracket(text) else { return false };
    let mut depth = 0;
    let end = text[open..].find(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth == 0
    });
    let inner = &text[open + 1..open + end.unwrap_or(1)];
    let is_self =
        |argument: &str| matches!(argument, "" | "self" | "mut self" | "&self" | "&mut self");
    !inner.split(',').map(str::trim).all(is_self)
}

/// The bracket of the arguments, behind those of the type parameters.
fn opening_bracket(text: &str) -> Option<usize> {
    let mut depth = 0;
    text.char_indices().find_map(|(at, c)| {
        depth += i32::from(c == '<') - i32::from(c == '>');
        (c == '(' && depth == 0).then_some(at)
    })
}

#[test]
fn functions_are_found() {
    let source = r"
pub fn free<T: Fn(u8) -> u8>(x: T) {}
fn private(x: u8) {}
pub fn bare() {}
impl<D: Into<Vec<u8>>> Wrapper<D> {
    pub fn new(inner: D) -> Self {}
    pub fn get(&self) -> &D {}
    pub(crate) fn hidden(&self, x: u8) {}
    pub fn long(
        &self,
        x: u8,
    ) {}
}
impl Trait for Wrapper<u8> {
    fn step(&self, x: u8) {}
}
pub trait Trait {
    fn step(&self, x: u8);
    fn name(&self) -> u8;
}
#[cfg(test)]
mod tests {
    pub fn helper(x: u8) {}
}";
    let expected = [
        ("free", true),
        ("bare", false),
        ("Wrapper::new", true),
        ("Wrapper::get", false),
        ("Wrapper::long", true),
        ("Trait::step", true),
        ("Trait::name", false),
    ];
    let found = functions_in(source);
    assert!(found.iter().map(|(name, takes)| (name.as_str(), *takes)).eq(expected), "{found:?}");
}
