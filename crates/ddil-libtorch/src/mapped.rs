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

/// A memory-mapped file of tensors: opening takes no time, and a page is read when it is first accessed.
///
/// Tensors may be changed in place; the changes stay in memory, and the file is unchanged. The mapping lives as long
/// as the last tensor over it. Do not shorten or overwrite the file meanwhile: as with every mapped file, the
/// contents of the tensors would change with it, or the system would end the process. Replace a file by renaming
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
    /// The mapping behind `bytes`: tensors write to the other mapping, so a slice of this one never changes while it is
    /// borrowed. Both map the same pages of the system's cache, so the second costs addresses, not memory.
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
            // SAFETY: the file is only read. The docs require the caller to make sure that nobody shortens it
            // meanwhile, which no system can guarantee.
            let view = unsafe { MmapOptions::new().map(&file)? };
            // SAFETY: as above, and writes go to copies of the pages. Both mappings have the same length.
            let private = unsafe { MmapOptions::new().len(view.len()).map_copy(&file)? };
            Ok((view, MmapRaw::from(private)))
        };
        let (view, private) =
            map().map_err(|source| Error::Map { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), view, private: Arc::new(private) })
    }

    /// The contents of the file on disk, without changes made through tensors.
    pub fn bytes(&self) -> &[u8] {
        &self.view
    }

    /// The file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Releases the memory of the pages read so far, which are read again at the next access; returns whether it
    /// succeeded: only if the system has such a call, and while no tensor uses the file.
    ///
    /// Changes made through tensors that have been dropped are lost.
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
        // There is no tensor and, as `self` is borrowed mutably, nobody who could create one.
        let Some(private) = Arc::get_mut(&mut self.private) else { return false };
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the bytes of the private mapping revert to those of the file, which nobody observes.
            let private = unsafe { private.unchecked_advise(DontNeed) };
            // SAFETY: this mapping was never written to, so its pages equal the file's before and after.
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
    /// Numbers are in the processor's byte order.
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
        // This pointer has the mapping's write permission.
        let data = self.private.as_mut_ptr().wrapping_add(offset).cast::<c_void>();
        let owner = Arc::into_raw(Arc::clone(&self.private)).cast_mut().cast::<c_void>();
        // SAFETY: `ensure_readable` found the bytes inside the mapping and aligned for `kind`, every bit pattern is
        // a value of that kind (`ensure_bool` checked the one exception), the mapping may be written to, and `owner`
        // keeps it until C++ calls `release`, once, whether or not it creates a tensor.
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

    /// Number of bytes of such a tensor, after checking that it lies in the file and starts at an aligned address.
    fn ensure_readable(&self, offset: usize, shape: &[i64], kind: Kind) -> Result<usize> {
        if matches!(kind, Kind::QInt8 | Kind::QUInt8 | Kind::QInt32) {
            let expected = "a kind that is not quantised";
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
        // The mapping itself starts at a page boundary, so the offset decides.
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

/// Called by C++ when the last tensor over a mapping is dropped.
extern "C" fn release(owner: *mut c_void) {
    // SAFETY: `owner` came from `Arc::into_raw` in `tensor` and is returned once.
    drop(unsafe { Arc::from_raw(owner.cast_const().cast::<MmapRaw>()) });
}

/// `None` for a negative size or on overflow, even if another size is 0: libtorch multiplies in order.
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
