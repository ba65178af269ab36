//! The files of a network's weights in a folder, with the names of diffusers and transformers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use ddil_libtorch::ArgumentError;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::{ensure_all_dense, save_as, write_error, write_text, written_kind};
use crate::error::{Error, Result};

/// The file names of a network's weights in a folder: one file, or shards with an index.
///
/// With the variant `fp16` the stem `model` means `model.fp16.safetensors` and `model.safetensors.index.fp16.json`;
/// older spellings of the index (`model.fp16.safetensors.index.json`, `model.safetensors.fp16.index.json`) are read as
/// well.
///
/// # Example
///
/// ```
/// use ddil_models::weights::{self, WeightFiles};
/// use tch::{Tensor, kind};
///
/// # let folder = std::env::temp_dir().join(format!("ddil-weight-files-{}", std::process::id()));
/// let files = WeightFiles { variant: Some("fp16"), ..WeightFiles::DIFFUSION };
/// let tensors = [
///     ("conv.bias".to_owned(), Tensor::zeros([4], kind::FLOAT_CPU)),
///     ("conv.weight".to_owned(), Tensor::zeros([4, 3], kind::FLOAT_CPU)),
/// ];
/// files.save_sharded(&tensors, &folder, 50)?;
/// let index = files.find(&folder)?;
/// assert!(index.ends_with("diffusion_pytorch_model.safetensors.index.fp16.json"));
/// assert_eq!(weights::read_all(index)?.len(), 2);
/// // Without a variant, no other variant is found.
/// assert!(WeightFiles::DIFFUSION.find(&folder).is_err());
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightFiles<'a> {
    /// The start of every name: letters, digits, `_` and `-`.
    pub stem: &'a str,
    /// The variant, such as `fp16`, spelt likewise; none for the files without one.
    pub variant: Option<&'a str>,
}

/// The role of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Whole,
    Index,
    Shard,
}

impl WeightFiles<'static> {
    /// The names of diffusers.
    pub const DIFFUSION: Self = Self { stem: "diffusion_pytorch_model", variant: None };
    /// The names of transformers, as in the text encoders of a pipeline.
    pub const TRANSFORMERS: Self = Self { stem: "model", variant: None };

    /// The file or index of a transformers network in `folder`; without it that of the variant `fp16`, or of the only
    /// variant.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub fn of_transformers(folder: impl AsRef<Path>) -> Result<PathBuf> {
        let (files, half) = (Self::TRANSFORMERS, Some("fp16"));
        match files.find(&folder) {
            Err(Error::NoWeights { others, .. })
                if others.iter().any(|(_, variant)| variant.as_deref() == half) =>
            {
                WeightFiles { variant: half, ..files }.find(&folder)
            }
            _ => Ok(files.find_any(folder)?.0),
        }
    }
}

