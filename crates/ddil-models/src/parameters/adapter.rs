//! What a layer holds for an adapter, and what an adapter adds to the layer's output.

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

    /// The same without a neighbourhood: what takes the `rank` numbers of one place to its outputs.
    fn pointwise(self) -> Self {
        match self {
            Self::Linear => Self::Linear,
            Self::Conv { .. } => Self::Conv { stride: 1, padding: 0 },
        }
    }
}

/// Which of the adapters that stand on the same layers is asked: one word for all layers, read at every pass.
///
/// Nothing else is ordered by it, so the loads and stores need no order either.
#[derive(Debug, Default)]
pub(crate) struct Switch {
    /// Number of the one that is on; 0 is none.
    on: AtomicU32,
    /// How many there have been.
    made: AtomicU32,
    /// Whether one is part of the base weights, and none may be added.
    merged: AtomicBool,
}

impl Switch {
    /// The number of a further adapter.
    pub(crate) fn next(&self) -> u32 {
        self.made.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Which one is on; 0 is none.
    pub(crate) fn on(&self) -> u32 {
        self.on.load(Ordering::Relaxed)
    }

    /// Puts one on, or none, and returns which one was.
    pub(crate) fn put_on(&self, number: u32) -> u32 {
        self.on.swap(number, Ordering::Relaxed)
    }

    pub(crate) fn is_merged(&self) -> bool {
        self.merged.load(Ordering::Relaxed)
    }

    pub(crate) fn set_merged(&self, merged: bool) {
        self.merged.store(merged, Ordering::Relaxed);
    }
}

/// The adapters of a network as one pass of it finds them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Switches(Vec<Asked>);

#[derive(Clone, Debug)]
struct Asked {
    switch: Arc<Switch>,
    on: u32,
    merged: bool,
}

/// A network that is asked as an earlier pass asked it, for as long as this lives.
pub(crate) struct AsAsked<'a>(Vec<(&'a Switch, u32)>);

impl Switches {
    /// As they stand now.
    pub(crate) fn of(layers: &[Layer]) -> Self {
        let mut found: Vec<Asked> = Vec::new();
        for layer in layers {
            for Adapter { switch, .. } in &*layer.slot.lock() {
                if !found.iter().any(|asked| Arc::ptr_eq(&asked.switch, switch)) {
                    let (on, merged) = (switch.on(), switch.is_merged());
                    found.push(Asked { switch: Arc::clone(switch), on, merged });
                }
            }
        }
        Self(found)
    }

    /// Puts them as they stood.
    pub(crate) fn put_on(&self) -> Result<AsAsked<'_>, TchError> {
        if self.0.iter().any(|asked| asked.switch.is_merged() != asked.merged) {
            let reason = "adapters were merged or unmerged between the forward pass and the backward pass, which computes \
                          again what was not kept";
            return Err(TchError::Torch(reason.to_owned()));
        }
        Ok(AsAsked(self.0.iter().map(|a| (&*a.switch, a.switch.put_on(a.on))).collect()))
    }
}

impl Drop for AsAsked<'_> {
    fn drop(&mut self) {
        for (switch, before) in &self.0 {
            switch.put_on(*before);
        }
    }
}

/// Two weights of low rank beside the one of a layer.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) number: u32,
    pub(crate) switch: Arc<Switch>,
    pub(crate) form: Form,
    /// A: inputs to `rank` numbers.
    pub(crate) down: Tensor,
    /// B: `rank` numbers to outputs.
    pub(crate) up: Tensor,
    pub(crate) scale: f64,
}

impl Adapter {
    fn is_asked(&self) -> bool {
        self.switch.on() == self.number && !self.switch.is_merged()
    }

    /// `y + scale * B(A x)`, in the kind of `y`.
    fn add(&self, x: &Tensor, y: &Tensor) -> Output {
        let x = x.f_to_kind(self.down.kind())?;
        let inner = self.form.apply(&x, &self.down)?;
        let delta = self.form.pointwise().apply(&inner, &self.up)?;
        // A pass over the output less, where alpha is the rank.
        let delta = if self.scale == 1.0 { delta } else { delta.f_mul_scalar(self.scale)? };
        y.f_add(&delta)?.f_to_kind(y.kind())
    }

    /// `scale * B A` in the shape of `weight`.
    pub(crate) fn delta(&self, weight: &Tensor) -> Output {
        let product = self.up.f_flatten(1, -1)?.f_matmul(&self.down.f_flatten(1, -1)?)?;
        product.f_mul_scalar(self.scale)?.f_view(&weight.size()[..])
    }
}

/// Where a layer finds its adapters; empty unless one is attached.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slot(Arc<Mutex<Vec<Adapter>>>);

impl Slot {
    /// The output `y` of a layer for `x`, with what the adapter adds that is on.
    pub(crate) fn adapt(&self, x: &Tensor, y: Tensor) -> Result<Tensor, TchError> {
        match self.lock().iter().find(|adapter| adapter.is_asked()) {
            Some(adapter) => adapter.add(x, &y),
            None => Ok(y),
        }
    }

    /// Does something with the adapter of that number; nothing if it is not there.
    pub(crate) fn with<T>(&self, number: u32, act: impl FnOnce(&mut Adapter) -> T) -> Option<T> {
        self.lock().iter_mut().find(|adapter| adapter.number == number).map(act)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Adapter>> {
        // An adapter is only ever put in or taken out whole.
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
