//! Reads and writes named tensors as safetensors files; every name, shape and kind is checked.
//!
//! Files that are pickles (`.bin`, `.pt`, `.pth`, `.ckpt`) are rejected: reading one can run code.

mod files;
mod index;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use ddil_libtorch::ArgumentError;
use ddil_libtorch::MappedFile;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde::ser::{Serialize, SerializeMap, Serializer};
use tch::{Device, Kind, Tensor};

use crate::error::{BoxedError, Error, Result, WeightProblems, is_float};

pub use files::WeightFiles;

/// Number of read bytes after which pages of a file are released; less would only cost calls.
const RELEASE_BYTES: usize = 1 << 20;

/// Copies the tensors in a file into `targets`, which keep their kind, device and memory layout.
///
/// The file is a `.safetensors`, or a `.safetensors.index.json` that lists shards in its folder. Values are cast if
/// both kinds are floating point. Everything is checked before the first value is copied. They are copied tensor by
/// tensor from the memory-mapped file, whose pages are released along the way. In addition to the targets, this needs
/// the memory of the largest tensor (twice that if the values of the file are not aligned).
///
/// # Errors
///
/// [`Error::WeightsMismatch`] with every name that is missing, unexpected, misshapen or of a kind that cannot be cast;
/// otherwise as [`read_all`].
pub fn load_into(targets: &[(String, Tensor)], path: impl AsRef<Path>) -> Result<()> {
    load_renamed(targets, path, |_| None).map(|_| ())
}

/// As [`load_into`], for files that use other names: `new_name` maps such a name to the current one, and the shape of
/// that tensor may have trailing dimensions of 1 (the weight of a 1 by 1 convolution for that of a linear layer).
///
/// Returns the changed names, each with its new name. A name is not changed, and therefore unexpected, if the file
/// contains the new one as well.
pub(crate) fn load_renamed(
    targets: &[(String, Tensor)],
    path: impl AsRef<Path>,
    new_name: impl Fn(&str) -> Option<String>,
) -> Result<Vec<(String, String)>> {
    let path = path.as_ref();
    let files = open(path)?;
    let (copies, renamed) = planned(&files, targets, path, new_name)?;
    for (file, copies) in files.into_iter().zip(copies) {
        file.copy(copies)?;
    }
    Ok(renamed)
}

/// Checks that a file contains the tensors that [`load_into`] would copy into `targets`; only their sizes and kinds are
/// used.
///
/// # Errors
///
/// As [`load_into`].
pub fn ensure_fits(targets: &[(String, Tensor)], path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    planned(&open(path)?, targets, path, |_| None).map(|_| ())
}

/// The memory-mapped tensors of a file under the names of `targets`, of which only sizes and kinds are used: checked as
/// in [`load_renamed`], in the kinds of the file.
pub(crate) fn read_renamed(
    targets: &[(String, Tensor)],
    path: &Path,
    new_name: impl Fn(&str) -> Option<String>,
) -> Result<Vec<(String, Tensor)>> {
    let files = open(path)?;
    let (copies, renamed) = planned(&files, targets, path, new_name)?;
    let new_names: BTreeMap<String, String> = renamed.into_iter().collect();
    let mut read = Vec::with_capacity(targets.len());
    for (file, copies) in files.iter().zip(copies) {
        for Copy { name, info, target } in copies {
            let tensor = file.tensor(&name, &info, None)?.f_view(&target.size()[..]);
            let name = new_names.get(&name).cloned().unwrap_or(name);
            read.push((name, tensor.map_err(Error::torch("weights::read_renamed"))?));
        }
    }
    Ok(read)
}

/// The tensors to copy from each of several files, and the changed names.
type Planned<'a> = (Vec<Vec<Copy<'a>>>, Vec<(String, String)>);

/// Checks that tensors are defined and dense.
pub(super) fn ensure_all_dense(op: &'static str, tensors: &[(String, Tensor)]) -> Result<()> {
    let is_dense = |tensor: &Tensor| tensor.defined() && !tensor.is_sparse() && !tensor.is_mkldnn();
    match tensors.iter().find(|(_, tensor)| !is_dense(tensor)) {
        None => Ok(()),
        Some((name, _)) => {
            let found = format!("undefined or sparse at `{name}`");
            Err(ArgumentError::value(op, "tensors", found, "dense tensors").into())
        }
    }
}

