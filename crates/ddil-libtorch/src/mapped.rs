#![allow(unsafe_code, reason = "lends mapped memory to C++")]

use std::ffi::c_void;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ddil_files::open_regular_file;
use memmap2::{Mmap, MmapOptions, MmapRaw};
use tch::{Kind, Tensor};

use crate::ffi::{self, kind_number, new_tensor};
use crate::{Error, Result};

/// A file whose tensors are used where they lie: opening takes no time, and a page is read when it is first touched.
///
/// Tensors may be changed in place; the changes stay in memory, and the file is as it was. The mapping lives as long
/// as the last tensor over it. Do not shorten or overwrite the file meanwhile: as with every mapped file, what the
/// tensors hold would change with it, or the process would be stopped by the system. Replace a file by renaming
/// another over it.
///
/// # Example
///
/// ```
/// use ddil_libtorch::MappedFile;
/// use tch::Kind;
///
/// # let folder = std::env::temp_dir().join(format!("ddil-mapped-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder)?;
/// # let path = folder.join("numbers");
/// std::fs::write(&path, [1.0_f32, 2.0, 3.0].map(f32::to_le_bytes).concat())?;
/// let numbers = MappedFile::open(&path)?.tensor(4, [2], Kind::Float)?;
/// assert_eq!(Vec::<f32>::try_from(numbers)?, [2.0, 3.0]);
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    /// What `bytes` lends: tensors write to the other mapping, so that a slice from here never changes under its
    /// reader. Both show the same pages of the system's cache, so the second costs addresses, not memory.
    view: Mmap,
    private: Arc<MmapRaw>,
}

