//! Activation checkpointing: parts of a network that the backward pass recomputes instead of storing their activations.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ddil_libtorch::recomputed;
use tch::{TchError, Tensor};

use crate::layers::Output;
use crate::parameters::Parameters;
use crate::parameters::{RestoreGuard, Switches};

/// The state required to recompute a pass: the adapters that took part in it.
#[derive(Clone, Debug)]
pub(crate) struct Recompute(Switches);

impl Recompute {
    /// The state of a pass that starts now, of the network with these parameters.
    pub(crate) fn of(parameters: &Parameters) -> Self {
        Self(Switches::of(parameters.layers()))
    }
}

/// One or more layers, the unit of recomputation.
///
/// Both the graph and the network own it. Tensors must not be used from two threads at once, hence the lock; the thread
/// that runs the network waits while another one runs the backward pass.
#[derive(Debug)]
pub(crate) struct Part<T>(Arc<Mutex<T>>);

impl<T: Send + 'static> Part<T> {
    pub(crate) fn new(layers: T) -> Self {
        Self(Arc::new(Mutex::new(layers)))
    }

    /// The output of `run` for the layers and these inputs, which must include every tensor with a graph.
    pub(crate) fn forward(
        &self,
        inputs: &[&Tensor],
        recompute: Option<&Recompute>,
        run: impl Fn(&T, &[&Tensor]) -> Output + Send + 'static,
    ) -> Output {
        let Some(Recompute(switches)) = recompute else { return run(&self.lock(), inputs) };
        let (part, switches) = (Self(Arc::clone(&self.0)), switches.clone());
        let again = move |inputs: &[Tensor]| {
            let _guard: RestoreGuard<'_> = switches.restore()?;
            run(&part.lock(), &inputs.iter().collect::<Vec<_>>())
        };
        recomputed(inputs.iter().copied(), again)
            .map_err(|error| TchError::Torch(error.to_string()))
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        // A pass does not change the layers.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