impl WeightFiles<'_> {
    /// The file or index in `folder`, and its variant: that of these files or, if they name no variant and there are
    /// only files of one, these.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub fn find_any(&self, folder: impl AsRef<Path>) -> Result<(PathBuf, Option<String>)> {
        let folder = folder.as_ref();
        let (others, missing) = match self.find(folder) {
            Err(Error::NoWeights { others, path, expected }) => {
                (others.clone(), Error::NoWeights { others, path, expected })
            }
            found => return Ok((found?, self.variant.map(str::to_owned))),
        };
        let variants: BTreeSet<String> = others.into_iter().filter_map(|(_, v)| v).collect();
        match variants.first() {
            Some(only) if variants.len() == 1 && self.variant.is_none() => {
                let file = WeightFiles { variant: Some(only), ..*self }.find(folder)?;
                Ok((file, Some(only.clone())))
            }
            _ => Err(missing),
        }
    }

    /// The file or index in `folder`.
    ///
    /// If both exist, the index is used, and for the stem `model` the file, as in diffusers and transformers.
    ///
    /// # Errors
    ///
    /// [`Error::NoWeights`] if there is neither, with the existing other variants; [`Error::Pickle`] if there is only a
    /// pickle; [`Error::Read`] if the folder cannot be read;
    /// [`ArgumentError::Value`](ddil_libtorch::ArgumentError::Value) for a stem or variant that is not a valid part of
    /// a name.
    pub fn find(&self, folder: impl AsRef<Path>) -> Result<PathBuf> {
        let folder = folder.as_ref();
        self.ensure_names()?;
        let expected = self.candidates();
        let mut paths = expected.iter().map(|name| folder.join(name));
        if let Some(path) = paths.find(|path| path.is_file()) {
            return Ok(path);
        }
        let names = names_in(folder)?;
        let mut others: Vec<_> = names
            .iter()
            .filter_map(|name| match classify(self.stem, name)? {
                (Part::Shard, _) => None,
                (_, variant) => Some((name.clone(), variant.map(str::to_owned))),
            })
            .collect();
        others.sort();
        let pickle = names.iter().find(|name| self.is_pickle(name));
        match pickle {
            Some(pickle) if others.is_empty() => Err(Error::Pickle { path: folder.join(pickle) }),
            _ => Err(Error::NoWeights { path: folder.into(), expected, others }),
        }
    }

    /// Writes tensors to one file in `folder`, creating the folder if needed, and returns its path.
    ///
    /// Index and shards of the same stem and variant are removed once the file is written, so that no reader uses them.
    ///
    /// # Errors
    ///
    /// As [`save`](super::save), and as [`Self::find`] for a stem or variant.
    pub fn save(&self, tensors: &[(String, Tensor)], folder: impl AsRef<Path>) -> Result<PathBuf> {
        self.save_whole(tensors, folder.as_ref(), None)
    }

    fn save_whole(
        &self,
        tensors: &[(String, Tensor)],
        folder: &Path,
        kind: Option<Kind>,
    ) -> Result<PathBuf> {
        self.ensure_names()?;
        fs::create_dir_all(folder).map_err(|e| write_error(folder, e))?;
        let name = self.whole_name();
        let path = folder.join(&name);
        save_as(tensors, &path, &BTreeMap::new(), kind)?;
        self.remove(folder, |part, other| part != Part::Whole && other != name)?;
        Ok(path)
    }

    /// Writes tensors, in the order given, to shards of at most `max_shard_bytes` of values each, with an index, and
    /// returns its path. A larger tensor has a separate shard. Tensors that fit one shard are written to one file
    /// without index, as in diffusers.
    ///
    /// An older index of the same stem and variant is removed first: after an interrupted write, reading the folder is
    /// an error and never returns a mix of two networks.
    ///
    /// # Errors
    ///
    /// As [`Self::save`].
    pub fn save_sharded(
        &self,
        tensors: &[(String, Tensor)],
        folder: impl AsRef<Path>,
        max_shard_bytes: u64,
    ) -> Result<PathBuf> {
        self.save_sharded_as(tensors, folder, max_shard_bytes, None)
    }

    /// As [`Self::save_sharded`], with floating-point values cast to `kind` if given, one tensor at a time.
    ///
    /// # Errors
    ///
    /// As [`Self::save`].
    pub fn save_sharded_as(
        &self,
        tensors: &[(String, Tensor)],
        folder: impl AsRef<Path>,
        max_shard_bytes: u64,
        kind: Option<Kind>,
    ) -> Result<PathBuf> {
        let folder = folder.as_ref();
        ensure_all_dense("WeightFiles::save_sharded", tensors)?;
        let shards = split(tensors, max_shard_bytes, kind);
        if shards.len() < 2 {
            return self.save_whole(tensors, folder, kind);
        }
        self.ensure_names()?;
        fs::create_dir_all(folder).map_err(|e| write_error(folder, e))?;
        self.remove(folder, |part, _| part == Part::Index)?;
        let mut weight_map = serde_json::Map::new();
        let mut written = Vec::new();
        for (i, shard) in shards.iter().enumerate() {
            let name = self.shard_name(i + 1, shards.len());
            save_as(shard, folder.join(&name), &BTreeMap::new(), kind)?;
            weight_map.extend(shard.iter().map(|(t, _)| (t.clone(), Value::from(name.clone()))));
            written.push(name);
        }
        let total_size: u64 = tensors.iter().map(|(_, tensor)| num_bytes(tensor, kind)).sum();
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        let name = self.index_names()[0].clone();
        write_text(&folder.join(&name), &format!("{index:#}\n"))?;
        written.push(name);
        self.remove(folder, |_, other| !written.iter().any(|name| name == other))?;
        Ok(folder.join(&written[written.len() - 1]))
    }

    fn candidates(&self) -> Vec<String> {
        let mut names = self.index_names();
        let whole_first = self.stem == WeightFiles::TRANSFORMERS.stem;
        names.insert(if whole_first { 0 } else { names.len() }, self.whole_name());
        names
    }

    fn whole_name(&self) -> String {
        format!("{}.safetensors", self.base())
    }

    /// The name that is written first, then the older ones.
    fn index_names(&self) -> Vec<String> {
        let stem = self.stem;
        match self.variant {
            None => vec![format!("{stem}.safetensors.index.json")],
            Some(variant) => vec![
                format!("{stem}.safetensors.index.{variant}.json"),
                format!("{stem}.{variant}.safetensors.index.json"),
                format!("{stem}.safetensors.{variant}.index.json"),
            ],
        }
    }

    fn shard_name(&self, number: usize, total: usize) -> String {
        format!("{}-{number:05}-of-{total:05}.safetensors", self.base())
    }

    fn base(&self) -> String {
        match self.variant {
            None => self.stem.to_owned(),
            Some(variant) => format!("{}.{variant}", self.stem),
        }
    }

    fn is_pickle(&self, name: &str) -> bool {
        let ours = name.starts_with(self.stem) || name.starts_with("pytorch_model");
        ours && super::is_pickle(Path::new(name))
    }

    /// Removes the files of this stem and variant that `which` selects.
    fn remove(&self, folder: &Path, which: impl Fn(Part, &str) -> bool) -> Result<()> {
        for name in names_in(folder)? {
            let Some((part, variant)) = classify(self.stem, &name) else { continue };
            if variant == self.variant && which(part, &name) {
                let path = folder.join(&name);
                fs::remove_file(&path).map_err(|e| write_error(&path, e))?;
            }
        }
        Ok(())
    }

    fn ensure_names(&self) -> Result<()> {
        for (name, value) in [("stem", Some(self.stem)), ("variant", self.variant)] {
            let Some(value) = value else { continue };
            let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
            if value.is_empty() || !value.chars().all(plain) {
                let (value, expected) = (format!("{value:?}"), "letters, digits, `_` and `-`");
                return Err(ArgumentError::value("WeightFiles", name, value, expected).into());
            }
        }
        Ok(())
    }
}