/// Compares files with `targets` and collects all differences.
fn planned<'a>(
    files: &[OpenFile],
    targets: &'a [(String, Tensor)],
    path: &Path,
    new_name: impl Fn(&str) -> Option<String>,
) -> Result<Planned<'a>> {
    ensure_all_dense("weights::load_into", targets)?;
    let mut found = sources(files, new_name);
    let mut renamed = Vec::new();
    let mut problems = WeightProblems::default();
    let mut copies: Vec<Vec<Copy<'_>>> = files.iter().map(|_| Vec::new()).collect();
    for (name, target) in targets {
        let Some(source) = found.remove(name) else {
            problems.missing.push(name.clone());
            continue;
        };
        compare(name, &source, target, &mut problems);
        if source.name != *name {
            renamed.push((source.name.clone(), name.clone()));
        }
        copies[source.file].push(Copy { name: source.name, info: source.info.clone(), target });
    }
    problems.unexpected.extend(found.into_values().map(|source| source.name));
    problems.unexpected.sort();
    if !problems.is_empty() {
        return Err(Error::WeightsMismatch { path: path.into(), problems: Box::new(problems) });
    }
    for (file, copies) in files.iter().zip(&copies) {
        file.ensure_bools(copies)?;
    }
    Ok((copies, renamed))
}

/// A tensor in one of several files.
struct Source<'a> {
    file: usize,
    /// Its name in the file.
    name: String,
    info: &'a TensorInfo,
}

/// A tensor of a file to copy.
struct Copy<'a> {
    name: String,
    info: TensorInfo,
    target: &'a Tensor,
}

/// Every tensor of the files under its new name.
fn sources(
    files: &[OpenFile],
    new_name: impl Fn(&str) -> Option<String>,
) -> BTreeMap<String, Source<'_>> {
    let mut found = BTreeMap::new();
    let mut old = Vec::new();
    for (file, open) in files.iter().enumerate() {
        for (name, info) in open.header.tensors() {
            match new_name(&name) {
                Some(new) => old.push((new, Source { file, name, info })),
                None => {
                    found.insert(name.clone(), Source { file, name, info });
                }
            }
        }
    }
    for (new, source) in old {
        let name = if found.contains_key(&new) { source.name.clone() } else { new };
        found.insert(name, source);
    }
    found
}

/// Every tensor in a file or in the shards of an index, on the CPU, in its kind in the file.
///
/// The tensors are memory-mapped ([`MappedFile`]): reading is immediate, and writes to them stay in memory.
///
/// # Errors
///
/// [`Error::Libtorch`] if a file cannot be read, [`Error::InvalidSafetensors`] if it is damaged or contains a type
/// without a kind in libtorch, [`Error::Pickle`] for a pickle, [`Error::InvalidJson`] and [`Error::InvalidIndex`] for
/// an index.
pub fn read_all(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    let mut all = BTreeMap::new();
    for file in open(path.as_ref())? {
        all.extend(file.tensors()?);
    }
    Ok(all)
}

/// The metadata of a file; empty if it has none.
///
/// # Errors
///
/// As [`read_all`].
pub fn read_metadata(path: impl AsRef<Path>) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for file in open(path.as_ref())? {
        all.extend(file.header.metadata().clone().unwrap_or_default());
    }
    Ok(all)
}

/// Writes tensors, whatever their device and layout, to a safetensors file that `safetensors.torch` reads.
///
/// Each keeps its kind; cast before for half precision. `metadata` is written in addition to `{"format": "pt"}`. The
/// same tensors and metadata give the same bytes. A reader sees the old file or the complete new one, even after a
/// power failure.
///
/// # Errors
///
/// [`Error::Write`] if the file cannot be written, [`Error::UnsupportedKind`] for complex and quantised tensors,
/// [`Error::Torch`] if a tensor cannot be copied to the CPU.
///
/// # Example
///
/// ```no_run
/// use std::collections::BTreeMap;
/// use tch::{Tensor, kind};
///
/// let tensors = [("bias".to_owned(), Tensor::zeros([4], kind::FLOAT_CPU))];
/// ddil_models::weights::save(&tensors, "model.safetensors", &BTreeMap::new())?;
/// # Ok::<_, ddil_models::Error>(())
/// ```
pub fn save(
    tensors: &[(String, Tensor)],
    path: impl AsRef<Path>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    save_as(tensors, path, metadata, None)
}

