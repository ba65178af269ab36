//! Rows of states in one block of memory.

use ddil_libtorch::ArgumentError;
use tch::kind::Element;
use tch::{Device, Kind, Tensor};

use crate::conditioning::Conditioning;
use crate::error::{Error, Result};

/// States and their conditioning, `[capacity, ..]`, written and read in batches of rows.
///
/// The block is allocated at the first write, with the shape, device and conditioning of that batch.
#[derive(Debug)]
pub(crate) struct RowStore {
    what: &'static str,
    /// Number format that states are stored in; none keeps theirs.
    kind: Option<Kind>,
    block: Option<Block>,
}

#[derive(Debug)]
struct Block {
    x_t: Tensor,
    conditioning: Conditioning,
}

impl RowStore {
    pub(crate) fn new(what: &'static str, kind: Option<Kind>) -> Self {
        Self { what, kind, block: None }
    }

    /// Bytes per row of a batch to be written.
    pub(crate) fn row_bytes(&self, x_t: &Tensor, conditioning: &Conditioning) -> u64 {
        let per_row = |tensor: &Tensor, kind: Kind| {
            let values: i64 = tensor.size().iter().skip(1).product();
            values as u64 * kind.elt_size_in_bytes() as u64
        };
        let conditioning_bytes: u64 =
            conditioning.parts().map(|(_, part)| per_row(part, part.kind())).sum();
        per_row(x_t, self.kind.unwrap_or(x_t.kind())) + conditioning_bytes
    }

    /// Bytes of the block.
    pub(crate) fn bytes(&self) -> u64 {
        let capacity = self.capacity().unwrap_or(0) as u64;
        self.block.as_ref().map_or(0, |b| self.row_bytes(&b.x_t, &b.conditioning) * capacity)
    }

    /// Number of rows, once there is a block.
    pub(crate) fn capacity(&self) -> Option<usize> {
        Some(self.block.as_ref()?.x_t.size()[0] as usize)
    }

    /// Frees the memory.
    pub(crate) fn clear(&mut self) {
        self.block = None;
    }

    /// Checks that states to be written have the form of those stored.
    pub(crate) fn ensure_like(&self, x_t: &Tensor, conditioning: &Conditioning) -> Result<()> {
        self.block.as_ref().map_or(Ok(()), |block| block.ensure_like(self.what, x_t, conditioning))
    }

    /// Writes a batch to `rows`, each named once.
    pub(crate) fn write(
        &mut self,
        capacity: usize,
        rows: &[usize],
        x_t: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        self.ensure_like(x_t, conditioning)?;
        let block = self.allocate(capacity, x_t, conditioning)?;
        copy_rows(&block.x_t, rows, x_t)?;
        for ((_, stored), (_, part)) in block.conditioning.parts().zip(conditioning.parts()) {
            copy_rows(stored, rows, part)?;
        }
        Ok(())
    }

