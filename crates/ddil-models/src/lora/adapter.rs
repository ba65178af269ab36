//! What a layer holds for an adapter, and what an adapter adds to the layer's output.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{TchError, Tensor};

use crate::layers::Output;

/// How a layer applies its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Linear,
    Conv { stride: i64, padding: i64 },
}

impl Form {
    /// `x` through a weight of this form, without bias.
    fn apply(self, x: &Tensor, weight: &Tensor) -> Output {
        match self {
            Self::Linear => x.f_linear(weight, None::<&Tensor>),
            Self::Conv { stride, padding } => {
                x.f_conv2d(weight, None::<&Tensor>, [stride; 2], [padding; 2], [1, 1], 1)
            }
        }
    }

    /// The same without a neighbourhood: what takes the `rank` numbers of one place to its outputs.
    fn pointwise(self) -> Self {
        match self {
            Self::Linear => Self::Linear,
            Self::Conv { .. } => Self::Conv { stride: 1, padding: 0 },
        }
    }
}

/// Two weights of low rank beside the one of a layer.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) form: Form,
    /// A: inputs to `rank` numbers.
    pub(crate) down: Tensor,
    /// B: `rank` numbers to outputs.
    pub(crate) up: Tensor,
    pub(crate) scale: f64,
    pub(crate) active: bool,
}

impl Adapter {
    /// `y + scale * B(A x)`, in the kind of `y`.
    fn add(&self, x: &Tensor, y: &Tensor) -> Output {
        let x = x.f_to_kind(self.down.kind())?;
        let inner = self.form.apply(&x, &self.down)?;
        let delta = self.form.pointwise().apply(&inner, &self.up)?.f_mul_scalar(self.scale)?;
        y.f_add(&delta)?.f_to_kind(y.kind())
    }

    /// `scale * B A` in the shape of `weight`.
    pub(crate) fn delta(&self, weight: &Tensor) -> Output {
        let product = self.up.f_flatten(1, -1)?.f_matmul(&self.down.f_flatten(1, -1)?)?;
        product.f_mul_scalar(self.scale)?.f_view(&weight.size()[..])
    }
}

/// Where a layer finds its adapter; empty unless one is attached.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slot(Arc<Mutex<Option<Adapter>>>);

impl Slot {
    /// The output `y` of a layer for `x`, adapted if there is an adapter.
    pub(crate) fn adapt(&self, x: &Tensor, y: Tensor) -> Result<Tensor, TchError> {
        match &*self.lock() {
            Some(adapter) if adapter.active => adapter.add(x, &y),
            _ => Ok(y),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Option<Adapter>> {
        // An adapter is only ever replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A layer of a network that may have an adapter.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) weight: Tensor,
    pub(crate) form: Form,
    pub(crate) slot: Slot,
}

impl Layer {
    /// Another handle of the same layer.
    pub(crate) fn handle(&self) -> Self {
        Self {
            name: self.name.clone(),
            weight: self.weight.shallow_clone(),
            form: self.form,
            slot: self.slot.clone(),
        }
    }

    /// Shapes of A and B of an adapter of that rank.
    pub(crate) fn shapes(&self, rank: i64) -> [Vec<i64>; 2] {
        let mut down = self.weight.size();
        let mut up = vec![1; down.len()];
        (up[0], up[1], down[0]) = (down[0], rank, rank);
        [down, up]
    }
}
