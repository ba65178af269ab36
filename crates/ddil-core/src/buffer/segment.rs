//! Files of spilled states.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crc32fast::Hasher;
use ddil_files::open_regular_file;
use ddil_libtorch::RowFile;
use serde::Serialize;
use tch::Kind;

use crate::error::{Error, Result};
use crate::saved::SavedFile;

/// Size of the header of a file; a multiple of the page size, so that rows of whole pages are aligned to pages.
pub(super) const HEAD_BYTES: usize = 4096;
/// First bytes of every file of spilled states.
const MAGIC: &str = "ddil buffer states\n";
/// Version of the layout described here.
const FORMAT_VERSION: u32 = 1;
/// Prefix and suffix of a file name, around grid index and number.
const PREFIX: &str = "ring_";
const SUFFIX: &str = ".rows";
/// Bytes of a file that are read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// One stored field of each state: its values, or a part of its conditioning.
#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Bytes per row.
    pub(super) shape: Vec<i64>,
}

impl Column {
    pub(super) fn bytes(&self) -> usize {
        self.shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }
}

/// Location and layout of files of spilled states.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) folder: PathBuf,
    /// In their order within a row, without gaps.
    pub(super) columns: Vec<Column>,
    /// Rows per file.
    pub(super) segment_rows: usize,
}

/// Header of a file, as JSON after [`MAGIC`].
#[derive(Serialize)]
struct Head<'a> {
    format_version: u32,
    grid_index: usize,
    segment: u64,
    num_rows: usize,
    columns: Vec<HeadColumn<'a>>,
}

#[derive(Serialize)]
struct HeadColumn<'a> {
    name: &'a str,
    kind: String,
    shape: &'a [i64],
}

impl Layout {
    pub(super) fn row_bytes(&self) -> usize {
        self.columns.iter().map(Column::bytes).sum()
    }

    /// Name of a file.
    pub(super) fn name(ring: usize, number: u64) -> String {
        format!("{PREFIX}{:02}_{number:06}{SUFFIX}", ring + 1)
    }

    /// Whether a file name may come from [`name`](Self::name).
    pub(super) fn is_name(name: &str) -> bool {
        let number = name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(SUFFIX));
        number.is_some_and(|text| text.chars().all(|c| c.is_ascii_digit() || c == '_'))
    }

    fn head(&self, ring: usize, number: u64) -> Result<Vec<u8>> {
        let columns = self.columns.iter().map(|Column { name, kind, shape }| HeadColumn {
            name,
            kind: format!("{kind:?}"),
            shape,
        });
        let head = Head {
            format_version: FORMAT_VERSION,
            grid_index: ring + 1,
            segment: number,
            num_rows: self.segment_rows,
            columns: columns.collect(),
        };
        let json = serde_json::to_string(&head)
            .map_err(|e| Error::Restore { what: "buffer", problem: e.to_string() })?;
        let mut bytes = [MAGIC.as_bytes(), json.as_bytes(), b"\n"].concat();
        if bytes.len() > HEAD_BYTES {
            let problem = format!(
                "have a description of {} bytes; expected at most {HEAD_BYTES}",
                bytes.len()
            );
            return Err(Error::Conditioning {
                op: "AggregationBuffer",
                field: "parts".to_owned(),
                problem,
            });
        }
        bytes.resize(HEAD_BYTES, b' ');
        Ok(bytes)
    }
}

/// A file of consecutive states of one ring. It grows row by row, and rows never change once written; the file is
/// removed when this is dropped.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) file: RowFile,
    pub(super) written: usize,
    /// Of the header and the rows so far.
    crc32: Hasher,
    bytes: u64,
}

impl Segment {
    pub(super) fn create(layout: &Layout, ring: usize, number: u64) -> Result<Self> {
        let head = layout.head(ring, number)?;
        let folder = &layout.folder;
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let path = folder.join(Layout::name(ring, number));
        let file = RowFile::create(path, &head, layout.row_bytes(), layout.segment_rows)
            .map_err(|source| Error::Spill { folder: folder.clone(), source: source.into() })?;
        let mut crc32 = Hasher::new();
        crc32.update(&head);
        Ok(Self { number, file, written: 0, crc32, bytes: HEAD_BYTES as u64 })
    }

    /// Writes rows after those present. They are not counted before [`advance`](Self::advance).
    pub(super) fn write(&mut self, layout: &Layout, rows: &[u8]) -> Result<()> {
        let written = self.file.write(self.written, rows);
        let folder = &layout.folder;
        written.map_err(|source| Error::Spill { folder: folder.clone(), source: source.into() })
    }

    /// Counts the rows that were just written.
    pub(super) fn advance(&mut self, layout: &Layout, rows: &[u8]) {
        self.crc32.update(rows);
        self.bytes += rows.len() as u64;
        self.written += rows.len() / layout.row_bytes();
        if self.written == layout.segment_rows {
            self.file.seal();
        }
    }

    /// The reference to it in a saved state.
    pub(super) fn saved(&self, ring: usize) -> SavedFile {
        SavedFile {
            name: Layout::name(ring, self.number),
            path: self.file.path().to_owned(),
            bytes: self.bytes,
            crc32: self.crc32.clone().finalize(),
        }
    }

