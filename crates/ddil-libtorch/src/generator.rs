#![allow(unsafe_code, reason = "owns a C++ object")]

use std::fmt;
use std::ptr::{self, NonNull};

use tch::{Device, Kind, Tensor};

use crate::ffi::{self, check, device_index, kind_number, new_tensor};
use crate::{Error, Result};

/// A random stream with its own state, independent of `tch::manual_seed`.
///
/// Draws the same numbers as Python's `torch.Generator` with the same seed, shapes and order of calls. Results are on
/// the generator's device; CPU and CUDA draw different numbers from the same seed.
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

// SAFETY: the C++ object is reached only through this handle, holds no thread-local data and counts its references
// atomically.
unsafe impl Send for Generator {}

impl Generator {
    /// A generator on `device` with a seed.
    ///
    /// # Errors
    ///
    /// [`Error::UnsupportedDevice`] beyond CPU and CUDA, [`Error::Torch`] if there is no such CUDA device.
    pub fn new(device: Device, seed: u64) -> Result<Self> {
        const OP: &str = "Generator::new";
        let mut raw = ptr::null_mut();
        let index = device_index(OP, device)?;
        // SAFETY: the output pointer is valid.
        check(OP, unsafe { ffi::ddil_generator_new(index, seed, &raw mut raw) })?;
        // Null only if the shim violates its contract.
        let raw = NonNull::new(raw).ok_or_else(|| Error::Torch {
            op: OP,
            message: "libtorch returned no generator".to_owned(),
        })?;
        Ok(Self { raw, device })
    }

    /// Its device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The whole state of the stream, as bytes on the CPU, to be restored by
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

    /// Continues from a state returned by [`state`](Self::state), of any generator on this kind of device.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the bytes are not such a state; the stream is then unchanged.
    pub fn set_state(&mut self, state: &Tensor) -> Result<()> {
        // SAFETY: both objects live through the call, and `&mut self` excludes other users.
        let code = unsafe { ffi::ddil_generator_set_state(self.raw.as_ptr(), state.as_ptr()) };
        check("Generator::set_state", code)
    }

    /// Draws from the standard normal distribution, as `torch.randn`.
    ///
    /// On the CPU, `Float` is drawn by vectorised loops on libtorch's threads. The numbers and the final state of the
    /// generator equal those of libtorch bit for bit, for any number of threads: see [`normal_is_vectorised`].
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] for a negative size or a kind that is not a floating-point kind.
    pub fn normal(&mut self, shape: impl AsRef<[i64]>, kind: Kind) -> Result<Tensor> {
        let (shape, kind) = (shape.as_ref(), kind_number(kind));
        // SAFETY: generator and shape live through the call, `rank` is the length of `shape`.
        new_tensor("Generator::normal", |out| unsafe {
            ffi::ddil_generator_normal(self.raw.as_ptr(), shape.as_ptr(), shape.len(), kind, out)
        })
    }

    /// Overwrites `tensor` with standard normal numbers, as `torch.Tensor.normal_`; otherwise like
    /// [`normal`](Self::normal).
    ///
    /// Elements are drawn in the order of their indices. A tensor that is not contiguous, or has fewer than
    /// 16 elements, gets different numbers than a contiguous or larger one, as in libtorch.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if `tensor` is undefined, on another device than the generator, not of a
    /// floating-point kind, overlaps itself in memory, or is a leaf that requires a gradient while gradients are
    /// recorded.
    pub fn fill_normal(&mut self, tensor: &mut Tensor) -> Result<()> {
        // SAFETY: generator and tensor live through the call, and `&mut self` excludes other users.
        let code = unsafe { ffi::ddil_generator_fill_normal(self.raw.as_ptr(), tensor.as_ptr()) };
        check("Generator::fill_normal", code)
    }

    /// Draws from the uniform distribution on [0, 1), as `torch.rand`.
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

    /// Draws `Int64` numbers uniformly from `low` to `high - 1`, as `torch.randint`.
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

    /// The `Int64` numbers from 0 to `n - 1` in random order, as `torch.randperm`.
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
        // SAFETY: the generator came from the `new` of the shim and is freed once, here.
        unsafe { ffi::ddil_generator_free(self.raw.as_ptr()) }
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator").field("device", &self.device).finish_non_exhaustive()
    }
}

/// Whether normal `Float` numbers on the CPU are drawn by the vectorised loops of this crate.
///
/// They are on an x86-64 processor with AVX2 and FMA, if 131 075 numbers agree bit for bit with libtorch's own; this is
/// checked once per process and takes about a millisecond. Otherwise, for example if `ATEN_CPU_CAPABILITY` selects
/// another code path of libtorch, libtorch draws them on one thread: slower, and with the numbers that it draws there.
///
/// # Errors
///
/// [`Error::Torch`] if memory runs out.
pub fn normal_is_vectorised() -> Result<bool> {
    let mut vectorised = false;
    // SAFETY: the output pointer is valid.
    let code = unsafe { ffi::ddil_fills_normal_itself(&raw mut vectorised) };
    check("normal_is_vectorised", code)?;
    Ok(vectorised)
}

/// The state of libtorch's default generator, which is used by dropout or `Tensor::randn`, for example.
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

/// Sets libtorch's default generator to a state returned by [`default_generator_state`].
///
/// # Errors
///
/// As [`default_generator_state`], and [`Error::Torch`] if the bytes are not such a state.
pub fn set_default_generator_state(device: Device, state: &Tensor) -> Result<()> {
    const OP: &str = "set_default_generator_state";
    let index = device_index(OP, device)?;
    // SAFETY: the tensor lives through the call; C++ holds the generator's lock.
    check(OP, unsafe { ffi::ddil_default_generator_set_state(index, state.as_ptr()) })
}
