#![allow(unsafe_code, reason = "calls C++")]

use crate::ffi::{self, check};
use crate::{Error, Result, TensorList};

/// The hyperparameters of a [`fused_adamw_`] step. The defaults are those of Python's `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate; 1e-3 by default.
    pub lr: f64,
    /// Decay of the running mean of gradients; 0.9 by default.
    pub beta1: f64,
    /// Decay of the running mean of squared gradients; 0.999 by default.
    pub beta2: f64,
    /// Decoupled weight decay; 1e-2 by default.
    pub weight_decay: f64,
    /// Added to the denominator; 1e-8 by default.
    pub eps: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, weight_decay: 1e-2, eps: 1e-8 }
    }
}

impl AdamW {
    fn ensure_valid(&self) -> Result<()> {
        let Self { lr, beta1, beta2, weight_decay, eps } = *self;
        for (name, value) in [("lr", lr), ("weight_decay", weight_decay), ("eps", eps)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(invalid(name, value, "finite and 0 or more"));
            }
        }
        for (name, value) in [("beta1", beta1), ("beta2", beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(invalid(name, value, "at least 0 and less than 1"));
            }
        }
        Ok(())
    }
}

fn invalid(name: &'static str, value: f64, expected: &'static str) -> Error {
    Error::value("fused_adamw_", name, value, expected)
}

/// One `AdamW` step over all parameters, in place, in one pass over memory.
///
/// With `t` the incremented step counter, `m` in `exp_avgs` and `v` in `exp_avg_sqs`:
///
/// ```text
/// p = p - lr weight_decay p
/// m = beta1 m + (1 - beta1) g
/// v = beta2 v + (1 - beta2) g²
/// p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
/// ```
///
/// Algorithm 2 of [Loshchilov and Hutter 2017](https://arxiv.org/abs/1711.05101) with a schedule multiplier of 1 and a
/// weight decay scaled by `lr`, by libtorch's fused kernel. The lists contain its whole state; with them saved, a run
/// resumes exactly.
///
/// # Shapes and units
///
/// - `grads`, `exp_avgs`, `exp_avg_sqs`: as `params` in shape, kind and device; the moments also in strides
/// - `steps`: one `Float` for each parameter, on its device; created by [`TensorList::steps`]
///
/// # Errors
///
/// [`Error::Argument`] for settings out of range, [`Error::Torch`] for lists that do not fit each other; then
/// nothing has changed.
///
/// # Example
///
/// ```
/// use ddil_libtorch::{AdamW, TensorList, fused_adamw_, grads};
/// use tch::{Tensor, kind::FLOAT_CPU};
///
/// let weight = Tensor::ones([4], FLOAT_CPU).set_requires_grad(true);
/// let params = TensorList::new([&weight])?;
/// let (exp_avgs, exp_avg_sqs) = (params.zeros_like()?, params.zeros_like()?);
/// let steps = params.steps()?;
///
/// weight.square().sum(tch::Kind::Float).backward();
/// fused_adamw_(&params, &grads(&params)?, &exp_avgs, &exp_avg_sqs, &steps, &AdamW::default())?;
/// assert!(weight.double_value(&[0]) < 1.0);
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
pub fn fused_adamw_(
    params: &TensorList,
    grads: &TensorList,
    exp_avgs: &TensorList,
    exp_avg_sqs: &TensorList,
    steps: &TensorList,
    settings: &AdamW,
) -> Result<()> {
    settings.ensure_valid()?;
    let AdamW { lr, beta1, beta2, weight_decay, eps } = *settings;
    // SAFETY: all five vectors live through the call; C++ checks that they fit before it changes anything.
    let code = unsafe {
        ffi::ddil_fused_adamw(
            params.as_ptr(),
            grads.as_ptr(),
            exp_avgs.as_ptr(),
            exp_avg_sqs.as_ptr(),
            steps.as_ptr(),
            lr,
            beta1,
            beta2,
            weight_decay,
            eps,
        )
    };
    check("fused_adamw_", code)
}
