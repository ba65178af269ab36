#![allow(unsafe_code, reason = "calls C++")]

use crate::ffi::{self, check};
use crate::{Error, Result};

/// How many threads one operation of libtorch may use, as seen from this thread.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch cannot say.
pub fn num_threads() -> Result<usize> {
    let mut n = 0;
    // SAFETY: the place that C++ writes to is valid.
    check("num_threads", unsafe { ffi::ddil_num_threads(&raw mut n) })?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// Sets how many threads one operation of libtorch may use.
///
/// Holds for this thread and for threads that have not computed yet: call it first thing in `main`. One number of
/// threads gives one result to the bit, another number another.
///
/// # Errors
///
/// [`Error::Argument`] for 0 or more than an `i32` holds.
pub fn set_num_threads(n: usize) -> Result<()> {
    let count = thread_count("set_num_threads", n)?;
    // SAFETY: passes a plain value.
    check("set_num_threads", unsafe { ffi::ddil_set_num_threads(count) })
}

/// How many operations libtorch may run side by side.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch cannot say.
pub fn num_interop_threads() -> Result<usize> {
    let mut n = 0;
    // SAFETY: the place that C++ writes to is valid.
    check("num_interop_threads", unsafe { ffi::ddil_num_interop_threads(&raw mut n) })?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// Sets how many operations libtorch may run side by side; possible once, before there is any such work.
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
