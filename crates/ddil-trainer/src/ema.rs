//! An exponential moving average of a network's weights.

use ddil_files::Invalid;
use ddil_libtorch::{TensorList, foreach_lerp_};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result, state};

/// The settings of [`Ema`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EmaConfig {
    /// Fraction of the average that an update keeps; 0.999 by default.
    pub decay: f64,
    /// Whether early updates keep less, at most `(1 + n) / (10 + n)` after `n` updates; on by default.
    pub warmup: bool,
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self { decay: 0.999, warmup: true }
    }
}

impl EmaConfig {
    /// The same settings with a change: `EmaConfig::default().with(|config| config.decay = ..)`.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Checks the settings and starts an average at the present values of these tensors.
    ///
    /// The tensors are shared, not copied: parameters, and buffers if there are any. An average has the kind of its
    /// tensor, except that 16-bit tensors are averaged in `Float`, because a decay of 0.999 would be rounded away;
    /// integer tensors are copied.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `0 <= decay <= 1`, [`Error::Torch`] if memory runs out.
    pub fn build(self, mut tensors: Vec<(String, Tensor)>) -> Result<Ema> {
        self.ensure_valid()?;
        tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
        let _guard = tch::no_grad_guard();
        let averages: Result<Vec<(String, Tensor)>, tch::TchError> = tensors
            .iter()
            .map(|(name, tensor)| {
                let kind = average_kind(tensor.kind());
                Ok((name.clone(), duplicate(tensor)?.f_to_kind(kind)?))
            })
            .collect();
        let averages = averages.map_err(Error::torch("EmaConfig::build"))?;
        let together = Together::of(&averages, &tensors)?;
        Ok(Ema { config: self, watched: tensors, averages, together, num_updates: 0 })
    }

    pub(crate) fn ensure_valid(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.decay) {
            return Ok(());
        }
        Err(Error::Invalid(Invalid::new("decay", self.decay, "from 0 to 1")))
    }
}

/// An exponential moving average of named tensors: `average = decay average + (1 - decay) value`.
///
/// # Example
///
/// ```
/// use ddil_trainer::EmaConfig;
/// use tch::{Tensor, kind::FLOAT_CPU};
///
/// let weight = Tensor::zeros([1], FLOAT_CPU);
/// let config = EmaConfig::default().with(|config| {
///     config.decay = 0.5;
///     config.warmup = false;
/// });
/// let mut ema = config.build(vec![("weight".into(), weight.shallow_clone())])?;
/// let _ = weight.shallow_clone().fill_(1.0);
/// ema.update()?;
/// {
///     let _applied = ema.apply()?;
///     assert_eq!(weight.double_value(&[0]), 0.5);
/// }
/// assert_eq!(weight.double_value(&[0]), 1.0);
/// # Ok::<(), ddil_trainer::Error>(())
/// ```
#[derive(Debug)]
pub struct Ema {
    config: EmaConfig,
    watched: Vec<(String, Tensor)>,
    averages: Vec<(String, Tensor)>,
    together: Together,
    num_updates: u64,
}

/// Tensors updated by one fused call: all averages that have the kind of their tensor.
#[derive(Debug)]
struct Together {
    averages: TensorList,
    values: TensorList,
    /// Indices of the others.
    rest: Vec<usize>,
}

impl Together {
    fn of(averages: &[(String, Tensor)], values: &[(String, Tensor)]) -> Result<Self> {
        let moves = |place: &usize| {
            let kind = averages[*place].1.kind();
            is_floating(kind) && kind == values[*place].1.kind()
        };
        let (together, rest): (Vec<usize>, Vec<usize>) = (0..averages.len()).partition(moves);
        let list =
            |named: &[(String, Tensor)]| TensorList::new(together.iter().map(|i| &named[*i].1));
        Ok(Self { averages: list(averages)?, values: list(values)?, rest })
    }
}

