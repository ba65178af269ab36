use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use flate2::read::GzDecoder;
use tch::{Kind, Tensor};

use super::{Error, Result};

/// Bytes 0x08 (unsigned bytes) and the number of dimensions, after two zeros.
const IMAGES: (&[u8], &str) = (&[0, 0, 8, 3], "images (00 00 08 03)");
const LABELS: (&[u8], &str) = (&[0, 0, 8, 1], "labels (00 00 08 01)");

/// Images of an IDX file, `[n, rows, columns]`, `Uint8`. A file ending in `.gz` is unpacked.
///
/// # Errors
///
/// [`Error::Read`], [`Error::IdxHeader`], and [`Error::IdxLength`] if header and length disagree.
pub fn read_idx_images(path: &Path) -> Result<Tensor> {
    images_from(path, &read(path)?)
}

/// Labels of an IDX file, `[n]`, `Int64`. A file ending in `.gz` is unpacked.
///
/// # Errors
///
/// [`Error::Read`], [`Error::IdxHeader`], and [`Error::IdxLength`] if header and length disagree.
pub fn read_idx_labels(path: &Path) -> Result<Tensor> {
    labels_from(path, &read(path)?)
}

pub(super) fn images_from(path: &Path, bytes: &[u8]) -> Result<Tensor> {
    let (dims, pixels) = split_header::<3>(path, bytes, IMAGES)?;
    to_tensor(pixels, &dims)
}

pub(super) fn labels_from(path: &Path, bytes: &[u8]) -> Result<Tensor> {
    let (dims, labels) = split_header::<1>(path, bytes, LABELS)?;
    Ok(to_tensor(labels, &dims)?.to_kind(Kind::Int64))
}

/// Contents of a file, unpacked if its name says that it is packed.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let read = || {
        let mut bytes = Vec::new();
        let mut file = File::open(path)?;
        if path.extension().is_some_and(|extension| extension == "gz") {
            GzDecoder::new(file).read_to_end(&mut bytes)?;
        } else {
            file.read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    };
    read().map_err(|source| Error::Read { path: PathBuf::from(path), source })
}

/// The dimensions in the header and the values behind it.
fn split_header<'a, const N: usize>(
    path: &Path,
    bytes: &'a [u8],
    (magic, expected): (&[u8], &'static str),
) -> Result<([u32; N], &'a [u8])> {
    let Some(rest) = bytes.strip_prefix(magic) else {
        let found = bytes.iter().take(magic.len()).copied().collect();
        return Err(Error::IdxHeader { path: PathBuf::from(path), found, expected });
    };
    let (words, _) = rest.as_chunks::<4>();
    let dims: Vec<u32> = words.iter().take(N).map(|&word| u32::from_be_bytes(word)).collect();
    let header = magic.len() + 4 * N;
    let num_values = dims.iter().fold(1_u64, |product, &dim| product.saturating_mul(dim.into()));
    let expected = num_values.saturating_add(header as u64);
    match <[u32; N]>::try_from(dims.as_slice()) {
        Ok(dims) if bytes.len() as u64 == expected => Ok((dims, &bytes[header..])),
        _ => {
            let found = bytes.len() as u64;
            // A file that ends within its header makes no length; the header alone is the least.
            let expected = if dims.len() == N { expected } else { header as u64 };
            Err(Error::IdxLength { path: PathBuf::from(path), dims, found, expected })
        }
    }
}

fn to_tensor(values: &[u8], dims: &[u32]) -> Result<Tensor> {
    let size: Vec<i64> = dims.iter().map(|&dim| dim.into()).collect();
    Tensor::f_from_data_size(values, &size, Kind::Uint8)
        .map_err(|source| Error::Torch { op: "read_idx", source })
}
