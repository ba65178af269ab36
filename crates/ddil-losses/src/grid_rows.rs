//! Indices into the student's grid, looked up by timestep on the device: reading timesteps would synchronise with it.

use ddil_core::States;
use ddil_schedulers::Timesteps;
use tch::Tensor;

use crate::device_table::DeviceTable;
use crate::error::{Error, Result, first_line};

/// Maps the timestep of each state of a batch to its index in a grid.
#[derive(Debug)]
pub(crate) struct GridRows {
    grid: Timesteps,
    /// `[num_train_timesteps]`, `Int64`: the grid index of each timestep, or the length of the grid if it has none.
    index_of: DeviceTable,
    /// `[grid]`, `Int64`.
    timesteps: DeviceTable,
}

impl GridRows {
    /// The lookup of `grid`, whose timesteps are all below `num_train_timesteps`.
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

    /// The grid index of each state, `[batch]`, `Int64`. It is out of bounds for a timestep off the grid, which
    /// [`look_up`](Self::look_up) rejects.
    pub(crate) fn of(&self, op: &'static str, states: &States) -> Result<Tensor> {
        if let Some(index) = states.grid_indices.iter().find(|index| **index >= self.grid.len()) {
            return Err(self.off_grid(op, format!("grid index {index}")));
        }
        self.look_up(op, &self.index_of, 0, &states.timesteps)
    }

    /// Checks that all states are on the grid.
    pub(crate) fn ensure(&self, op: &'static str, states: &States) -> Result<()> {
        let rows = self.of(op, states)?;
        self.look_up(op, &self.timesteps, 0, &rows).map(drop)
    }

    /// The entries at `rows` in dimension `dim` of a table with one entry per grid timestep.
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

/// One number per sample, reshaped and cast to broadcast against `like`.
pub(crate) fn per_sample(values: &Tensor, like: &Tensor) -> Tensor {
    let mut shape = vec![1; like.dim()];
    shape[0] = -1;
    values.to_kind(like.kind()).view(shape.as_slice())
}
