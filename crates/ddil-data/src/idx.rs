use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use flate2::read::GzDecoder;
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Size limit of a file after decompression: twice the size of EMNIST, the largest data set in this format.
const MAX_BYTES: u64 = 1 << 30;
/// Bytes of the longest header: magic number and three dimensions.
const MAX_HEADER_BYTES: u64 = 16;

/// Magic numbers: two zeros, 0x08 for unsigned bytes, and the number of dimensions.
const IMAGES: (&[u8], &str) = (&[0, 0, 8, 3], "images (00 00 08 03)");
const LABELS: (&[u8], &str) = (&[0, 0, 8, 1], "labels (00 00 08 01)");

/// The images of an IDX file, `[n, rows, columns]`, `Uint8`. A file ending in `.gz` is decompressed.
///
/// # Errors
///
/// [`Error::Read`], also for more than 1 GiB of data; [`Error::IdxHeader`]; [`Error::IdxLength`] if header and length
/// disagree.
pub fn read_idx_images(path: &Path) -> Result<Tensor> {
    images_from(path, &read(path)?)
}

/// The labels of an IDX file, `[n]`, `Int64`. A file ending in `.gz` is decompressed.
///
/// # Errors
///
/// [`Error::Read`], also for more than 1 GiB of data; [`Error::IdxHeader`]; [`Error::IdxLength`] if header and length
/// disagree.
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

/// The content of a file, decompressed if its name ends in `.gz`.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let read = || {
        if path.extension().is_some_and(|extension| extension == "gz") {
            return decompress(GzDecoder::new(ddil_files::open_regular_file(path)?));
        }
        ddil_files::read_bounded(path, MAX_BYTES)
    };
    read().map_err(|source| Error::Read { path: PathBuf::from(path), source })
}

/// Decompresses at most one byte more than the header states: a small compressed file can expand to any size.
fn decompress(mut compressed: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    compressed.by_ref().take(MAX_HEADER_BYTES).read_to_end(&mut bytes)?;
    let num_dims = bytes.get(3).copied().unwrap_or(0).into();
    let (words, _) = bytes.get(4..).unwrap_or_default().as_chunks::<4>();
    let dims = words.iter().take(num_dims).map(|&word| u64::from(u32::from_be_bytes(word)));
    let stated = dims.fold(1, u64::saturating_mul);
    if stated > MAX_BYTES {
        let message = format!("it decompresses to more than the limit of {MAX_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    compressed.take(stated + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The dimensions in the header and the values after it.
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
            // A file that ends within its header: at least the header is expected.
            let expected = if dims.len() == N { expected } else { header as u64 };
            Err(Error::IdxLength { path: PathBuf::from(path), dims, found, expected })
        }
    }
}

fn to_tensor(values: &[u8], dims: &[u32]) -> Result<Tensor> {
    let size: Vec<i64> = dims.iter().map(|&dim| dim.into()).collect();
    Tensor::f_from_data_size(values, &size, Kind::Uint8).map_err(Error::torch("read_idx"))
}
