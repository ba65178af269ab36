#![allow(unsafe_code, reason = "lends a function to C++")]

use std::any::Any;
use std::borrow::Borrow;
use std::ffi::{CString, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use tch::{TchError, Tensor};

use crate::ffi::{self, check, new_tensor};
use crate::{Result, TensorList};

const OP: &str = "recomputed";

type Answer = std::result::Result<Tensor, TchError>;
type Function = dyn Fn(&[Tensor]) -> Answer + Send;

/// The object that C++ owns; a mutex allows one call at a time, so a function that is `Send` may be called from any
/// thread.
struct SharedFunction(Mutex<Box<Function>>);

/// The result of `function` on `inputs`, with only the inputs kept for the backward pass, which calls the function
/// again with gradients.
///
/// Activation checkpointing ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)): a network in n such parts keeps n
/// inputs and at any time the intermediate results of one part, at the cost of one more forward pass.
///
/// Gradients reach the inputs and every parameter that the function reads, by `backward` and by `run_backward`, and
/// parts can be nested. The second call uses the autocast state of the first, whatever thread the backward pass runs
/// on, and draws the same random numbers from libtorch's default generators, which are restored afterwards. If
/// gradients are off, the function is simply called.
///
/// The function must return the same result both times: everything else that it reads must not change between the
/// passes. libtorch detects changes to inputs and to parameters with gradients, and returns an error; changes to
/// constants are not detected. Tensors that have a graph must be passed as inputs. There is no second derivative, and
/// the function must not wait for the thread that runs the backward pass.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch) with the error of the function, or with its panic. In the backward pass, this
/// is an error of that pass.
///
/// # Example
///
/// ```
/// use ddil_libtorch::recomputed;
/// use tch::{Kind, Tensor, kind::FLOAT_CPU};
///
/// let weight = Tensor::ones([3, 4], FLOAT_CPU).set_requires_grad(true);
/// let held = weight.shallow_clone();
/// let x = Tensor::ones([2, 4], FLOAT_CPU);
/// let y = recomputed([&x], move |inputs| inputs[0].f_linear(&held, None::<Tensor>)?.f_gelu("none"))?;
/// y.sum(Kind::Float).backward();
/// assert_eq!(weight.grad().size(), [3, 4]);
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
pub fn recomputed<T: Borrow<Tensor>>(
    inputs: impl IntoIterator<Item = T>,
    function: impl Fn(&[Tensor]) -> Answer + Send + 'static,
) -> Result<Tensor> {
    let inputs = TensorList::new(inputs)?;
    let shared = Box::new(SharedFunction(Mutex::new(Box::new(function))));
    let shared = Box::into_raw(shared).cast::<c_void>();
    // SAFETY: the list lives through the call. C++ owns `shared` from here on, passes it to `call` only before `release`,
    // and to `release` once, also on failure; it may do so from any thread, which a `Mutex` over a `Send` value allows.
    new_tensor(OP, |out| unsafe {
        ffi::ddil_recomputed(inputs.as_ptr(), shared, call, release, out)
    })
}

impl SharedFunction {
    /// Calls the function and appends its result to `outputs`.
    fn run(
        &self,
        inputs: *const ffi::List,
        outputs: *mut ffi::List,
    ) -> std::result::Result<(), String> {
        let inputs = inputs_of(inputs).map_err(|error| error.to_string())?;
        // The function is called by shared reference, so a panic in it leaves nothing half done here.
        let function = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let output = function(&inputs).map_err(|error| reason_of(&error))?;
        // SAFETY: `outputs` is C++'s own list, which waits for this call; the tensor lives through the inner call.
        check(OP, unsafe { ffi::ddil_list_push(outputs, output.as_ptr()) })
            .map_err(|error| error.to_string())
    }
}

fn inputs_of(list: *const ffi::List) -> Result<Vec<Tensor>> {
    // SAFETY: C++ keeps the list during this call.
    let len = unsafe { ffi::ddil_list_len(list) };
    // SAFETY: as above, and C++ checks the index.
    let input = |i| new_tensor(OP, |out| unsafe { ffi::ddil_list_get(list, i, out) });
    (0..len).map(input).collect()
}

/// Removes the backtrace that tch leaves in libtorch's message.
fn reason_of(error: &TchError) -> String {
    let TchError::Torch(message) = error else { return error.to_string() };
    message.split("\nException raised from").next().unwrap_or(message).to_owned()
}

extern "C" fn call(
    shared: *mut c_void,
    inputs: *const ffi::List,
    outputs: *mut ffi::List,
) -> c_int {
    // SAFETY: `shared` is what `recomputed` passed to C++, which has not released it.
    let shared = unsafe { &*shared.cast::<SharedFunction>() };
    let message = match catch_unwind(AssertUnwindSafe(|| shared.run(inputs, outputs))) {
        Ok(Ok(())) => return 0,
        Ok(Err(message)) => message,
        Err(panic) => format!("the function panicked: {}", message_of(&*panic)),
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: a string that ends with a zero, which C++ copies.
    unsafe { ffi::ddil_set_last_error(message.as_ptr()) };
    1
}

extern "C" fn release(shared: *mut c_void) {
    // SAFETY: `shared` came from `Box::into_raw` in `recomputed` and is returned once.
    drop(unsafe { Box::from_raw(shared.cast::<SharedFunction>()) });
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason given")
}
