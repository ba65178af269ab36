#![allow(unsafe_code, reason = "reserves room on disk, and copies out of mapped memory")]

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ddil_files::open_regular_file;
use memmap2::{MmapOptions, MmapRaw};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// A file of a header and rows of equal size, written with `write` and read through a mapping.
///
/// All of its space is reserved when it is created, and rows are written by the system's `write`: a disk that is full
/// or fails is an error, whereas a write to mapped memory would end the process. Readers copy what they need out of the
/// mapping, so only this value refers to the file. Do not shorten the file meanwhile: as with every mapped file, the
/// system ends a process that reads beyond its end. Its name may be removed.
///
/// # Example
///
/// ```
/// use ddil_libtorch::{RowFile, gather_rows};
/// use tch::{Kind, Tensor};
///
/// # let path = std::env::temp_dir().join(format!("ddil-rows-{}", std::process::id()));
/// let mut file = RowFile::create(&path, b"head", 8, 3)?;
/// file.write(1, &[1.0_f32, 2.0, 3.0, 4.0].map(f32::to_le_bytes).concat())?;
/// let mut pairs = Tensor::zeros([2, 2], tch::kind::FLOAT_CPU);
/// gather_rows(&mut pairs, 0, [(&file, 2, 0), (&file, 1, 1)])?;
/// assert_eq!(Vec::<f32>::try_from(pairs.view([4]))?, [3.0, 4.0, 1.0, 2.0]);
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RowFile {
    path: PathBuf,
    /// None when no more rows are to be written; the mapping remains valid without it.
    file: Option<File>,
    map: MmapRaw,
    head_bytes: usize,
    row_bytes: usize,
    num_rows: usize,
}

impl RowFile {
    /// Creates a file with all its space reserved; rows are zeros.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if the file exists already or the disk has no space, and then nothing is left of it;
    /// [`Error::Argument`] for rows of 0 bytes or an overflow of the file size.
    pub fn create(
        path: impl AsRef<Path>,
        head: &[u8],
        row_bytes: usize,
        num_rows: usize,
    ) -> Result<Self> {
        let path = path.as_ref();
        let len = file_bytes("RowFile::create", head.len(), row_bytes, num_rows)?;
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(path);
        let mut file = file.map_err(Error::file("create", path))?;
        let fill = || -> Result<Self> {
            reserve(&mut file, len as u64).map_err(Error::file("reserve room for", path))?;
            let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(head));
            written.map_err(Error::file("write", path))?;
            Self::mapped(path, file, len, head.len(), row_bytes, num_rows)
        };
        fill().inspect_err(|_| {
            // The first error is the one to report.
            let _ = fs::remove_file(path);
        })
    }

    /// Opens a file that [`create`](Self::create) made, for reading only.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if it cannot be read or mapped, [`Error::FileLength`] if its length is not the original one,
    /// [`Error::Argument`] as for [`create`](Self::create).
    pub fn open(
        path: impl AsRef<Path>,
        head_bytes: usize,
        row_bytes: usize,
        num_rows: usize,
    ) -> Result<Self> {
        let path = path.as_ref();
        let len = file_bytes("RowFile::open", head_bytes, row_bytes, num_rows)?;
        let file = open_regular_file(path).map_err(Error::file("open", path))?;
        let found = file.metadata().map_err(Error::file("open", path))?.len();
        if found != len as u64 {
            return Err(Error::FileLength { path: path.to_owned(), found, expected: len as u64 });
        }
        let mut file = Self::mapped(path, file, len, head_bytes, row_bytes, num_rows)?;
        file.seal();
        Ok(file)
    }

    fn mapped(
        path: &Path,
        file: File,
        len: usize,
        head_bytes: usize,
        row_bytes: usize,
        num_rows: usize,
    ) -> Result<Self> {
        // A raw pointer, since the bytes change with the file: no reference to them is ever created.
        let map = MmapOptions::new().len(len).map_raw_read_only(&file);
        let map = map.map_err(Error::file("open", path))?;
        let path = path.to_owned();
        Ok(Self { path, file: Some(file), map, head_bytes, row_bytes, num_rows })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Whether it has neither header nor rows, which is never the case.
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// Number of rows that fit.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Writes consecutive rows, starting at row `first`.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] unless they are whole rows within the file; [`Error::File`] if the write fails or the
    /// file is [sealed](Self::seal).
    pub fn write(&mut self, first: usize, rows: &[u8]) -> Result<()> {
        let room = self.num_rows.checked_sub(first).and_then(|n| n.checked_mul(self.row_bytes));
        let fits = room.is_some_and(|room| rows.len() <= room);
        if !fits || !rows.len().is_multiple_of(self.row_bytes) {
            return Err(Error::value(
                "RowFile::write",
                "rows",
                format!("{} bytes starting at row {first}", rows.len()),
                "whole rows inside the file",
            ));
        }
        let offset = self.head_bytes + first * self.row_bytes;
        let written = match &mut self.file {
            Some(file) => {
                file.seek(SeekFrom::Start(offset as u64)).and_then(|_| file.write_all(rows))
            }
            None => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the file is sealed: no rows can be written any more",
            )),
        };
        written.map_err(Error::file("write", &self.path))
    }

    /// Closes the file for writing; its rows can still be read, and it no longer uses a file handle.
    pub fn seal(&mut self) {
        self.file = None;
    }

    /// First byte of a part of a row, after checking that it lies in the mapping.
    fn part(&self, row: usize, offset: usize, num_bytes: usize) -> Result<*const u8> {
        let inside = offset.checked_add(num_bytes).is_some_and(|end| end <= self.row_bytes);
        if row >= self.num_rows || !inside {
            return Err(Error::value(
                OP,
                "rows",
                format!("bytes {offset}..{offset}+{num_bytes} of row {row}"),
                "a part of a row of the file",
            ));
        }
        // No overflow: `file_bytes` counted the whole file.
        Ok(self.map.as_ptr().wrapping_add(self.head_bytes + row * self.row_bytes + offset))
    }
}