/// As [`save`], with floating-point values cast to `kind` if given, one tensor at a time.
///
/// # Errors
///
/// As [`save`].
pub fn save_as(
    tensors: &[(String, Tensor)],
    path: impl AsRef<Path>,
    metadata: &BTreeMap<String, String>,
    kind: Option<Kind>,
) -> Result<()> {
    let path = path.as_ref();
    ensure_all_dense("weights::save", tensors)?;
    let (header, order) = layout(tensors, metadata, kind)?;
    write_whole(path, |file| {
        let bytes = padded_json(&header).map_err(|e| write_error(path, e))?;
        file.write_all(&(bytes.len() as u64).to_le_bytes()).map_err(|e| write_error(path, e))?;
        file.write_all(&bytes).map_err(|e| write_error(path, e))?;
        for &index in &order {
            let tensor = &tensors[index].1;
            let bytes = to_bytes(&tensors[index].0, tensor, written_kind(tensor, kind))?;
            file.write_all(&bytes).map_err(|e| write_error(path, e))?;
        }
        Ok(())
    })
}

/// Writes a temporary file, waits until it is on disk, then renames it.
pub(crate) fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> Result<()>,
) -> Result<()> {
    let target = ddil_files::replaceable(path).map_err(|e| write_error(path, e))?;
    let aside = ddil_files::temporary_sibling(&target);
    let attempt = || {
        let file = File::create(&aside).map_err(|e| write_error(path, e))?;
        let mut buffered = BufWriter::with_capacity(1 << 20, &file);
        write(&mut buffered)?;
        buffered.flush().map_err(|e| write_error(path, e))?;
        drop(buffered);
        put_in_place(&aside, &target)
    };
    attempt().inspect_err(|_| {
        // The first error is the one to report.
        let _ = fs::remove_file(&aside);
    })
}

/// Replaces a file by a text.
pub(crate) fn write_text(path: &Path, text: &str) -> Result<()> {
    write_whole(path, |file| file.write_all(text.as_bytes()).map_err(|e| write_error(path, e)))
}

/// Renames a file once it is on disk.
pub(crate) fn put_in_place(aside: &Path, path: &Path) -> Result<()> {
    let place = || {
        File::open(aside)?.sync_all()?;
        fs::rename(aside, path)
    };
    place().map_err(|e| write_error(path, e))?;
    // The new name is durable only once the folder is.
    ddil_files::sync_folder(ddil_files::parent(path)).map_err(|e| write_error(path, e))
}

pub(crate) fn write_error(path: &Path, source: impl Into<BoxedError>) -> Error {
    Error::Write { path: path.into(), source: source.into() }
}

/// A memory-mapped file and its header.
struct OpenFile {
    file: MappedFile,
    header: Metadata,
    /// The offset of the tensors.
    data_start: usize,
}

