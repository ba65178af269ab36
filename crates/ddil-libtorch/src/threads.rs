#![allow(unsafe_code, reason = "calls C++")]

use crate::ffi::{self, check};
use crate::{Error, Result};

/// The number of threads of a single libtorch operation, as seen from this thread.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch returns an error.
pub fn num_threads() -> Result<usize> {
    let mut n = 0;
    // SAFETY: the output pointer is valid.
    check("num_threads", unsafe { ffi::ddil_num_threads(&raw mut n) })?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// Sets the number of threads of a single libtorch operation.
///
/// Applies to this thread and to threads that have not computed yet: call it first thing in `main`. Results are
/// reproducible to the bit for one number of threads, and may differ between numbers.
///
/// # Errors
///
/// [`Error::Argument`] for 0 or more than an `i32` holds.
pub fn set_num_threads(n: usize) -> Result<()> {
    let count = thread_count("set_num_threads", n)?;
    // SAFETY: passes a plain value.
    check("set_num_threads", unsafe { ffi::ddil_set_num_threads(count) })
}

/// The number of libtorch operations that may run in parallel.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch returns an error.
pub fn num_interop_threads() -> Result<usize> {
    let mut n = 0;
    // SAFETY: the output pointer is valid.
    check("num_interop_threads", unsafe { ffi::ddil_num_interop_threads(&raw mut n) })?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// Sets the number of libtorch operations that may run in parallel; possible once, before any parallel work.
///
/// # Errors
///
/// [`Error::Argument`] for 0 or more than an `i32` holds, [`Error::Torch`] the second time.
pub fn set_num_interop_threads(n: usize) -> Result<()> {
    let count = thread_count("set_num_interop_threads", n)?;
    // SAFETY: passes a plain value.
    check("set_num_interop_threads", unsafe { ffi::ddil_set_num_interop_threads(count) })
}

fn thread_count(op: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n)
        .ok()
        .filter(|&n| n > 0)
        .ok_or_else(|| Error::value(op, "n", n, "1 or more, within an i32"))
}
