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

/// What C++ holds: one call at a time, so that a function that may be sent to another thread may be called from it.
struct Lent(Mutex<Box<Function>>);

/// What `function` makes of `inputs`, without keeping anything for the backward pass but the inputs: there the function
/// is called once more, with gradients.
///
/// Activation checkpointing ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)): a network in n such parts keeps n
/// inputs, and at any time the inner results of one part, for one forward pass more.
///
/// Gradients reach the inputs and every parameter that the function reads, by `backward` as by `run_backward`, and parts
/// may lie in parts. The second call finds autocast as the first found it, whatever thread the backward pass runs on, and
/// draws the same random numbers from libtorch's own generators, which afterwards stand where they stood. Where
/// gradients are off the function is just called.
///
/// The function must give the same answer both times: what else it reads must not change between the passes. libtorch
/// notices changes to inputs and to parameters with gradients, and refuses; nobody notices changes to constants. Tensors
/// with a graph behind them are to come in as inputs. There is no second derivative, and the function must not wait for
/// the thread that runs the backward pass.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch) with what the function said, or with its panic. In the backward pass, the same is an
/// error of that pass.
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
    let lent = Box::new(Lent(Mutex::new(Box::new(function))));
    let lent = Box::into_raw(lent).cast::<c_void>();
    // SAFETY: the list lives through the call. C++ owns `lent` from here on, hands it to `call` only before `release`,
    // and to `release` once, also if it fails; it may do so from any thread, which a `Mutex` over what is `Send` allows.
    new_tensor(OP, |out| unsafe { ffi::ddil_recomputed(inputs.as_ptr(), lent, call, release, out) })
}

impl Lent {
    /// Lets the function put its answer on `outputs`.
    fn run(
        &self,
        inputs: *const ffi::List,
        outputs: *mut ffi::List,
    ) -> std::result::Result<(), String> {
        let inputs = inputs_of(inputs).map_err(|error| error.to_string())?;
        // The function is called by shared reference: a panic in it leaves nothing half done here.
        let function = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let output = function(&inputs).map_err(|error| reason_of(&error))?;
        // SAFETY: `outputs` is C++'s own list, which waits for this call; the tensor lives through the inner one.
        check(OP, unsafe { ffi::ddil_list_push(outputs, output.as_ptr()) })
            .map_err(|error| error.to_string())
    }
}

fn inputs_of(list: *const ffi::List) -> Result<Vec<Tensor>> {
    // SAFETY: C++ keeps the list through the call that this is part of.
    let len = unsafe { ffi::ddil_list_len(list) };
    // SAFETY: as above, and C++ checks the index.
    let input = |i| new_tensor(OP, |out| unsafe { ffi::ddil_list_get(list, i, out) });
    (0..len).map(input).collect()
}

/// Without the backtrace that tch leaves in what libtorch says.
fn reason_of(error: &TchError) -> String {
    let TchError::Torch(message) = error else { return error.to_string() };
    message.split("\nException raised from").next().unwrap_or(message).to_owned()
}

extern "C" fn call(lent: *mut c_void, inputs: *const ffi::List, outputs: *mut ffi::List) -> c_int {
    // SAFETY: `lent` is what `recomputed` gave to C++, which has not released it.
    let lent = unsafe { &*lent.cast::<Lent>() };
    let message = match catch_unwind(AssertUnwindSafe(|| lent.run(inputs, outputs))) {
        Ok(Ok(())) => return 0,
        Ok(Err(message)) => message,
        Err(panic) => format!("the function panicked: {}", words_of(&*panic)),
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: a string that ends with a zero, of which C++ makes a copy.
    unsafe { ffi::ddil_set_last_error(message.as_ptr()) };
    1
}

extern "C" fn release(lent: *mut c_void) {
    // SAFETY: `lent` came from `Box::into_raw` in `recomputed` and comes back once.
    drop(unsafe { Box::from_raw(lent.cast::<Lent>()) });
}

fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason given")
}
