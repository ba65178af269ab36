//! Writes named tensors to a safetensors file and reads them, one tensor in memory at a time.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Write},
    path::Path,
};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// The header limit of the format itself.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Writes tensors in the same layout as the `safetensors` crate, without a copy of all of them.
pub(super) fn write_tensors(
    path: &Path,
    file: &mut impl Write,
    tensors: &[(String, Tensor)],
) -> Result<()> {
    let refused = |reason: String| refusal("write", path, reason);
    let mut tensors: Vec<&(String, Tensor)> = tensors.iter().collect();
    // The format's order: by decreasing alignment, so that every tensor is aligned, then by name.
    tensors.sort_by(|(left_name, left), (right_name, right)| {
        let size = |tensor: &Tensor| tensor.kind().elt_size_in_bytes();
        size(right).cmp(&size(left)).then_with(|| left_name.cmp(right_name))
    });
    let header = header(&tensors).map_err(refused)?;
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], &header]
        .iter()
        .try_for_each(|part| file.write_all(part).map_err(Error::io("write", path)))?;
    for (name, tensor) in tensors {
        let bytes = bytes_of(tensor).map_err(|error| refused(format!("`{name}`: {error}")))?;
        file.write_all(&bytes).map_err(Error::io("write", path))?;
    }
    Ok(())
}

fn header(tensors: &[&(String, Tensor)]) -> Result<Vec<u8>, String> {
    let mut infos: Vec<(String, TensorInfo)> = Vec::with_capacity(tensors.len());
    let mut offset = 0;
    for (name, tensor) in tensors {
        let dtype = dtype_of(tensor.kind()).ok_or_else(|| {
            format!("`{name}` is of kind {:?}, which safetensors does not support", tensor.kind())
        })?;
        let end = offset + tensor.numel() * tensor.kind().elt_size_in_bytes();
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        infos.push((name.clone(), TensorInfo { dtype, shape, data_offsets: (offset, end) }));
        offset = end;
    }
    let mut names: Vec<&String> = infos.iter().map(|(name, _)| name).collect();
    names.sort();
    if let Some([name, ..]) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("the name `{name}` occurs twice"));
    }
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(about), infos).map_err(|error| error.to_string())?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| error.to_string())?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>, tch::TchError> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}

/// Reads all tensors of a file onto the CPU, in the stored kinds, sorted by name.
pub(super) fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let refused = |reason: String| refusal("read", path, reason);
    let io = || Error::io("read", path);
    let mut file = File::open(path).map_err(io())?;
    let file_bytes = file.metadata().map_err(io())?.len();

    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io())?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > file_bytes {
        return Err(refused(format!(
            "its header has {length} bytes, but the file only {file_bytes}"
        )));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(io())?;
    let metadata: Metadata =
        ddil_files::parse_json(&header).map_err(|error| refused(error.to_string()))?;
    if 8 + length + metadata.data_len() as u64 != file_bytes {
        return Err(refused(format!("its header does not describe a file of {file_bytes} bytes")));
    }

    let mut tensors = Vec::new();
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        file.read_exact(&mut bytes).map_err(io())?;
        let tensor =
            tensor_of(&bytes, info).map_err(|error| refused(format!("`{name}`: {error}")))?;
        tensors.push((name, tensor));
    }
    tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
    Ok(tensors)
}

fn tensor_of(bytes: &[u8], info: &TensorInfo) -> Result<Tensor, String> {
    let kind =
        kind_of(info.dtype).ok_or_else(|| format!("dtype {:?} is not supported", info.dtype))?;
    let shape: Vec<i64> = info.shape.iter().map(|&size| size as i64).collect();
    Tensor::f_from_data_size(bytes, &shape, kind).map_err(|error| error.to_string())
}

/// The kinds that both libtorch and safetensors support.
const KINDS: [(Kind, Dtype); 9] = [
    (Kind::Uint8, Dtype::U8),
    (Kind::Int8, Dtype::I8),
    (Kind::Int16, Dtype::I16),
    (Kind::Int, Dtype::I32),
    (Kind::Int64, Dtype::I64),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Float, Dtype::F32),
    (Kind::Double, Dtype::F64),
];

fn dtype_of(kind: Kind) -> Option<Dtype> {
    KINDS.iter().find(|pair| pair.0 == kind).map(|pair| pair.1)
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|pair| pair.1 == dtype).map(|pair| pair.0)
}

fn refusal(action: &'static str, path: &Path, reason: String) -> Error {
    Error::Tensors { action, path: path.to_owned(), reason }
}