impl Ema {
    /// Updates the averages with the present values. Does not wait for the device.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] or [`Error::Libtorch`] if libtorch fails, for instance out of memory.
    pub fn update(&mut self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let weight = 1.0 - self.decay();
        let Together { averages, values, rest } = &self.together;
        foreach_lerp_(averages, values, weight)?;
        for place in rest {
            follow(&self.averages[*place].1, &self.watched[*place].1, weight)?;
        }
        self.num_updates += 1;
        Ok(())
    }

    /// Fraction of the average that the next update keeps.
    pub fn decay(&self) -> f64 {
        let n = self.num_updates as f64;
        if self.config.warmup {
            self.config.decay.min((1.0 + n) / (10.0 + n))
        } else {
            self.config.decay
        }
    }

    /// The number of updates done; to be saved with [`tensors`](Self::tensors).
    pub fn num_updates(&self) -> u64 {
        self.num_updates
    }

    /// The averages under the names of their tensors, so that the saved file is a weights file.
    pub fn tensors(&self) -> &[(String, Tensor)] {
        &self.averages
    }

    /// Restores saved averages.
    ///
    /// # Errors
    ///
    /// [`Error::StateMismatch`] if a name, shape or kind differs; nothing has changed in that case.
    pub fn load(&mut self, saved: &[(String, Tensor)], num_updates: u64) -> Result<()> {
        state::restore("EMA", &self.averages, saved)?;
        self.num_updates = num_updates;
        Ok(())
    }

    /// Copies the averages into other tensors of the same names, such as those of a new teacher.
    ///
    /// # Errors
    ///
    /// [`Error::StateMismatch`] if a name, shape or kind differs; nothing has changed in that case.
    pub fn copy_to(&self, targets: &[(String, Tensor)]) -> Result<()> {
        state::restore("EMA", targets, &self.averages)
    }

    /// Copies the averages into the network until the returned guard is dropped, which restores the weights.
    ///
    /// Holds a copy of the weights meanwhile. Dropping the guard undoes any training in between.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out; the network is then unchanged.
    pub fn apply(&self) -> Result<Applied<'_>> {
        let _guard = tch::no_grad_guard();
        let values: Result<Vec<Tensor>, tch::TchError> =
            self.watched.iter().map(|(_, tensor)| duplicate(tensor)).collect();
        let applied = Applied { ema: self, values: values.map_err(Error::torch("Ema::apply"))? };
        for ((_, tensor), (_, average)) in self.watched.iter().zip(&self.averages) {
            copy(tensor, average)?;
        }
        Ok(applied)
    }
}

/// A network with its averaged weights while this guard lives; see [`Ema::apply`].
#[derive(Debug)]
#[must_use = "the network's own weights are restored when this is dropped"]
pub struct Applied<'a> {
    ema: &'a Ema,
    values: Vec<Tensor>,
}

impl Drop for Applied<'_> {
    fn drop(&mut self) {
        let _guard = tch::no_grad_guard();
        for ((_, tensor), value) in self.ema.watched.iter().zip(&self.values) {
            // Cannot fail: the copy was made from this tensor.
            let _ = copy(tensor, value);
        }
    }
}

fn is_floating(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}

fn average_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        kind => kind,
    }
}

/// One average outside the fused call: of a tensor of another kind, or of an integer tensor, which is copied.
fn follow(average: &Tensor, tensor: &Tensor, weight: f64) -> Result<()> {
    if !is_floating(average.kind()) {
        return copy(average, tensor);
    }
    let value = tensor.f_to_kind(average.kind());
    value
        .and_then(|value| average.shallow_clone().f_lerp_(&value, weight))
        .map(drop)
        .map_err(Error::torch("Ema::update"))
}

fn copy(target: &Tensor, source: &Tensor) -> Result<()> {
    target.shallow_clone().f_copy_(source).map(drop).map_err(Error::torch("Ema"))
}

/// A copy with its own memory, not tracked for gradients.
fn duplicate(tensor: &Tensor) -> Result<Tensor, tch::TchError> {
    let mut duplicate = tensor.f_detach()?.f_empty_like()?;
    duplicate.f_copy_(tensor)?;
    Ok(duplicate)
}
