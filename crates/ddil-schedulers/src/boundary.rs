//! The boundary condition of consistency models.

use ddil_libtorch::{ensure_same_shape, ensure_timesteps};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::Result;

/// The scalings that make a consistency function the identity at timestep 0.
///
/// `c_skip = sigma_data² / (s² + sigma_data²)` and `c_out = s / sqrt(s² + sigma_data²)` with
/// `s = timestep_scaling · t`; section 4.3 and appendix D of [Luo et al. 2023](https://arxiv.org/abs/2310.04378).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConsistencyBoundary {
    /// Assumed standard deviation of the data; default 0.5.
    pub sigma_data: f64,
    /// Factor of the timestep; default 10.
    pub timestep_scaling: f64,
}

impl Default for ConsistencyBoundary {
    fn default() -> Self {
        Self { sigma_data: 0.5, timestep_scaling: 10.0 }
    }
}

impl ConsistencyBoundary {
    /// `(c_skip, c_out)` at one timestep.
    pub fn scalings(&self, timestep: i64) -> (f64, f64) {
        let (scaled, data) = (self.timestep_scaling * timestep as f64, self.sigma_data);
        let total = scaled.powi(2) + data.powi(2);
        (data.powi(2) / total, scaled / total.sqrt())
    }

    /// `c_out x0 + c_skip x_t`, per sample.
    ///
    /// # Shapes and units
    ///
    /// - `x0`, `x_t`: `[batch, ..]`; `timesteps`: `[batch]`, `Int64`; returns the shape of `x0`
    ///
    /// # Errors
    ///
    /// [`Error::Argument`](crate::Error::Argument) for invalid shapes and kinds.
    pub fn apply(&self, x0: &Tensor, x_t: &Tensor, timesteps: &Tensor) -> Result<Tensor> {
        const OP: &str = "ConsistencyBoundary::apply";
        ensure_same_shape(OP, ("x0", x0), ("x_t", x_t))?;
        ensure_timesteps(OP, "timesteps", timesteps, x0)?;
        // In Double: the square of the scaled timestep is 1e8, beyond the range of Half and the precision of Float.
        let scaled = timesteps.to_kind(Kind::Double) * self.timestep_scaling;
        let total = scaled.square() + self.sigma_data.powi(2);
        let mut shape = vec![1; x0.dim()];
        shape[0] = -1;
        let c_skip = (self.sigma_data.powi(2) / &total).to_kind(x0.kind()).view(shape.as_slice());
        let c_out = (scaled / total.sqrt()).to_kind(x0.kind()).view(shape.as_slice());
        Ok(c_out * x0 + c_skip * x_t)
    }
}
