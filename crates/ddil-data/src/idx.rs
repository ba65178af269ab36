use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use flate2::read::GzDecoder;
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// The most that a file may hold, unpacked; twice as much as the largest data set of this format, EMNIST.
const MAX_BYTES: u64 = 1 << 30;
/// Magic number and three dimensions.
const LONGEST_HEADER: u64 = 16;

/// Bytes 0x08 (unsigned bytes) and the number of dimensions, after two zeros.
const IMAGES: (&[u8], &str) = (&[0, 0, 8, 3], "images (00 00 08 03)");
const LABELS: (&[u8], &str) = (&[0, 0, 8, 1], "labels (00 00 08 01)");

/// Images of an IDX file, `[n, rows, columns]`, `Uint8`. A file ending in `.gz` is unpacked.
///
/// # Errors
///
/// [`Error::Read`], also for a file that holds more than 1 GiB, [`Error::IdxHeader`], and [`Error::IdxLength`] if header and length disagree.
pub fn read_idx_images(path: &Path) -> Result<Tensor> {
    images_from(path, &read(path)?)
}

/// Labels of an IDX file, `[n]`, `Int64`. A file ending in `.gz` is unpacked.
///
/// # Errors
///
/// [`Error::Read`], also for a file that holds more than 1 GiB, [`Error::IdxHeader`], and [`Error::IdxLength`] if header and length disagree.
pub fn read_idx_labels(path: &Path) -> Result<Tensor> {
    labels_from(path, &read(path)?)
}

pub(crate) fn images_from(path: &Path, bytes: &[u8]) -> Result<Tensor> {
    let (dims, pixels) = split_header::<3>(path, bytes, IMAGES)?;
    to_tensor(pixels, &dims)
}

pub(crate) fn labels_from(path: &Path, bytes: &[u8]) -> Result<Tensor> {
    let (dims, labels) = split_header::<1>(path, bytes, LABELS)?;
    Ok(to_tensor(labels, &dims)?.to_kind(Kind::Int64))
}

/// Contents of a file, unpacked if its name says that it is packed.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let read = || {
        if path.extension().is_some_and(|extension| extension == "gz") {
            return unpack(GzDecoder::new(ddil_files::open_regular_file(path)?));
        }
        ddil_files::read_bounded(path, MAX_BYTES)
    };
    read().map_err(|source| Error::Read { path: PathBuf::from(path), source })
}

/// What is packed, as far as one byte beyond what its header promises: a small file can be packed that unpacks to any size.
fn unpack(mut packed: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    packed.by_ref().take(LONGEST_HEADER).read_to_end(&mut bytes)?;
    let num_dims = bytes.get(3).copied().unwrap_or(0).into();
    let (words, _) = bytes.get(4..).unwrap_or_default().as_chunks::<4>();
    let dims = words.iter().take(num_dims).map(|&word| u64::from(u32::from_be_bytes(word)));
    let promised = dims.fold(1, u64::saturating_mul);
    if promised > MAX_BYTES {
        let message = format!("it unpacks to more than the {MAX_BYTES} bytes that are read");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    packed.take(promised + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
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
    Tensor::f_from_data_size(values, &size, Kind::Uint8).map_err(Error::torch("read_idx"))
}
