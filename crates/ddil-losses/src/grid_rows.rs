//! Entries of the student's grid, looked up by timestep on the device: reading timesteps would wait for it.

use ddil_core::States;
use ddil_schedulers::Timesteps;
use tch::Tensor;

use crate::device_table::DeviceTable;
use crate::error::{Error, Result, first_line};

/// Which entry of a grid each state of a batch stands at.
#[derive(Debug)]
pub(crate) struct GridRows {
    grid: Timesteps,
    /// `[num_train_timesteps]`, `Int64`: the entry of the grid at a timestep, one beyond the last if there is none.
    index_of: DeviceTable,
    /// `[grid]`, `Int64`.
    timesteps: DeviceTable,
}

impl GridRows {
    /// The entries of `grid`, none of which is beyond `num_train_timesteps`.
    pub(crate) fn new(grid: Timesteps, num_train_timesteps: i64) -> Self {
        let mut index_of = vec![grid.len() as i64; num_train_timesteps as usize];
        for (index, t) in grid.as_slice().iter().enumerate() {
            index_of[*t as usize] = index as i64;
        }
        let [index_of, timesteps] =
            [&index_of[..], grid.as_slice()].map(|list| DeviceTable::new(Tensor::from_slice(list)));
        Self { grid, index_of, timesteps }
    }

    /// The grid.
    pub(crate) fn grid(&self) -> &Timesteps {
        &self.grid
    }

    /// The entry of each state, `[batch]`, `Int64`; beyond the grid for a timestep off it, which
    /// [`look_up`](Self::look_up) refuses.
    pub(crate) fn of(&self, op: &'static str, states: &States) -> Result<Tensor> {
        if let Some(index) = states.grid_indices.iter().find(|index| **index >= self.grid.len()) {
            return Err(self.off_grid(op, format!("grid index {index}")));
        }
        self.look_up(op, &self.index_of, 0, &states.timesteps)
    }

    /// Refuses states off the grid.
    pub(crate) fn ensure(&self, op: &'static str, states: &States) -> Result<()> {
        let rows = self.of(op, states)?;
        self.look_up(op, &self.timesteps, 0, &rows).map(drop)
    }

    /// What stands at `rows` in dimension `dim` of a table with one place for each entry of the grid.
    pub(crate) fn look_up(
        &self,
        op: &'static str,
        table: &DeviceTable,
        dim: i64,
        rows: &Tensor,
    ) -> Result<Tensor> {
        let table = table.on(rows.device())?;
        table.f_index_select(dim, rows).map_err(|error| self.off_grid(op, first_line(&error)))
    }

    fn off_grid(&self, op: &'static str, message: String) -> Error {
        Error::OffGrid { op, grid: self.grid.as_slice().to_vec(), message }
    }
}

/// A number a sample, shaped and cast to be multiplied with `like`.
pub(crate) fn per_sample(values: &Tensor, like: &Tensor) -> Tensor {
    let mut shape = vec![1; like.dim()];
    shape[0] = -1;
    values.to_kind(like.kind()).view(shape.as_slice())
}
