#![allow(unsafe_code, reason = "owns a C++ object")]

use std::borrow::Borrow;
use std::fmt;
use std::ptr::{self, NonNull};

use tch::Tensor;

use crate::ffi::{self, check, new_tensor};
use crate::{Error, Result};

/// A list of tensors on the C++ side, so that an operation over it does not collect them at each call.
///
/// Contains the tensors themselves, not copies: an operation that changes the list in place changes the original
/// tensors.
///
/// A list of gradients goes stale when the gradients are dropped, by [`drop_grads`](crate::drop_grads) or by tch's
/// `Optimizer::zero_grad`: create it again after the next backward pass, or set the gradients to zero with
/// [`foreach_zero_`](crate::foreach_zero_).
///
/// # Example
///
/// ```
/// use ddil_libtorch::TensorList;
/// use tch::{Tensor, kind::FLOAT_CPU};
///
/// let weights = [Tensor::ones([2, 3], FLOAT_CPU), Tensor::ones([3], FLOAT_CPU)];
/// let list = TensorList::new(&weights)?;
/// assert_eq!(list.len(), 2);
/// assert_eq!(list.zeros_like()?.get(0)?.size(), [2, 3]);
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
pub struct TensorList(NonNull<ffi::List>);

// SAFETY: only this handle owns the vector, and the tensors in it may move between threads as tch's own
// `Tensor` may: their reference counts are atomic.
unsafe impl Send for TensorList {}

impl TensorList {
    /// A list of `tensors`, in their order.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if one is undefined.
    pub fn new<T: Borrow<Tensor>>(tensors: impl IntoIterator<Item = T>) -> Result<Self> {
        let mut list = Self::empty()?;
        for tensor in tensors {
            list.push(tensor.borrow())?;
        }
        Ok(list)
    }

    /// Appends a tensor.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if it is undefined.
    pub fn push(&mut self, tensor: &Tensor) -> Result<()> {
        // SAFETY: both objects live through the call, and `&mut self` excludes other users of the vector.
        let code = unsafe { ffi::ddil_list_push(self.0.as_ptr(), tensor.as_ptr()) };
        check("TensorList::push", code)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        // SAFETY: the vector lives as long as `self`.
        unsafe { ffi::ddil_list_len(self.as_ptr()) }
    }

    /// Whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tensor at `index`; it shares memory with the one in the list.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if the index is out of range.
    pub fn get(&self, index: usize) -> Result<Tensor> {
        if index >= self.len() {
            return Err(Error::value(
                "TensorList::get",
                "index",
                format!("{index} of {}", self.len()),
                "less than the length of the list",
            ));
        }
        // SAFETY: the vector lives through the call, and C++ checks the index again.
        new_tensor("TensorList::get", |out| unsafe {
            ffi::ddil_list_get(self.as_ptr(), index, out)
        })
    }

    /// All tensors; they share memory with those in the list.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out.
    pub fn to_vec(&self) -> Result<Vec<Tensor>> {
        (0..self.len()).map(|index| self.get(index)).collect()
    }

    /// A list of zeros with the shapes, kinds, devices and strides of this one.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out.
    pub fn zeros_like(&self) -> Result<Self> {
        // SAFETY: the vector lives through the call.
        Self::made("TensorList::zeros_like", |out| unsafe {
            ffi::ddil_list_zeros_like(self.as_ptr(), out)
        })
    }

    /// Step counters for [`fused_adamw_`](crate::fused_adamw_): one `Float` zero for each tensor, on its device.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out.
    pub fn steps(&self) -> Result<Self> {
        // SAFETY: the vector lives through the call.
        Self::made("TensorList::steps", |out| unsafe { ffi::ddil_list_steps(self.as_ptr(), out) })
    }

    pub(crate) fn as_ptr(&self) -> *const ffi::List {
        self.0.as_ptr()
    }

    pub(crate) fn made(
        op: &'static str,
        make: impl FnOnce(*mut *mut ffi::List) -> i32,
    ) -> Result<Self> {
        let mut list = ptr::null_mut();
        check(op, make(&raw mut list))?;
        // Null only if a function of the shim violates its contract.
        NonNull::new(list)
            .map(Self)
            .ok_or_else(|| Error::Torch { op, message: "libtorch returned no list".to_owned() })
    }

    fn empty() -> Result<Self> {
        // SAFETY: the output pointer is valid.
        Self::made("TensorList::new", |out| unsafe { ffi::ddil_list_new(out) })
    }
}

impl Drop for TensorList {
    fn drop(&mut self) {
        // SAFETY: the vector came from the `new` of the shim and is freed once, here.
        unsafe { ffi::ddil_list_free(self.0.as_ptr()) }
    }
}

impl fmt::Debug for TensorList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorList").field("len", &self.len()).finish_non_exhaustive()
    }
}