fn names_in(folder: &Path) -> Result<Vec<String>> {
    let list = || -> std::io::Result<Vec<String>> {
        let entries = fs::read_dir(folder)?;
        entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut names =
        list().map_err(|source| Error::Read { path: folder.into(), source: source.into() })?;
    names.sort();
    Ok(names)
}

/// The role of a file of this name for the network `stem`, and its variant.
fn classify<'a>(stem: &str, name: &'a str) -> Option<(Part, Option<&'a str>)> {
    let words: Vec<&str> = name.strip_prefix(stem)?.split('.').collect();
    Some(match words[..] {
        ["", "safetensors"] => (Part::Whole, None),
        ["", word, "safetensors"] => match strip_number(word) {
            Some(variant) => (Part::Shard, Some(variant)),
            None => (Part::Whole, Some(word)),
        },
        [number, "safetensors"] if strip_number(number) == Some("") => (Part::Shard, None),
        [number, variant, "safetensors"] if strip_number(number) == Some("") => {
            (Part::Shard, Some(variant))
        }
        ["", "safetensors", "index", "json"] => (Part::Index, None),
        ["", "safetensors", "index", variant, "json"]
        | ["", "safetensors", variant, "index", "json"]
        | ["", variant, "safetensors", "index", "json"] => (Part::Index, Some(variant)),
        _ => return None,
    })
}

/// The part before `-00001-of-00002`.
fn strip_number(word: &str) -> Option<&str> {
    let (rest, total) = word.rsplit_once("-of-")?;
    let (rest, number) = rest.rsplit_once('-')?;
    let counts = |s: &str| s.len() >= 5 && s.bytes().all(|b| b.is_ascii_digit());
    (counts(number) && counts(total)).then_some(rest)
}

fn num_bytes(tensor: &Tensor, kind: Option<Kind>) -> u64 {
    (tensor.numel() * written_kind(tensor, kind).elt_size_in_bytes()) as u64
}

/// In the given order, with a new shard whenever the next tensor does not fit.
fn split(
    tensors: &[(String, Tensor)],
    max_shard_bytes: u64,
    kind: Option<Kind>,
) -> Vec<Vec<(String, Tensor)>> {
    let mut shards: Vec<Vec<(String, Tensor)>> = Vec::new();
    let mut room = 0;
    for (name, tensor) in tensors {
        let bytes = num_bytes(tensor, kind);
        if shards.is_empty() || bytes > room {
            shards.push(Vec::new());
            room = max_shard_bytes;
        }
        room = room.saturating_sub(bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push((name.clone(), tensor.shallow_clone()));
        }
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::{Part, classify};

    #[test]
    fn names_are_told_apart() {
        let of = |name| classify("model", name);
        assert_eq!(of("model.safetensors"), Some((Part::Whole, None)));
        assert_eq!(of("model.fp16.safetensors"), Some((Part::Whole, Some("fp16"))));
        assert_eq!(of("model-00001-of-00002.safetensors"), Some((Part::Shard, None)));
        for shard in
            ["model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.fp16.safetensors"]
        {
            assert_eq!(of(shard), Some((Part::Shard, Some("fp16"))));
        }
        assert_eq!(of("model.safetensors.index.json"), Some((Part::Index, None)));
        for index in [
            "model.safetensors.index.fp16.json",
            "model.fp16.safetensors.index.json",
            "model.safetensors.fp16.index.json",
        ] {
            assert_eq!(of(index), Some((Part::Index, Some("fp16"))));
        }
        for other in
            ["model_index.json", "model.bin", "model-1-of-2.safetensors", "model2.safetensors", "x"]
        {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