const OP: &str = "gather_rows";

/// Copies parts of rows of files into rows of `out`: for each `(file, row, to)`, the bytes of `row` from `offset` on
/// become row `to` of `out`; the row length of `out` is the number of bytes.
///
/// Numbers are in the processor's byte order.
///
/// # Shapes and units
///
/// - `out`: `[n, ..]`, contiguous, on the CPU; rows that are not named do not change
/// - `offset`: in bytes, from the beginning of a row
///
/// # Errors
///
/// [`Error::UnsupportedDevice`] or [`Error::UnsupportedKind`] for a tensor that bytes cannot be copied to,
/// [`Error::Argument`] for one that is not contiguous and for rows beyond their file or `out`. Rows before the
/// invalid one have been copied then.
pub fn gather_rows<'a>(
    out: &mut Tensor,
    offset: usize,
    rows: impl IntoIterator<Item = (&'a RowFile, usize, usize)>,
) -> Result<()> {
    let (num_rows, row_bytes) = ensure_writable(OP, out)?;
    if matches!(out.kind(), Kind::Bool | Kind::QInt8 | Kind::QUInt8 | Kind::QInt32) {
        let (kind, expected) = (out.kind(), "a kind that is not quantised");
        return Err(Error::UnsupportedKind { op: OP, kind, expected });
    }
    let start = out.data_ptr().cast::<u8>();
    for (file, row, to) in rows {
        let from = file.part(row, offset, row_bytes)?;
        if to >= num_rows {
            return Err(Error::value(OP, "rows", to.to_string(), "an index of a row of `out`"));
        }
        // SAFETY: `part` found `row_bytes` bytes at `from` inside the file's mapping, which `file` keeps; `out` is
        // contiguous and has more than `to` rows of `row_bytes` bytes, of which every bit pattern is a value. The two
        // do not overlap, since no tensor lies over a `RowFile`.
        unsafe { std::ptr::copy_nonoverlapping(from, start.add(to * row_bytes), row_bytes) };
    }
    Ok(())
}

