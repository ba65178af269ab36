//! States on disk, for more states than fit into memory.

use std::collections::VecDeque;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ddil_files::Invalid;
use ddil_libtorch::{RowFile, gather_rows};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::segment::{Column, Layout, Segment};
use crate::conditioning::Conditioning;
use crate::error::{Error, Result};
use crate::rows::index;
use crate::saved::SavedFile;

/// Where states beyond the memory of an [`AggregationBuffer`](super::AggregationBuffer) are stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SpillConfig {
    /// The folder, used by one buffer at a time and created on first use. Files are removed when the buffer is dropped;
    /// those left by a killed process have to be [cleared](Self::clear) first. In a run's config it may be omitted: the
    /// default is `buffer` in the run's folder. A folder elsewhere must be on the same file system, or checkpoints copy
    /// its contents.
    #[serde(skip_serializing_if = "is_empty")]
    pub folder: PathBuf,
    /// Maximum bytes in the folder; default 16 GiB. Dropped states that a saved buffer still refers to are not counted,
    /// see [`SavedFile`].
    pub byte_budget: u64,
}

fn is_empty(folder: &Path) -> bool {
    folder.as_os_str().is_empty()
}

impl Default for SpillConfig {
    fn default() -> Self {
        Self { folder: PathBuf::new(), byte_budget: 16 << 30 }
    }
}

impl SpillConfig {
    /// A folder and the maximum of bytes in it.
    pub fn new(folder: impl Into<PathBuf>, byte_budget: u64) -> Self {
        Self { folder: folder.into(), byte_budget }
    }

    /// Removes the files that a killed process left in the folder. Call it only if no buffer is using them.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the folder cannot be listed or a file cannot be removed; a missing folder is not an error.
    pub fn clear(&self) -> Result<()> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(Error::io("list", &self.folder))?,
        };
        for entry in entries {
            let entry = entry.map_err(Error::io("list", &self.folder))?;
            if Layout::is_name(&entry.file_name().to_string_lossy()) {
                fs::remove_file(entry.path()).map_err(Error::io("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    pub(super) fn ensure(&self) -> Result<()> {
        if !is_empty(&self.folder) {
            return Ok(());
        }
        Err(Error::Invalid(Invalid::new("buffer.spill.folder", "empty", "a folder")))
    }
}

/// The spilled states of all rings.
#[derive(Debug)]
pub(super) struct Spill {
    layout: Layout,
    logs: Vec<Log>,
}

/// The spilled states of a ring, in consecutive files: new states are appended, and a file is removed once none of its
/// states is needed.
#[derive(Debug, Default)]
struct Log {
    segments: VecDeque<Segment>,
}

/// A row to read: its index in the batch, and where it is stored.
pub(super) struct Pick {
    pub(super) to: usize,
    pub(super) ring: usize,
    pub(super) row: u64,
}

impl Spill {
    /// An empty store for rows of these columns, in files of `segment_rows`.
    pub(super) fn new(
        config: &SpillConfig,
        columns: Vec<Column>,
        segment_rows: usize,
        rings: usize,
    ) -> Result<Self> {
        let refused = |kind| matches!(kind, Kind::Bool | Kind::QInt8 | Kind::QUInt8 | Kind::QInt32);
        if let Some(Column { name, kind, .. }) = columns.iter().find(|c| refused(c.kind)) {
            let problem = format!("hold `{name}` of kind {kind:?}, which cannot be spilled");
            return Err(Error::Conditioning {
                op: "AggregationBuffer",
                field: "parts".to_owned(),
                problem,
            });
        }
        let layout = Layout { folder: config.folder.clone(), columns, segment_rows };
        Ok(Self { layout, logs: (0..rings).map(|_| Log::default()).collect() })
    }

    /// Bytes per row.
    pub(super) fn row_bytes(&self) -> u64 {
        self.layout.row_bytes() as u64
    }

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.logs.iter().flat_map(|log| &log.segments).map(|segment| segment.file.len()).sum()
    }

    /// Appends `rows` of a batch to those of the ring, as its rows from `first` on; rows before `live` are no longer
    /// needed. Either all are written or none.
    pub(super) fn append(
        &mut self,
        ring: usize,
        first: u64,
        live: u64,
        (x_t, conditioning): (&Tensor, &Conditioning),
        rows: &[usize],
    ) -> Result<()> {
        self.logs[ring].release(live / self.layout.segment_rows as u64);
        let chunks = self.chunks(first, rows.len(), live);
        for (number, _) in &chunks {
            self.logs[ring].ensure(&self.layout, ring, *number)?;
        }
        let records = self.records(x_t, conditioning, rows)?;
        let bytes_of = |range: &Range<usize>| {
            let row_bytes = self.layout.row_bytes();
            &records[range.start * row_bytes..range.end * row_bytes]
        };
        let log = &mut self.logs[ring];
        for (number, range) in &chunks {
            log.segment(*number).write(&self.layout, bytes_of(range))?;
        }
        for (number, range) in &chunks {
            log.segment(*number).advance(&self.layout, bytes_of(range));
        }
        Ok(())
    }

    /// Which rows of a batch go to which file; files that hold nothing needed are left out.
    fn chunks(&self, first: u64, num_rows: usize, live: u64) -> Vec<(u64, Range<usize>)> {
        let segment_rows = self.layout.segment_rows as u64;
        let mut chunks = Vec::new();
        let mut done = 0;
        while done < num_rows {
            let at = first + done as u64;
            let number = at / segment_rows;
            let room = ((number + 1) * segment_rows - at) as usize;
            let end = num_rows.min(done + room);
            if (number + 1) * segment_rows > live {
                chunks.push((number, done..end));
            }
            done = end;
        }
        chunks
    }

    /// The bytes of `rows`, all columns of one row side by side.
    fn records(
        &self,
        x_t: &Tensor,
        conditioning: &Conditioning,
        rows: &[usize],
    ) -> Result<Vec<u8>> {
        let parts = conditioning.parts().map(|(_, part)| part);
        let columns: Result<Vec<(Vec<u8>, usize)>> = std::iter::once(x_t)
            .chain(parts)
            .zip(&self.layout.columns)
            .map(|(tensor, column)| Ok((bytes_of(tensor, column.kind, rows)?, column.bytes())))
            .collect();
        let mut columns = columns?;
        if columns.len() == 1 {
            return Ok(columns.swap_remove(0).0);
        }
        let mut records = Vec::with_capacity(rows.len() * self.layout.row_bytes());
        for row in 0..rows.len() {
            for (bytes, len) in &columns {
                records.extend_from_slice(&bytes[row * len..(row + 1) * len]);
            }
        }
        Ok(records)
    }

    /// A batch of `num_rows`, on the CPU, with the picked rows read; the others are still to be filled.
    pub(super) fn read(&self, num_rows: usize, picks: &[Pick]) -> Result<(Tensor, Conditioning)> {
        let mut offset = 0;
        let mut columns = Vec::with_capacity(self.layout.columns.len());
        for column in &self.layout.columns {
            let shape = [&[num_rows as i64][..], &column.shape].concat();
            let mut tensor = Tensor::f_empty(shape, (column.kind, Device::Cpu))
                .map_err(Error::torch("AggregationBuffer::sample"))?;
            let rows = picks.iter().map(|pick| {
                let (file, row) = self.logs[pick.ring].find(pick.row, self.layout.segment_rows);
                (file, row, pick.to)
            });
            gather_rows(&mut tensor, offset, rows)?;
            offset += column.bytes();
            columns.push((column.name.clone(), tensor));
        }
        let x_t = columns.remove(0).1;
        Ok((x_t, columns.into_iter().collect()))
    }

    /// The files that hold rows of a ring from `live` on.
    pub(super) fn saved(&self, ring: usize, live: u64) -> impl Iterator<Item = SavedFile> + '_ {
        let wanted = live / self.layout.segment_rows as u64;
        let segments = self.logs[ring].segments.iter();
        let with_rows = segments.filter(move |s| s.number >= wanted && s.written > 0);
        with_rows.map(move |segment| segment.saved(ring))
    }

    /// Restores the rows of a ring in `live` from saved files.
    pub(super) fn restore(
        &mut self,
        ring: usize,
        live: Range<u64>,
        files: &[SavedFile],
    ) -> Result<()> {
        if live.is_empty() {
            return Ok(());
        }
        let segment_rows = self.layout.segment_rows as u64;
        for number in live.start / segment_rows..=(live.end - 1) / segment_rows {
            let name = Layout::name(ring, number);
            let Some(saved) = files.iter().find(|file| file.name == name) else {
                let problem = format!("its file {name} is missing");
                return Err(Error::Restore { what: "buffer", problem });
            };
            let written = segment_rows.min(live.end - number * segment_rows) as usize;
            let segment = Segment::restore(&self.layout, ring, number, written, saved)?;
            self.logs[ring].segments.push_back(segment);
        }
        Ok(())
    }
}