impl MappedFile {
    /// Maps a whole file.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] if it cannot be read or mapped, or is not a regular file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = || -> io::Result<_> {
            let file = open_regular_file(path)?;
            // SAFETY: the file is only read. That nobody else shortens it meanwhile is what the docs ask of the
            // caller, as no system can promise it.
            let view = unsafe { MmapOptions::new().map(&file)? };
            // SAFETY: as above, and writes go to copies of the pages. One length for both mappings.
            let private = unsafe { MmapOptions::new().len(view.len()).map_copy(&file)? };
            Ok((view, MmapRaw::from(private)))
        };
        let (view, private) =
            map().map_err(|source| Error::Map { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), view, private: Arc::new(private) })
    }

    /// The file as it is on disk, whatever was written to its tensors.
    pub fn bytes(&self) -> &[u8] {
        &self.view
    }

    /// The file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives back the memory of the pages read so far, which are read anew when they are next touched, and says whether
    /// it could: only where the system has such a call, and while no tensor lies over the file.
    ///
    /// What was written to tensors that are gone by now is forgotten.
    ///
    /// # Example
    ///
    /// ```
    /// # use ddil_libtorch::MappedFile;
    /// # let path = std::env::temp_dir().join(format!("ddil-pages-{}", std::process::id()));
    /// std::fs::write(&path, [7; 3])?;
    /// let mut file = MappedFile::open(&path)?;
    /// let numbers = file.tensor(0, [3], tch::Kind::Uint8)?;
    /// assert!(!file.release_pages());
    /// drop(numbers);
    /// assert_eq!(file.release_pages(), cfg!(unix));
    /// assert_eq!(file.bytes(), [7; 3]);
    /// # std::fs::remove_file(&path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn release_pages(&mut self) -> bool {
        // No tensor and, as `self` is borrowed mutably, nobody who could make one.
        let Some(private) = Arc::get_mut(&mut self.private) else { return false };
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the bytes of the private mapping fall back to those of the file, which nobody sees happen.
            let private = unsafe { private.unchecked_advise(DontNeed) };
            // SAFETY: this mapping was never written to, so its pages are the file's before and after.
            let view = unsafe { self.view.unchecked_advise(DontNeed) };
            private.is_ok() && view.is_ok()
        }
        #[cfg(not(unix))]
        {
            let _ = private;
            false
        }
    }

    /// A contiguous CPU tensor over the bytes from `offset` on, without a copy.
    ///
    /// Numbers are taken in the processor's byte order.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] unless it lies within the file (a negative size never does), [`Error::Misaligned`] unless
    /// its first byte is at a multiple of the element's size, [`Error::UnsupportedKind`] for quantised kinds,
    /// [`Error::NotBool`] for a truth value that is neither 0 nor 1.
    pub fn tensor(&self, offset: usize, shape: impl AsRef<[i64]>, kind: Kind) -> Result<Tensor> {
        let shape = shape.as_ref();
        let num_bytes = self.ensure_readable(offset, shape, kind)?;
        if kind == Kind::Bool {
            self.ensure_bool(offset, num_bytes)?;
        }
        // The pointer keeps the mapping's right to be written to.
        let data = self.private.as_mut_ptr().wrapping_add(offset).cast::<c_void>();
        let owner = Arc::into_raw(Arc::clone(&self.private)).cast_mut().cast::<c_void>();
        // SAFETY: `ensure_readable` found the bytes inside the mapping and aligned for `kind`, every pattern of bits is
        // a value of that kind (`ensure_bool` saw to the one exception), the mapping may be written to, and `owner`
        // keeps it until C++ calls `release`, once, whether or not it makes a tensor.
        new_tensor("MappedFile::tensor", |out| unsafe {
            ffi::ddil_from_blob(
                data,
                shape.as_ptr(),
                shape.len(),
                kind_number(kind),
                owner,
                release,
                out,
            )
        })
    }

    /// Number of bytes of such a tensor, once it is known to lie in the file and to start at a legal address.
    fn ensure_readable(&self, offset: usize, shape: &[i64], kind: Kind) -> Result<usize> {
        if matches!(kind, Kind::QInt8 | Kind::QUInt8 | Kind::QInt32) {
            let expected = "kinds that are not quantised";
            return Err(Error::UnsupportedKind { op: "MappedFile::tensor", kind, expected });
        }
        let len = self.view.len();
        let num_bytes = num_bytes(shape, kind);
        let fits = num_bytes.and_then(|n| n.checked_add(offset)).is_some_and(|end| end <= len);
        let (Some(num_bytes), true) = (num_bytes, fits) else {
            return Err(Error::OutOfBounds {
                path: self.path.clone(),
                offset,
                shape: shape.to_vec(),
                kind,
                len,
            });
        };
        // The mapping itself starts at a page, so the offset decides.
        let alignment = kind.elt_size_in_bytes();
        if !offset.is_multiple_of(alignment) {
            return Err(Error::Misaligned { path: self.path.clone(), offset, kind, alignment });
        }
        Ok(num_bytes)
    }

    fn ensure_bool(&self, offset: usize, num_bytes: usize) -> Result<()> {
        let bytes = &self.view[offset..offset + num_bytes];
        match bytes.iter().position(|&byte| byte > 1) {
            Some(at) => Err(Error::NotBool {
                path: self.path.clone(),
                offset: offset + at,
                value: bytes[at],
            }),
            None => Ok(()),
        }
    }
}

/// Called by C++ when the last tensor over a mapping is gone.
extern "C" fn release(owner: *mut c_void) {
    // SAFETY: `owner` came from `Arc::into_raw` in `tensor` and comes back once.
    drop(unsafe { Arc::from_raw(owner.cast_const().cast::<MmapRaw>()) });
}

/// `None` for a negative size or more than can be counted, even where another size is 0: libtorch multiplies in order.
fn num_bytes(shape: &[i64], kind: Kind) -> Option<usize> {
    let mut product = kind.elt_size_in_bytes();
    let mut empty = false;
    for &size in shape {
        let size = usize::try_from(size).ok()?;
        empty |= size == 0;
        product = product.checked_mul(size.max(1))?;
    }
    i64::try_from(product).ok()?;
    Some(if empty { 0 } else { product })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_without_overflow() {
        assert_eq!(num_bytes(&[], Kind::Double), Some(8));
        assert_eq!(num_bytes(&[3, 5], Kind::Half), Some(30));
        assert_eq!(num_bytes(&[3, 0], Kind::Float), Some(0));
        assert_eq!(num_bytes(&[3, -1], Kind::Float), None);
        assert_eq!(num_bytes(&[i64::MAX, 4], Kind::Uint8), None);
        assert_eq!(num_bytes(&[i64::MAX, i64::MAX, 0], Kind::Uint8), None);
        assert_eq!(num_bytes(&[i64::MAX], Kind::Int16), None);
    }
}