    /// A saved file with `written` rows, after checking that every byte is the one that was written.
    ///
    /// A full file is shared, as it will not change. A file with room is copied: two buffers may be restored from it
    /// and then diverge.
    pub(super) fn restore(
        layout: &Layout,
        ring: usize,
        number: u64,
        written: usize,
        saved: &SavedFile,
    ) -> Result<Self> {
        let refuse = |problem| Err(Error::SavedFile { path: saved.path.clone(), problem });
        let head = layout.head(ring, number)?;
        let bytes = (HEAD_BYTES + written * layout.row_bytes()) as u64;
        if saved.bytes != bytes {
            return refuse(format!("{} bytes of it were saved; expected {bytes}", saved.bytes));
        }
        ensure_head(&saved.path, &head)?;
        saved.ensure_intact()?;
        if written < layout.segment_rows {
            return Self::copied(layout, ring, number, saved);
        }
        let path = layout.folder.join(Layout::name(ring, number));
        fs::create_dir_all(&layout.folder).map_err(Error::io("create", &layout.folder))?;
        saved.link_to(&path)?;
        let file = RowFile::open(&path, HEAD_BYTES, layout.row_bytes(), layout.segment_rows);
        let file = file.inspect_err(|_| {
            // The file is ours and useless; the first error is the one to report.
            let _ = fs::remove_file(&path);
        })?;
        Ok(Self { number, file, written, crc32: saved.hasher(), bytes })
    }

    fn copied(layout: &Layout, ring: usize, number: u64, saved: &SavedFile) -> Result<Self> {
        let mut copy = Self::create(layout, ring, number)?;
        let mut source = open_regular_file(&saved.path).map_err(Error::io("open", &saved.path))?;
        source.seek(SeekFrom::Start(HEAD_BYTES as u64)).map_err(Error::io("read", &saved.path))?;
        let row_bytes = layout.row_bytes();
        let mut left = (saved.bytes as usize - HEAD_BYTES) / row_bytes;
        let mut rows = vec![0; left.min((CHUNK_BYTES / row_bytes).max(1)) * row_bytes];
        while left > 0 {
            let now = left.min(rows.len() / row_bytes);
            let rows = &mut rows[..now * row_bytes];
            source.read_exact(rows).map_err(Error::io("read", &saved.path))?;
            copy.write(layout, rows)?;
            copy.advance(layout, rows);
            left -= now;
        }
        Ok(copy)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // A file that remains only takes up space.
        let _ = fs::remove_file(self.file.path());
    }
}

impl SavedFile {
    /// Checks by reading that every byte is the one that was written.
    ///
    /// # Errors
    ///
    /// [`Error::SavedFile`] if it was cut short or changed, [`Error::Io`] if it cannot be read.
    pub fn ensure_intact(&self) -> Result<()> {
        let refuse = |problem| Err(Error::SavedFile { path: self.path.clone(), problem });
        let mut file = open_regular_file(&self.path).map_err(Error::io("open", &self.path))?;
        let found = file.metadata().map_err(Error::io("read", &self.path))?.len();
        if found < self.bytes {
            return refuse(format!("it has {found} bytes of the {} that were saved", self.bytes));
        }
        let crc32 = crc32_of(&mut file, self.bytes).map_err(Error::io("read", &self.path))?;
        if crc32 != self.crc32 {
            let expected = self.crc32;
            return refuse(format!(
                "its CRC-32 is {crc32:08x}, but was {expected:08x} when it was saved"
            ));
        }
        Ok(())
    }

    /// Adds a hard link to the file, which remains when the first name is removed; copies it if the file system has no
    /// hard links or `path` is on another one.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file exists already or the disk is full.
    pub fn link_to(&self, path: &Path) -> Result<()> {
        let linked = match fs::hard_link(&self.path, path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(error),
            Err(_) => fs::copy(&self.path, path).map(drop).inspect_err(|_| {
                // The copy is incomplete; the first error is the one to report.
                let _ = fs::remove_file(path);
            }),
            Ok(()) => Ok(()),
        };
        linked.map_err(Error::io("create", path))
    }

    /// The checksum, ready to be continued.
    fn hasher(&self) -> Hasher {
        Hasher::new_with_initial_len(self.crc32, self.bytes)
    }
}

/// Checks that a file is the expected one before its rows are read.
fn ensure_head(path: &Path, expected: &[u8]) -> Result<()> {
    let refuse = |problem| Err(Error::SavedFile { path: path.to_owned(), problem });
    let mut found = Vec::with_capacity(HEAD_BYTES);
    let file = open_regular_file(path).map_err(Error::io("open", path))?;
    file.take(HEAD_BYTES as u64).read_to_end(&mut found).map_err(Error::io("read", path))?;
    if !found.starts_with(MAGIC.as_bytes()) {
        return refuse("it does not contain states of a buffer".to_owned());
    }
    if found != expected {
        let shown = |head: &[u8]| -> String {
            let text = String::from_utf8_lossy(&head[MAGIC.len()..]).into_owned();
            text.trim_end().chars().filter(|c| !c.is_control()).collect()
        };
        return refuse(format!("it is {}; expected {}", shown(&found), shown(expected)));
    }
    Ok(())
}

fn crc32_of(file: &mut File, bytes: u64) -> io::Result<u32> {
    let mut crc32 = Hasher::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let now = left.min(CHUNK_BYTES as u64) as usize;
        file.read_exact(&mut chunk[..now])?;
        crc32.update(&chunk[..now]);
        left -= now as u64;
    }
    Ok(crc32.finalize())
}
