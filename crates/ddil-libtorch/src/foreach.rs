#![allow(unsafe_code, reason = "calls C++")]

use std::ptr;

use tch::Tensor;

use crate::ffi::{self, check, new_tensor};
use crate::{Error, Result, TensorList};

/// Moves every tensor towards its target, in place: `x = x + weight * (target - x)`.
///
/// The step of an exponential moving average with decay `1 - weight`. On CUDA one kernel processes many tensors. Never
/// recorded for gradients.
///
/// # Errors
///
/// [`Error::Torch`] if the lists differ in length, or a pair in shape, kind or device; then nothing has changed.
pub fn foreach_lerp_(list: &TensorList, targets: &TensorList, weight: f64) -> Result<()> {
    // SAFETY: both vectors live through the call.
    let code = unsafe { ffi::ddil_foreach_lerp(list.as_ptr(), targets.as_ptr(), weight) };
    check("foreach_lerp_", code)
}

/// Fills every tensor with zeros. Never recorded for gradients.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch refuses, as for a tensor that overlaps itself.
pub fn foreach_zero_(list: &TensorList) -> Result<()> {
    // SAFETY: the vector lives through the call.
    check("foreach_zero_", unsafe { ffi::ddil_foreach_zero(list.as_ptr()) })
}

/// The gradients of `params`, in their order.
///
/// # Errors
///
/// [`Error::MissingGradient`] with the first index that has none.
pub fn grads(params: &TensorList) -> Result<TensorList> {
    let mut missing = -1;
    let mut list = ptr::null_mut();
    // SAFETY: the vector lives through the call, and both output pointers are valid.
    let code = unsafe { ffi::ddil_list_grads(params.as_ptr(), &raw mut missing, &raw mut list) };
    check("grads", code)?;
    if let Ok(index) = usize::try_from(missing) {
        return Err(Error::MissingGradient { index });
    }
    TensorList::made("grads", |out| {
        // SAFETY: `out` is the valid output pointer that `made` provides.
        unsafe { out.write(list) };
        0
    })
}

/// Drops the gradients of `params`. The next backward pass then stores new gradients instead of adding to existing
/// ones, and until then they take no memory.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch refuses.
pub fn drop_grads(params: &TensorList) -> Result<()> {
    // SAFETY: the vector lives through the call.
    check("drop_grads", unsafe { ffi::ddil_drop_grads(params.as_ptr()) })
}

/// The L2 norm over all elements of all tensors: a scalar on the device of the first one.
///
/// Does not wait for the device. 0 for an empty list.
///
/// # Errors
///
/// [`Error::Torch`] if a tensor is of an integer kind.
pub fn grad_norm(list: &TensorList) -> Result<Tensor> {
    // SAFETY: the vector lives through the call.
    new_tensor("grad_norm", |out| unsafe { ffi::ddil_grad_norm(list.as_ptr(), out) })
}

/// Scales all tensors by `min(1, max_norm / (norm + 1e-6))`, in place, and returns the norm before scaling.
///
/// The norm is that of [`grad_norm`], and the formula that of Python's `torch.nn.utils.clip_grad_norm_`. Does not
/// wait for a CUDA device. A norm that is not finite leaves gradients that are not finite: check what is returned.
///
/// # Errors
///
/// [`Error::Argument`] if `max_norm` is negative or NaN, [`Error::Torch`] if a tensor is of an
/// integer kind.
pub fn clip_grad_norm_(list: &TensorList, max_norm: f64) -> Result<Tensor> {
    if max_norm.is_nan() || max_norm < 0.0 {
        return Err(Error::value("clip_grad_norm_", "max_norm", max_norm, "0 or more"));
    }
    // SAFETY: the vector lives through the call.
    new_tensor("clip_grad_norm_", |out| unsafe {
        ffi::ddil_clip_grad_norm(list.as_ptr(), max_norm, out)
    })
}
