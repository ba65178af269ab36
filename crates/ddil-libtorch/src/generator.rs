#![allow(unsafe_code, reason = "owns a C++ object")]

use std::fmt;
use std::ptr::{self, NonNull};

use tch::{Device, Kind, Tensor};

use crate::ffi::{self, check, device_index, kind_number, new_tensor};
use crate::{Error, Result};

/// A stream of random numbers with a state of its own, apart from `tch::manual_seed`.
///
/// Gives the numbers of Python's `torch.Generator` with the same seed, shapes and order of calls. What it draws is on
/// its device; CPU and CUDA give different numbers for one seed.
///
/// # Example
///
/// ```
/// use ddil_libtorch::Generator;
/// use tch::{Device, Kind};
///
/// let mut generator = Generator::new(Device::Cpu, 7)?;
/// let state = generator.state()?;
/// let noise = generator.normal([2, 3], Kind::Float)?;
/// generator.set_state(&state)?;
/// assert_eq!(generator.normal([2, 3], Kind::Float)?, noise);
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
pub struct Generator {
    raw: NonNull<ffi::Generator>,
    device: Device,
}

// SAFETY: the C++ object is reached through this handle alone, holds no thread's data and counts its references
// atomically.
unsafe impl Send for Generator {}

impl Generator {
    /// A generator on `device`, seeded.
    ///
    /// # Errors
    ///
    /// [`Error::UnsupportedDevice`] beyond CPU and CUDA, [`Error::Torch`] if there is no such CUDA device.
    pub fn new(device: Device, seed: u64) -> Result<Self> {
        const OP: &str = "Generator::new";
        let mut raw = ptr::null_mut();
        let index = device_index(OP, device)?;
        // SAFETY: the place that C++ writes to is valid.
        check(OP, unsafe { ffi::ddil_generator_new(index, seed, &raw mut raw) })?;
        // Null only if the shim breaks its promise.
        let raw = NonNull::new(raw)
            .ok_or_else(|| Error::Torch { op: OP, message: "no generator was made".to_owned() })?;
        Ok(Self { raw, device })
    }

    /// Where it draws.
    pub fn device(&self) -> Device {
        self.device
    }

    /// All there is to know about what comes next: bytes on the CPU, to be kept and given to
    /// [`set_state`](Self::set_state).
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out.
    pub fn state(&self) -> Result<Tensor> {
        // SAFETY: the generator lives as long as `self`, and is not shared between threads.
        new_tensor("Generator::state", |out| unsafe {
            ffi::ddil_generator_state(self.raw.as_ptr(), out)
        })
    }

    /// Goes on from a state that [`state`](Self::state) gave, of any generator on this kind of device.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if these bytes are no such state; the stream is then as it was.
    pub fn set_state(&mut self, state: &Tensor) -> Result<()> {
        // SAFETY: both objects live through the call, and `&mut self` keeps others away.
        let code = unsafe { ffi::ddil_generator_set_state(self.raw.as_ptr(), state.as_ptr()) };
        check("Generator::set_state", code)
    }