impl OpenFile {
    fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let (header_len, header) = SafeTensors::read_metadata(file.bytes()).map_err(|source| {
            let source = match ddil_files::mistaken_content(file.bytes()) {
                Some(found) => found.into(),
                None => source.into(),
            };
            Error::InvalidSafetensors { path: path.into(), source }
        })?;
        let data_start = size_of::<u64>() + header_len;
        index::ensure_unique_keys(&file.bytes()[size_of::<u64>()..data_start]).map_err(
            |source| Error::InvalidSafetensors { path: path.into(), source: source.into() },
        )?;
        Ok(Self { file, header, data_start })
    }

    /// Fills the targets in the order of their values in the file.
    fn copy(mut self, mut copies: Vec<Copy<'_>>) -> Result<()> {
        copies.sort_by_key(|copy| copy.info.data_offsets.0);
        let _no_grad = tch::no_grad_guard();
        let room = self.room(&copies)?;
        let mut num_read = 0;
        for Copy { name, info, target } in copies {
            let source = self.tensor(&name, &info, room.as_ref())?;
            ensure_in_range(&name, &source, target.kind())?;
            let copy = || {
                // Trailing dimensions of 1 of a tensor under another name.
                let source = source.f_view(&target.size()[..])?;
                target.shallow_clone().f_copy_(&source)
            };
            copy().map_err(Error::torch("weights::load_into"))?;
            drop(source);
            num_read += info.data_offsets.1 - info.data_offsets.0;
            if num_read >= RELEASE_BYTES {
                self.file.release_pages();
                num_read = 0;
            }
        }
        Ok(())
    }

    /// Whether all values to copy as booleans are valid, which the header cannot guarantee.
    fn ensure_bools(&self, copies: &[Copy<'_>]) -> Result<()> {
        let mut bools = copies.iter().filter(|copy| copy.info.dtype == Dtype::BOOL);
        bools.try_for_each(|copy| self.tensor(&copy.name, &copy.info, None).map(|_| ()))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let tensors = self.header.tensors();
        tensors
            .into_iter()
            .map(|(name, info)| Ok((name.clone(), self.tensor(&name, info, None)?)))
            .collect()
    }

    /// The tensor in the mapped file, or copied to `room` (a new buffer if `None`) if it is not aligned.
    fn tensor(&self, name: &str, info: &TensorInfo, room: Option<&Tensor>) -> Result<Tensor> {
        let kind = kind_of(info.dtype).ok_or_else(|| Error::InvalidSafetensors {
            path: self.file.path().into(),
            source: format!("`{name}` is {:?}, which libtorch does not support", info.dtype).into(),
        })?;
        let size = to_size(&info.shape);
        let (start, end) = info.data_offsets;
        let (start, end) = (self.data_start + start, self.data_start + end);
        if self.is_aligned(info) {
            return Ok(self.file.tensor(start, size, kind)?);
        }
        // The format does not guarantee alignment, the processor requires it.
        let num_bytes = to_size(&[end - start]);
        let bytes = self.file.tensor(start, &num_bytes, Kind::Uint8)?;
        let aligned = || {
            let mut copy = match room {
                Some(room) => room.f_narrow(0, 0, num_bytes[0])?,
                None => Tensor::f_empty(&num_bytes, (Kind::Uint8, Device::Cpu))?,
            };
            copy.f_copy_(&bytes)?;
            copy.f_view_dtype(kind)?.f_view(&size[..])
        };
        aligned().map_err(Error::torch("weights::read_all"))
    }

    /// Whether the tensor is aligned in the mapped file.
    fn is_aligned(&self, info: &TensorInfo) -> bool {
        let start = self.data_start + info.data_offsets.0;
        kind_of(info.dtype).is_none_or(|kind| start.is_multiple_of(kind.elt_size_in_bytes()))
    }

    /// A buffer for the largest of these tensors that is not aligned, if there is one.
    fn room(&self, copies: &[Copy<'_>]) -> Result<Option<Tensor>> {
        let misaligned = copies.iter().filter(|copy| !self.is_aligned(&copy.info));
        let bytes = |copy: &Copy<'_>| copy.info.data_offsets.1 - copy.info.data_offsets.0;
        let empty = |n| Tensor::f_empty(to_size(&[n]), (Kind::Uint8, Device::Cpu));
        misaligned
            .map(bytes)
            .max()
            .map(empty)
            .transpose()
            .map_err(Error::torch("weights::load_into"))
    }
}

/// The file, or all shards of an index.
fn open(path: &Path) -> Result<Vec<OpenFile>> {
    if is_pickle(path) {
        return Err(Error::Pickle { path: path.into() });
    }
    if has_extension(path, &["json"]) {
        return index::open_shards(path);
    }
    Ok(vec![OpenFile::open(path)?])
}

/// Whether the name is that of a pickle, which can run code when it is read.
fn is_pickle(path: &Path) -> bool {
    has_extension(path, &["bin", "pt", "pth", "ckpt", "pkl"])
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    extensions.iter().any(|other| extension.eq_ignore_ascii_case(other))
}

fn compare(name: &str, source: &Source<'_>, target: &Tensor, problems: &mut WeightProblems) {
    let info = source.info;
    let size = to_size(&info.shape);
    let mut kept = size.clone();
    while source.name != name && kept.len() > target.dim() && kept.last() == Some(&1) {
        kept.pop();
    }
    if kept != target.size() {
        problems.misshapen.push((name.to_owned(), size, target.size()));
    }
    let target_kind = target.kind();
    let fits = kind_of(info.dtype)
        .is_some_and(|kind| kind == target_kind || (is_float(kind) && is_float(target_kind)));
    if !fits {
        problems.wrong_kind.push((name.to_owned(), format!("{:?}", info.dtype), target_kind));
    }
}

fn to_size(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&n| n as i64).collect()
}