    /// The block, allocated for rows like these if there is none.
    fn allocate(
        &mut self,
        capacity: usize,
        x_t: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<&Block> {
        match &mut self.block {
            Some(block) => Ok(block),
            none => Ok(none.insert(Block::zeros(capacity, self.kind, x_t, conditioning)?)),
        }
    }

    /// The stored fields of a state, by name: kind and shape of a row. Empty before the first write.
    pub(crate) fn columns(&self) -> Vec<(String, Kind, Vec<i64>)> {
        let Some(block) = &self.block else { return vec![] };
        std::iter::once(("x_t", &block.x_t))
            .chain(block.conditioning.parts())
            .map(|(name, part)| (name.to_owned(), part.kind(), part.size()[1..].to_vec()))
            .collect()
    }

    /// Copies `rows` to `places` of a batch of the same form.
    pub(crate) fn read_into(
        &self,
        (x_t, conditioning): (&Tensor, &Conditioning),
        places: &[usize],
        rows: &[usize],
    ) -> Result<()> {
        let (kept, stored) = self.read(rows)?;
        copy_rows(x_t, places, &kept)?;
        let mut parts = conditioning.parts().zip(stored.parts());
        parts.try_for_each(|((_, to), (_, part))| copy_rows(to, places, part))
    }

    /// The device of the block, once there is one.
    pub(crate) fn device(&self) -> Option<Device> {
        Some(self.block.as_ref()?.x_t.device())
    }

    /// Copies of `rows`, in the kind that they are stored as.
    pub(crate) fn read(&self, rows: &[usize]) -> Result<(Tensor, Conditioning)> {
        let Some(block) = &self.block else {
            return Err(Error::NoState {
                source_name: self.what,
                reason: "nothing was stored".to_owned(),
            });
        };
        let order = index(rows, block.x_t.device());
        let x_t = block.x_t.f_index_select(0, &order).map_err(Error::torch("RowStore::read"))?;
        Ok((x_t, block.conditioning.index_select(&order)?))
    }

    /// Copies of the whole block, by name; none before the first write.
    pub(crate) fn tensors(&self) -> Vec<(String, Tensor)> {
        let Some(block) = &self.block else { return vec![] };
        let parts = block.conditioning.parts();
        let parts = parts.map(|(name, part)| (format!("conditioning.{name}"), part.copy()));
        std::iter::once(("x_t".to_owned(), block.x_t.copy())).chain(parts).collect()
    }

    /// Restores a block returned by [`tensors`](Self::tensors).
    pub(crate) fn restore(&mut self, capacity: usize, tensors: &[(String, Tensor)]) -> Result<()> {
        let what = self.what;
        let refuse = |problem: String| Err(Error::Restore { what, problem });
        self.block = None;
        if let Some((name, _)) = tensors.iter().find(|(_, tensor)| !tensor.defined()) {
            return refuse(format!("`{name}` is an undefined tensor"));
        }
        let Some((_, x_t)) = tensors.iter().find(|(name, _)| name == "x_t") else {
            return if tensors.is_empty() {
                Ok(())
            } else {
                refuse("there is no `x_t`".to_owned())
            };
        };
        if let Some(expected) = self.kind.filter(|&kind| kind != x_t.kind()) {
            return refuse(format!("`x_t` has kind {:?}; expected {expected:?}", x_t.kind()));
        }
        if x_t.size().first() != Some(&(capacity as i64)) {
            return refuse(format!("`x_t` has shape {:?}; expected {capacity} rows", x_t.size()));
        }
        let parts = tensors.iter().filter(|(name, _)| name != "x_t");
        let conditioning: Conditioning = parts
            .map(|(name, part)| {
                let name = name.strip_prefix("conditioning.").unwrap_or(name);
                (name.to_owned(), part.copy())
            })
            .collect();
        conditioning.ensure_batch("RowStore::restore", capacity as i64)?;
        self.block = Some(Block { x_t: x_t.copy(), conditioning });
        Ok(())
    }
}

impl Block {
    fn zeros(
        capacity: usize,
        kind: Option<Kind>,
        x_t: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Self> {
        let zeros = |like: &Tensor, kind: Kind| {
            let mut shape = like.size();
            shape[0] = capacity as i64;
            // Zeros rather than uninitialized memory, so that equal runs save equal blocks.
            Tensor::f_zeros(shape, (kind, like.device())).map_err(Error::torch("RowStore::write"))
        };
        let parts: Result<Vec<_>> = conditioning
            .parts()
            .map(|(name, part)| Ok((name.to_owned(), zeros(part, part.kind())?)))
            .collect();
        let x_t = zeros(x_t, kind.unwrap_or(x_t.kind()))?;
        Ok(Self { x_t, conditioning: parts?.into_iter().collect() })
    }

    /// Checks that new rows have the form of those stored.
    fn ensure_like(
        &self,
        op: &'static str,
        x_t: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<()> {
        let (stored, given) = (self.x_t.size(), x_t.size());
        if stored[1..] != *given.get(1..).unwrap_or_default() {
            let expected = format!("[batch, ..{:?}], as in the stored states", &stored[1..]);
            return Err(Error::Argument(ArgumentError::Shape {
                op,
                name: "x_t",
                shape: given,
                expected,
            }));
        }
        let rows = |c: &Conditioning| -> Vec<_> {
            c.parts().map(|(name, part)| (name.to_owned(), part.size()[1..].to_vec())).collect()
        };
        let (stored, given) = (rows(&self.conditioning), rows(conditioning));
        if stored == given {
            return Ok(());
        }
        let problem = format!("are {given:?}; stored ones are {stored:?}");
        Err(Error::Conditioning { op, field: "parts".to_owned(), problem })
    }
}

fn copy_rows(stored: &Tensor, rows: &[usize], given: &Tensor) -> Result<()> {
    let (device, kind) = (stored.device(), stored.kind());
    let given = given.detach().to_device(device).to_kind(kind);
    // A shallow clone shares the memory; only the handle has to be mutable.
    let mut stored = stored.shallow_clone();
    if device == Device::Cpu {
        return Ok(ddil_libtorch::copy_rows_(&mut stored, rows, &given.contiguous())?);
    }
    let _ = stored
        .f_index_copy_(0, &index(rows, device), &given)
        .map_err(Error::torch("RowStore::write"))?;
    Ok(())
}

/// Row numbers of a batch as an index tensor.
pub(crate) fn index(rows: &[usize], device: Device) -> Tensor {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    on_device(&rows, device)
}

/// Copies host numbers to a device without waiting for it: a blocking copy would wait for all queued work, which in the
/// middle of an update is whole passes of networks.
pub(crate) fn on_device<T: Element>(numbers: &[T], device: Device) -> Tensor {
    Tensor::from_slice(numbers).to_device_(device, T::KIND, true, false)
}

/// The inverse of a permutation.
pub(crate) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut undone = vec![0; order.len()];
    for (to, &from) in order.iter().enumerate() {
        undone[from] = to;
    }
    undone
}