    /// Draws from the standard normal distribution, as `torch.randn`.
    ///
    /// `Float` on the CPU is drawn by vectorised loops on libtorch's threads. Numbers and the state that the generator
    /// is left in are those of libtorch bit for bit, however many threads there are: see [`normal_is_vectorised`].
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] for a negative size or a kind that is not a floating point one.
    pub fn normal(&mut self, shape: impl AsRef<[i64]>, kind: Kind) -> Result<Tensor> {
        let (shape, kind) = (shape.as_ref(), kind_number(kind));
        // SAFETY: generator and shape live through the call, `rank` is the length of `shape`.
        new_tensor("Generator::normal", |out| unsafe {
            ffi::ddil_generator_normal(self.raw.as_ptr(), shape.as_ptr(), shape.len(), kind, out)
        })
    }

    /// Overwrites `tensor` with standard normal numbers, as `torch.Tensor.normal_`; otherwise as
    /// [`normal`](Self::normal).
    ///
    /// Elements are drawn in the order of their indices. Numbers of a tensor that is not contiguous, or has fewer than
    /// 16, are others than those of a contiguous or larger one, as in libtorch.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if `tensor` is undefined, on another device than the generator or of a kind that is not a
    /// floating point one, overlaps itself in memory, or is a leaf that requires a gradient while gradients are
    /// recorded.
    pub fn fill_normal(&mut self, tensor: &mut Tensor) -> Result<()> {
        // SAFETY: generator and tensor live through the call, and `&mut self` keeps others away.
        let code = unsafe { ffi::ddil_generator_fill_normal(self.raw.as_ptr(), tensor.as_ptr()) };
        check("Generator::fill_normal", code)
    }

    /// Draws evenly from 0 to 1, without 1, as `torch.rand`.
    ///
    /// # Errors
    ///
    /// As [`normal`](Self::normal).
    pub fn uniform(&mut self, shape: impl AsRef<[i64]>, kind: Kind) -> Result<Tensor> {
        let (shape, kind) = (shape.as_ref(), kind_number(kind));
        // SAFETY: as in `normal`.
        new_tensor("Generator::uniform", |out| unsafe {
            ffi::ddil_generator_uniform(self.raw.as_ptr(), shape.as_ptr(), shape.len(), kind, out)
        })
    }

    /// Draws `Int64` numbers evenly from `low` to `high`, without `high`, as `torch.randint`.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] for a negative size or unless `low < high`.
    pub fn randint(&mut self, low: i64, high: i64, shape: impl AsRef<[i64]>) -> Result<Tensor> {
        let shape = shape.as_ref();
        // SAFETY: as in `normal`.
        new_tensor("Generator::randint", |out| unsafe {
            ffi::ddil_generator_randint(
                self.raw.as_ptr(),
                low,
                high,
                shape.as_ptr(),
                shape.len(),
                out,
            )
        })
    }

    /// The `Int64` numbers from 0 to `n`, without `n`, in random order, as `torch.randperm`.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if `n` is negative.
    pub fn randperm(&mut self, n: i64) -> Result<Tensor> {
        // SAFETY: the generator lives through the call.
        new_tensor("Generator::randperm", |out| unsafe {
            ffi::ddil_generator_randperm(self.raw.as_ptr(), n, out)
        })
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        // SAFETY: the generator came from the `new` of the shim and is given back once, here.
        unsafe { ffi::ddil_generator_free(self.raw.as_ptr()) }
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator").field("device", &self.device).finish_non_exhaustive()
    }
}

/// Whether normal numbers of `Float` on the CPU come from the vectorised loops of this crate.
///
/// They do on an x86-64 processor with AVX2 and FMA, if they agree to the bit with libtorch's own over 131 075 numbers,
/// which is looked at once in a process and takes about a millisecond. Otherwise, as where `ATEN_CPU_CAPABILITY` has
/// libtorch compute them in another way, libtorch draws, on one thread: slower, and the same numbers as it draws there.
///
/// # Errors
///
/// [`Error::Torch`] if memory runs out.
pub fn normal_is_vectorised() -> Result<bool> {
    let mut vectorised = false;
    // SAFETY: the place that C++ writes to is valid.
    let code = unsafe { ffi::ddil_fills_normal_itself(&raw mut vectorised) };
    check("normal_is_vectorised", code)?;
    Ok(vectorised)
}

/// The state of the generator that libtorch uses where none is named, as in dropout or `Tensor::randn`.
///
/// # Errors
///
/// [`Error::UnsupportedDevice`] beyond CPU and CUDA, [`Error::Torch`] if there is no such CUDA device.
pub fn default_generator_state(device: Device) -> Result<Tensor> {
    const OP: &str = "default_generator_state";
    let index = device_index(OP, device)?;
    // SAFETY: passes a plain value; C++ holds the generator's lock.
    new_tensor(OP, |out| unsafe { ffi::ddil_default_generator_state(index, out) })
}

/// Makes libtorch's own generator go on from a state that [`default_generator_state`] gave.
///
/// # Errors
///
/// As [`default_generator_state`], and [`Error::Torch`] if these bytes are no such state.
pub fn set_default_generator_state(device: Device, state: &Tensor) -> Result<()> {
    const OP: &str = "set_default_generator_state";
    let index = device_index(OP, device)?;
    // SAFETY: the tensor lives through the call; C++ holds the generator's lock.
    check(OP, unsafe { ffi::ddil_default_generator_set_state(index, state.as_ptr()) })
}
