#![allow(unsafe_code, reason = "calls C++")]

use std::fmt;

use crate::Result;
use crate::ffi::{self, check};

/// The version of libtorch that this crate was built against: "2.13.0".
pub fn version() -> &'static str {
    ffi::version()
}

/// Whether a libtorch with CUDA is loaded into this program; there may still be no device.
pub fn cuda_built() -> bool {
    // SAFETY: takes nothing, and cannot throw past the shim.
    unsafe { ffi::ddil_has_cuda() }
}

/// Number of usable CUDA devices; 0 without CUDA.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch) if the driver fails.
pub fn cuda_device_count() -> Result<usize> {
    let mut count = 0;
    // SAFETY: the output pointer is valid.
    check("cuda_device_count", unsafe { ffi::ddil_cuda_device_count(&raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Switches libtorch's deterministic mode, in which an operation without a deterministic implementation is an error.
///
/// Applies to the whole process. On CUDA, `CUBLAS_WORKSPACE_CONFIG=:4096:8` must be in the environment; the error
/// mentions it. Uninitialised memory is not filled, unlike in Python.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch) if libtorch returns an error.
pub fn deterministic(on: bool) -> Result<()> {
    // SAFETY: passes a plain value.
    check("deterministic", unsafe { ffi::ddil_set_deterministic(on) })
}

/// The reason why CUDA cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NoCuda {
    /// This libtorch is built for the CPU only.
    CpuOnly,
    /// libtorch's CUDA library is installed, but this program does not load it.
    NotLoaded,
    /// NVIDIA's driver is not installed.
    NoDriver,
    /// The driver reports no device.
    NoDevice,
}

impl fmt::Display for NoCuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuOnly => {
                "this libtorch is built for the CPU only; build against one with CUDA \
                 (set LIBTORCH, or LIBTORCH_USE_PYTORCH=1 with PyTorch's CUDA wheel installed)"
            }
            Self::NotLoaded => {
                "libtorch_cuda.so is installed, but the linker dropped it from this program; \
                 link it with --no-as-needed, as described in the docs of ddil-libtorch"
            }
            Self::NoDriver => {
                "NVIDIA's driver is not installed: libcuda.so.1 cannot be loaded \
                 (in a container: start it with access to the GPU)"
            }
            Self::NoDevice => {
                "the driver reports no device; check nvidia-smi, CUDA_VISIBLE_DEVICES, \
                 and that the driver is recent enough for this libtorch"
            }
        })
    }
}

/// The reason why CUDA cannot be used, with the remedy in its text; `None` if it can.
///
/// # Example
///
/// ```
/// match ddil_libtorch::why_no_cuda() {
///     None => println!("CUDA is ready"),
///     Some(reason) => println!("no CUDA: {reason}"),
/// }
/// ```
pub fn why_no_cuda() -> Option<NoCuda> {
    // SAFETY: both take nothing, and cannot throw past the shim.
    let (library, driver) =
        unsafe { (ffi::ddil_cuda_library_installed(), ffi::ddil_cuda_driver_installed()) };
    // A driver that fails counts as one that reports no device.
    let devices = cuda_device_count().unwrap_or(0);
    diagnose(cuda_built(), library, driver, devices)
}

fn diagnose(built: bool, library: bool, driver: bool, devices: usize) -> Option<NoCuda> {
    match (built, library, driver, devices) {
        (false, false, ..) => Some(NoCuda::CpuOnly),
        (false, true, ..) => Some(NoCuda::NotLoaded),
        (true, _, _, 1..) => None,
        (true, _, false, 0) => Some(NoCuda::NoDriver),
        (true, _, true, 0) => Some(NoCuda::NoDevice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_obstacle_has_its_name() {
        assert_eq!(diagnose(false, false, true, 0), Some(NoCuda::CpuOnly));
        assert_eq!(diagnose(false, true, true, 0), Some(NoCuda::NotLoaded));
        assert_eq!(diagnose(true, true, false, 0), Some(NoCuda::NoDriver));
        assert_eq!(diagnose(true, true, true, 0), Some(NoCuda::NoDevice));
        assert_eq!(diagnose(true, true, true, 2), None);
    }
}
