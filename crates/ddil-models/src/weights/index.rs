//! The index of a sharded network: opened only if shards and index agree.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use ddil_files::{parse_json, read_text_bounded, with_causes};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::OpenFile;
use crate::error::{Error, IndexProblems, Result};

/// Size limit of an index; one of a thousand tensors has a hundred KiB.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Opens every shard, or returns all differences between index and shards.
pub(super) fn open_shards(index: &Path) -> Result<Vec<OpenFile>> {
    let weight_map = read(index)?;
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (name, shard) in &weight_map {
        shards.entry(shard).or_default().insert(name);
    }
    let mut problems = IndexProblems::default();
    let mut files = Vec::with_capacity(shards.len());
    for (shard, names) in shards {
        let Some(path) = shard_path(index, shard) else {
            problems.outside.push(shard.to_owned());
            continue;
        };
        match OpenFile::open(&path) {
            Ok(file) => {
                compare(shard, &names, &file, &weight_map, &mut problems);
                files.push(file);
            }
            Err(error) => problems.unreadable.push((shard.to_owned(), with_causes(&error))),
        }
    }
    if problems == IndexProblems::default() {
        return Ok(files);
    }
    Err(Error::InvalidIndex { path: index.into(), problems: Box::new(problems) })
}

/// The shard of each tensor.
fn read(index: &Path) -> Result<BTreeMap<String, String>> {
    let invalid = |source: &str| Error::InvalidJson { path: index.into(), source: source.into() };
    let text = read_text_bounded(index, MAX_FILE_BYTES)
        .map_err(|source| Error::Read { path: index.into(), source: source.into() })?;
    ensure_unique_keys(text.as_bytes())
        .and_then(|()| parse_json::<Map<String, Value>>(text.as_bytes()))
        .map_err(|source| Error::InvalidJson { path: index.into(), source: source.into() })
        .and_then(|mut object| match object.remove("weight_map") {
            Some(Value::Object(weight_map)) => Ok(weight_map),
            _ => Err(invalid("it has no object `weight_map`")),
        })?
        .into_iter()
        .map(|(name, shard)| match shard {
            Value::String(shard) => Ok((name, shard)),
            _ => Err(invalid("`weight_map` contains values that are not file names")),
        })
        .collect()
}

/// A plain file name and not a pickle: an untrusted index must not refer to files outside of its folder.
fn shard_path(index: &Path, shard: &str) -> Option<PathBuf> {
    let mut components = Path::new(shard).components();
    let plain =
        matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    (plain && shard.ends_with(".safetensors")).then(|| index.with_file_name(shard))
}

fn compare(
    shard: &str,
    names: &BTreeSet<&str>,
    file: &OpenFile,
    weight_map: &BTreeMap<String, String>,
    problems: &mut IndexProblems,
) {
    let mut held: Vec<String> = file.header.tensors().into_keys().collect();
    held.sort();
    for name in names.iter().filter(|&&name| file.header.info(name).is_none()) {
        problems.absent.push(((*name).to_owned(), shard.to_owned()));
    }
    for name in held.into_iter().filter(|name| !names.contains(name.as_str())) {
        let place = weight_map.get(&name).cloned();
        problems.surplus.push((name, shard.to_owned(), place));
    }
}

/// An error if an object contains a key twice: some parsers use the last one, others the first.
pub(super) fn ensure_unique_keys(json: &[u8]) -> serde_json::Result<()> {
    serde_json::from_slice::<UniqueKeys>(json).map(|_| ())
}

/// Any JSON value without duplicate keys in its objects.
struct UniqueKeys;

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self, A::Error> {
        let mut keys = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<Self>()?;
            if let Some(key) = keys.replace(key) {
                return Err(A::Error::custom(format!("`{key}` occurs twice")));
            }
        }
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Self, A::Error> {
        while seq.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> std::result::Result<Self, E> {
        Ok(self)
    }
}
