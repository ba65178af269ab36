//! Parts of a network that are computed once more in the backward pass, in place of keeping what they computed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ddil_libtorch::recomputed;
use tch::{TchError, Tensor};

use crate::layers::Output;
use crate::parameters::Parameters;
use crate::parameters::{AsAsked, Switches};

/// What a pass has to be to be gone through again: the adapters that took part in it.
#[derive(Clone, Debug)]
pub(crate) struct Recompute(Switches);

impl Recompute {
    /// Of a pass of the network with these parameters that begins now.
    pub(crate) fn of(parameters: &Parameters) -> Self {
        Self(Switches::of(parameters.layers()))
    }
}

/// A layer or more that are the unit of recomputation.
///
/// The graph holds it beside the network. A tensor is not to be used from two threads at once, so a lock stands before
/// it; the network is asked by one thread, and its graph gone through by another while that one waits.
#[derive(Debug)]
pub(crate) struct Part<T>(Arc<Mutex<T>>);

impl<T: Send + 'static> Part<T> {
    pub(crate) fn new(layers: T) -> Self {
        Self(Arc::new(Mutex::new(layers)))
    }

    /// What `run` makes of the layers and these inputs, among which is all that has a graph behind it.
    pub(crate) fn forward(
        &self,
        inputs: &[&Tensor],
        recompute: Option<&Recompute>,
        run: impl Fn(&T, &[&Tensor]) -> Output + Send + 'static,
    ) -> Output {
        let Some(Recompute(switches)) = recompute else { return run(&self.lock(), inputs) };
        let (part, switches) = (Self(Arc::clone(&self.0)), switches.clone());
        let again = move |inputs: &[Tensor]| {
            let _asked: AsAsked<'_> = switches.put_on()?;
            run(&part.lock(), &inputs.iter().collect::<Vec<_>>())
        };
        recomputed(inputs.iter().copied(), again)
            .map_err(|error| TchError::Torch(error.to_string()))
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        // A pass changes nothing in the layers.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
