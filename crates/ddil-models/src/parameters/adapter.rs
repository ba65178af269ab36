//! The adapters of a layer, and their contribution to the output.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{TchError, Tensor};

/// The result of libtorch.
type Output = Result<Tensor, TchError>;

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

    /// The same with kernel 1: maps the `rank` values of one position to the outputs.
    fn pointwise(self) -> Self {
        match self {
            Self::Linear => Self::Linear,
            Self::Conv { .. } => Self::Conv { stride: 1, padding: 0 },
        }
    }
}

/// The adapter that is switched on, shared by all layers and read in every pass.
///
/// No other memory is synchronised by it, so relaxed loads and stores suffice.
#[derive(Debug, Default)]
pub(crate) struct Switch {
    /// Number of the active adapter; 0 is none.
    on: AtomicU32,
    /// The number of adapters created so far.
    made: AtomicU32,
    /// Whether an adapter is merged into the base weights, so that none may be applied.
    merged: AtomicBool,
}

impl Switch {
    /// The number of a new adapter.
    pub(crate) fn next(&self) -> u32 {
        self.made.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The active adapter; 0 is none.
    pub(crate) fn on(&self) -> u32 {
        self.on.load(Ordering::Relaxed)
    }

    /// Switches one on, or none, and returns the previous one.
    pub(crate) fn activate(&self, number: u32) -> u32 {
        self.on.swap(number, Ordering::Relaxed)
    }

    pub(crate) fn is_merged(&self) -> bool {
        self.merged.load(Ordering::Relaxed)
    }

    pub(crate) fn set_merged(&self, merged: bool) {
        self.merged.store(merged, Ordering::Relaxed);
    }
}

/// The state of a network's adapters in one pass.
#[derive(Clone, Debug, Default)]
pub(crate) struct Switches(Vec<SwitchState>);

#[derive(Clone, Debug)]
struct SwitchState {
    switch: Arc<Switch>,
    on: u32,
    merged: bool,
}

/// Restores the adapter state of an earlier pass until it is dropped.
pub(crate) struct RestoreGuard<'a>(Vec<(&'a Switch, u32)>);

impl Switches {
    /// The current state.
    pub(crate) fn of(layers: &[Layer]) -> Self {
        let mut found: Vec<SwitchState> = Vec::new();
        for layer in layers {
            for Adapter { switch, .. } in &*layer.slot.lock() {
                if !found.iter().any(|state| Arc::ptr_eq(&state.switch, switch)) {
                    let (on, merged) = (switch.on(), switch.is_merged());
                    found.push(SwitchState { switch: Arc::clone(switch), on, merged });
                }
            }
        }
        Self(found)
    }

    /// Restores the state.
    pub(crate) fn restore(&self) -> Result<RestoreGuard<'_>, TchError> {
        if self.0.iter().any(|state| state.switch.is_merged() != state.merged) {
            let reason = "adapters were merged or unmerged between the forward pass and the backward pass, which recomputes \
                          values that were not kept";
            return Err(TchError::Torch(reason.to_owned()));
        }
        Ok(RestoreGuard(self.0.iter().map(|a| (&*a.switch, a.switch.activate(a.on))).collect()))
    }
}

impl Drop for RestoreGuard<'_> {
    fn drop(&mut self) {
        for (switch, before) in &self.0 {
            switch.activate(*before);
        }
    }
}

/// The two low-rank weights of an adapter.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) number: u32,
    pub(crate) switch: Arc<Switch>,
    pub(crate) form: Form,
    /// A: from inputs to `rank` values.
    pub(crate) down: Tensor,
    /// B: from `rank` values to outputs.
    pub(crate) up: Tensor,
    pub(crate) scale: f64,
}

impl Adapter {
    fn is_active(&self) -> bool {
        self.switch.on() == self.number && !self.switch.is_merged()
    }

    /// `y + scale * B(A x)`, in the kind of `y`.
    fn add(&self, x: &Tensor, y: &Tensor) -> Output {
        let x = x.f_to_kind(self.down.kind())?;
        let inner = self.form.apply(&x, &self.down)?;
        let delta = self.form.pointwise().apply(&inner, &self.up)?;
        // Saves a pass over the output if alpha equals the rank.
        let delta = if self.scale == 1.0 { delta } else { delta.f_mul_scalar(self.scale)? };
        y.f_add(&delta)?.f_to_kind(y.kind())
    }

    /// `scale * B A` in the shape of `weight`.
    pub(crate) fn delta(&self, weight: &Tensor) -> Output {
        let product = self.up.f_flatten(1, -1)?.f_matmul(&self.down.f_flatten(1, -1)?)?;
        product.f_mul_scalar(self.scale)?.f_view(&weight.size()[..])
    }
}

/// The adapters of a layer; empty unless one is attached.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slot(Arc<Mutex<Vec<Adapter>>>);

impl Slot {
    /// The output `y` of a layer for `x`, plus the contribution of the active adapter.
    pub(crate) fn adapt(&self, x: &Tensor, y: Tensor) -> Result<Tensor, TchError> {
        match self.lock().iter().find(|adapter| adapter.is_active()) {
            Some(adapter) => adapter.add(x, &y),
            None => Ok(y),
        }
    }

    /// Calls a function with the adapter of this number, if it exists.
    pub(crate) fn with<T>(&self, number: u32, act: impl FnOnce(&mut Adapter) -> T) -> Option<T> {
        self.lock().iter_mut().find(|adapter| adapter.number == number).map(act)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Adapter>> {
        // An adapter is only inserted or removed as a whole.
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

    /// Shapes of A and B of an adapter of this rank.
    pub(crate) fn shapes(&self, rank: i64) -> [Vec<i64>; 2] {
        let mut down = self.weight.size();
        let mut up = vec![1; down.len()];
        (up[0], up[1], down[0]) = (down[0], rank, rank);
        [down, up]
    }
}
