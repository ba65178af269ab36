//! Tensors written row by row, for more rows than fit in memory.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// A safetensors file of `Float` tensors that is filled incrementally.
#[derive(Debug)]
pub(super) struct RowFile {
    path: PathBuf,
    file: File,
    tensors: Vec<Place>,
}

/// Where a tensor is stored.
#[derive(Debug)]
struct Place {
    name: String,
    start: u64,
    bytes_per_row: u64,
}

const BYTES_PER_VALUE: u64 = 4;

impl RowFile {
    /// Creates a file of tensors of these shapes, filled with zeros.
    pub(super) fn create(path: &Path, tensors: &[(&str, Vec<i64>)]) -> Result<Self> {
        let mut header = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
        let mut places = Vec::new();
        let mut end = 0;
        for (name, shape) in tensors {
            let len = |shape: &[i64]| shape.iter().map(|n| *n as u64).product::<u64>();
            let (start, num_bytes) = (end, len(shape) * BYTES_PER_VALUE);
            end += num_bytes;
            let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
            header.insert((*name).to_owned(), entry);
            let (name, bytes_per_row) = ((*name).to_owned(), len(&shape[1..]) * BYTES_PER_VALUE);
            places.push(Place { name, start, bytes_per_row });
        }
        let mut text = Value::Object(header).to_string();
        // Values start at an aligned offset.
        text.extend(std::iter::repeat_n(' ', (8 - text.len() % 8) % 8));
        let data_start = 8 + text.len() as u64;
        for place in &mut places {
            place.start += data_start;
        }
        let write = || {
            let mut file = File::create(path)?;
            file.write_all(&(text.len() as u64).to_le_bytes())?;
            file.write_all(text.as_bytes())?;
            file.set_len(data_start + end)?;
            Ok(file)
        };
        let file = write().map_err(Error::io("write", path))?;
        Ok(Self { path: path.to_owned(), file, tensors: places })
    }

    /// Writes rows of the named tensor, starting at row `first`.
    pub(super) fn write(&mut self, name: &str, first: i64, rows: &Tensor) -> Result<()> {
        let values = || {
            let rows = rows.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
            Vec::<f32>::try_from(rows.f_contiguous()?.f_view([-1])?)
        };
        let values = values().map_err(Error::torch("RowFile::write"))?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let place = self.tensors.iter().find(|place| place.name == name);
        let Some(Place { start, bytes_per_row, .. }) = place else { return Ok(()) };
        let offset = start + first as u64 * bytes_per_row;
        let written =
            self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.write_all(&bytes));
        written.map_err(Error::io("write", &self.path))
    }

    /// Flushes the file to disk.
    pub(super) fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("flush", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("rows.safetensors");
        let all = Tensor::rand([5, 2, 3], tch::kind::FLOAT_CPU);
        let mut file = RowFile::create(&path, &[("a", vec![5, 2, 3]), ("other", vec![5, 1])])?;
        for (first, len) in [(3, 2), (0, 3)] {
            file.write("a", first, &all.narrow(0, first, len))?;
            file.write("other", first, &all.narrow(0, first, len).narrow(1, 0, 1).narrow(2, 1, 1))?;
        }
        file.finish()?;
        let read = ddil_models::weights::read_all(&path)?;
        assert_eq!(read["a"], all);
        assert_eq!(read["other"], all.narrow(1, 0, 1).narrow(2, 1, 1).view([5, 1]));
        Ok(())
    }
}
