//! Forward passes of a network, and nothing else.

use ddil_core::Conditioning;
use ddil_models::NetworkDenoiser;
use tch::{Kind, Tensor};

use super::{Result, Workload};

/// A frozen network with a batch for it.
pub struct Passes {
    network: NetworkDenoiser,
    x_t: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
}

impl Passes {
    /// The network of a workload, and random samples.
    ///
    /// # Errors
    ///
    /// As [`Workload::teacher`].
    pub fn new(workload: &Workload) -> Result<Self> {
        let rows = [workload.batch];
        let (floats, integers) = ((Kind::Float, workload.device), (Kind::Int64, workload.device));
        Ok(Self {
            network: workload.teacher()?,
            x_t: Tensor::randn([workload.batch, 1, workload.side, workload.side], floats),
            timesteps: Tensor::randint(1000, rows, integers),
            conditioning: Conditioning::class_labels(Tensor::randint(10, rows, integers)),
        })
    }

    /// The network.
    pub fn network(&self) -> &NetworkDenoiser {
        &self.network
    }

    /// The conditioning.
    pub fn conditioning(&self) -> &Conditioning {
        &self.conditioning
    }

    /// One pass without gradients.
    ///
    /// # Errors
    ///
    /// Errors of the network.
    pub fn pass(&self) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        Ok(self.network.output(&self.x_t, &self.timesteps, &self.conditioning)?)
    }
}