/// The types of a file that libtorch has kinds for.
const KINDS: [(Dtype, Kind); 10] = [
    (Dtype::F64, Kind::Double),
    (Dtype::F32, Kind::Float),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::I16, Kind::Int16),
    (Dtype::I8, Kind::Int8),
    (Dtype::U8, Kind::Uint8),
    (Dtype::BOOL, Kind::Bool),
];

fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|(other, _)| *other == dtype).map(|(_, kind)| *kind)
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    KINDS.iter().find(|(_, other)| *other == kind).map(|(dtype, _)| *dtype)
}

/// A header whose entries keep their order; that of the `safetensors` crate writes metadata in random order.
struct Header<'a> {
    metadata: BTreeMap<&'a str, &'a str>,
    tensors: Vec<(&'a str, TensorInfo)>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.tensors.len() + 1))?;
        map.serialize_entry("__metadata__", &self.metadata)?;
        for (name, info) in &self.tensors {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

/// The header, and the order of the tensors after it: widest kind first, which keeps all of them aligned, then by name.
fn layout<'a>(
    tensors: &'a [(String, Tensor)],
    metadata: &'a BTreeMap<String, String>,
    kind: Option<Kind>,
) -> Result<(Header<'a>, Vec<usize>)> {
    let mut typed = Vec::with_capacity(tensors.len());
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        let kind = written_kind(tensor, kind);
        let dtype =
            dtype_of(kind).ok_or_else(|| Error::UnsupportedKind { name: name.clone(), kind })?;
        typed.push((name.as_str(), dtype, index));
    }
    typed.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
    let mut offset = 0;
    let mut infos = Vec::with_capacity(typed.len());
    for &(name, dtype, index) in &typed {
        let tensor = &tensors[index].1;
        let end = offset + tensor.numel() * written_kind(tensor, kind).elt_size_in_bytes();
        let shape = tensor.size().into_iter().map(|n| n as usize).collect();
        infos.push((name, TensorInfo { dtype, shape, data_offsets: (offset, end) }));
        offset = end;
    }
    let mut metadata: BTreeMap<_, _> =
        metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    metadata.insert("format", "pt");
    let order = typed.into_iter().map(|(_, _, index)| index).collect();
    Ok((Header { metadata, tensors: infos }, order))
}

/// The header as JSON, padded with spaces to a multiple of 8 bytes.
fn padded_json(header: &Header<'_>) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(header)?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

/// The kind of a written tensor: only floating-point values are cast.
fn written_kind(tensor: &Tensor, kind: Option<Kind>) -> Kind {
    let own = tensor.kind();
    kind.filter(|_| is_float(own)).unwrap_or(own)
}

/// Checks that no finite value becomes infinite in another kind.
fn ensure_in_range(name: &str, tensor: &Tensor, kind: Kind) -> Result<()> {
    let own = tensor.kind();
    let is_narrower = kind.elt_size_in_bytes() < own.elt_size_in_bytes()
        || (own == Kind::BFloat16 && kind == Kind::Half);
    if !is_float(own) || !is_float(kind) || !is_narrower || tensor.numel() == 0 {
        return Ok(());
    }
    let largest = || {
        let values = tensor.f_detach()?;
        let largest = values.f_abs()?.f_nan_to_num(0.0, 0.0, 0.0)?.f_max()?;
        let is_lost = largest.f_to_kind(kind)?.f_isinf()?.f_int64_value(&[])? != 0;
        Ok(is_lost.then_some(largest.f_to_kind(Kind::Double)?.f_double_value(&[])?))
    };
    match largest().map_err(Error::torch("weights::cast"))? {
        Some(value) => Err(Error::OutOfRange { name: name.to_owned(), value, kind }),
        None => Ok(()),
    }
}

fn to_bytes(name: &str, tensor: &Tensor, kind: Kind) -> Result<Cow<'static, [u8]>> {
    ensure_in_range(name, tensor, kind)?;
    let copy = || {
        let tensor =
            tensor.f_detach()?.f_to_kind(kind)?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let len = tensor.numel();
        let mut bytes = vec![0; len * tensor.kind().elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, len)?;
        Ok(Cow::Owned(bytes))
    };
    copy().map_err(Error::torch("weights::save"))
}