/// Copies the rows of `from`, in order, to the given rows of `out`, as `index_copy_` along the first dimension does,
/// but by whole rows instead of single values.
///
/// # Shapes and units
///
/// - `out`: `[n, ..]`, contiguous, on the CPU; rows that are not named do not change
/// - `from`: `[rows, ..]`, contiguous, on the CPU, of the kind of `out`
///
/// # Errors
///
/// [`Error::UnsupportedDevice`] for tensors on other devices, [`Error::Argument`] for tensors that are not contiguous,
/// do not fit each other or do not have such rows; nothing is copied then.
///
/// # Example
///
/// ```
/// use ddil_libtorch::copy_rows_;
/// use tch::{Tensor, kind};
///
/// let mut out = Tensor::zeros([3, 2], kind::FLOAT_CPU);
/// copy_rows_(&mut out, &[2, 0], &Tensor::from_slice2(&[[1.0_f32, 2.0], [3.0, 4.0]]))?;
/// assert_eq!(out, Tensor::from_slice2(&[[3.0_f32, 4.0], [0.0, 0.0], [1.0, 2.0]]));
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
pub fn copy_rows_(out: &mut Tensor, rows: &[usize], from: &Tensor) -> Result<()> {
    const OP: &str = "copy_rows_";
    let (num_rows, row_bytes) = ensure_writable(OP, out)?;
    let given = ensure_writable(OP, from)?;
    let fits = given == (rows.len(), row_bytes) && from.kind() == out.kind();
    if !fits || rows.iter().any(|&row| row >= num_rows) {
        return Err(Error::value(
            OP,
            "from",
            format!("{:?} of {:?} to rows {rows:?}", from.kind(), from.size()),
            "one row per index, of the kind and shape of the rows of `out`, and indices below their number",
        ));
    }
    let (start, mut given) =
        (out.data_ptr().cast::<u8>(), from.data_ptr().cast::<u8>().cast_const());
    for &row in rows {
        // SAFETY: both are contiguous, on the CPU and have rows of `row_bytes` bytes: `out` more than `row` of them,
        // and
        // `from` as many as there are iterations. `copy` allows overlap.
        unsafe {
            std::ptr::copy(given, start.add(row * row_bytes), row_bytes);
            given = given.add(row_bytes);
        }
    }
    Ok(())
}

/// Number of rows of a tensor and bytes of each, after checking that bytes can be copied there.
fn ensure_writable(op: &'static str, tensor: &Tensor) -> Result<(usize, usize)> {
    if !tensor.defined() {
        return Err(Error::value(op, "out", "undefined", "a tensor with rows"));
    }
    let device = tensor.device();
    if device != Device::Cpu {
        return Err(Error::UnsupportedDevice { op, device });
    }
    let shape = tensor.size();
    let contiguous = tensor.is_contiguous();
    let (Some(&num_rows), true) = (shape.first(), contiguous) else {
        return Err(Error::value(
            op,
            "out",
            format!("of shape {shape:?}, contiguous: {contiguous}"),
            "a contiguous tensor with at least one dimension",
        ));
    };
    let values: i64 = shape[1..].iter().product();
    Ok((num_rows as usize, values as usize * tensor.kind().elt_size_in_bytes()))
}

/// Length of a file in bytes.
fn file_bytes(
    op: &'static str,
    head_bytes: usize,
    row_bytes: usize,
    num_rows: usize,
) -> Result<usize> {
    let total = row_bytes.checked_mul(num_rows).and_then(|rows| rows.checked_add(head_bytes));
    let fits = total.filter(|&total| total > 0 && row_bytes > 0 && i64::try_from(total).is_ok());
    fits.ok_or_else(|| {
        Error::value(
            op,
            "num_rows",
            format!("{num_rows}, of {row_bytes} bytes each after a header of {head_bytes} bytes"),
            "at least one byte per row, and a file size that does not overflow",
        )
    })
}

/// Reserves the space on the disk, so that later writes do not run out of it.
#[cfg(target_os = "linux")]
fn reserve(file: &mut File, len: u64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    loop {
        // SAFETY: the descriptor is open as long as `file` is; the call does not access our memory.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len as libc::off_t) } {
            0 => return Ok(()),
            libc::EINTR => {}
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn reserve(file: &mut File, len: u64) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), len), file).map(drop)
}