impl Log {
    /// Drops the files before this number.
    fn release(&mut self, number: u64) {
        while self.segments.front().is_some_and(|segment| segment.number < number) {
            self.segments.pop_front();
        }
    }

    /// Creates the next file, with this number, unless it exists.
    fn ensure(&mut self, layout: &Layout, ring: usize, number: u64) -> Result<()> {
        if self.segments.back().is_none_or(|last| last.number < number) {
            self.segments.push_back(Segment::create(layout, ring, number)?);
        }
        Ok(())
    }

    fn first(&self) -> u64 {
        self.segments.front().map_or(0, |segment| segment.number)
    }

    fn segment(&mut self, number: u64) -> &mut Segment {
        let first = self.first();
        &mut self.segments[(number - first) as usize]
    }

    /// The file that holds a row, and its index there.
    fn find(&self, row: u64, segment_rows: usize) -> (&RowFile, usize) {
        let number = row / segment_rows as u64;
        let segment = &self.segments[(number - self.first()) as usize];
        (&segment.file, (row % segment_rows as u64) as usize)
    }
}

/// The bytes of rows of a tensor, converted to a kind.
fn bytes_of(tensor: &Tensor, kind: Kind, rows: &[usize]) -> Result<Vec<u8>> {
    let copy = || {
        let order = index(rows, tensor.device());
        let rows = tensor.f_detach()?.f_index_select(0, &order)?;
        let rows = rows.f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?;
        let mut bytes = vec![0; rows.numel() * kind.elt_size_in_bytes()];
        rows.f_copy_data_u8(&mut bytes, rows.numel())?;
        Ok(bytes)
    };
    copy().map_err(Error::torch("AggregationBuffer::insert"))
}
