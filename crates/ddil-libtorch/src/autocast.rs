#![allow(unsafe_code, reason = "calls C++")]

use std::marker::PhantomData;

use tch::{Device, Kind};

use crate::ffi::{self, check, kind_number};
use crate::{Error, Result};

/// A guard for mixed precision: matrix products and convolutions run in a 16-bit kind, operations that need more
/// range stay in their kind.
///
/// Also works on the CPU, where `tch::autocast` has no effect. Applies to one kind of device and to this thread only,
/// so it cannot be sent to another thread. Guards nest and must be dropped in the reverse order of their creation, as
/// scopes do; each restores the previous state. Dropping the last one clears the cache of converted weights.
///
/// Wrap the forward pass and the loss; call `backward` outside. `Half` needs its loss scaled, `BFloat16` does not.
///
/// # Example
///
/// ```
/// use ddil_libtorch::Autocast;
/// use tch::{Device, Kind, Tensor, kind::FLOAT_CPU};
///
/// let x = Tensor::ones([2, 2], FLOAT_CPU);
/// {
///     let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16)?;
///     assert_eq!(x.matmul(&x).kind(), Kind::BFloat16);
/// }
/// assert_eq!(x.matmul(&x).kind(), Kind::Float);
/// # Ok::<(), ddil_libtorch::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "autocast ends where the guard is dropped"]
pub struct Autocast {
    cuda: bool,
    was_enabled: bool,
    previous_kind: i32,
    not_send: PhantomData<*const ()>,
}

impl Autocast {
    /// Turns autocast on for `device`.
    ///
    /// # Errors
    ///
    /// [`Error::UnsupportedKind`] unless `kind` is `BFloat16` or `Half`, [`Error::UnsupportedDevice`] beyond CPU and
    /// CUDA, [`Error::Torch`] for CUDA where libtorch has none.
    pub fn new(device: Device, kind: Kind) -> Result<Self> {
        if !matches!(kind, Kind::BFloat16 | Kind::Half) {
            let expected = "BFloat16 or Half";
            return Err(Error::UnsupportedKind { op: "Autocast::new", kind, expected });
        }
        Self::push("Autocast::new", device, true, kind_number(kind))
    }

    /// Turns autocast off, for a part that needs full precision within an autocast region.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn disabled(device: Device) -> Result<Self> {
        Self::push("Autocast::disabled", device, false, 0)
    }

    fn push(op: &'static str, device: Device, enable: bool, kind: i32) -> Result<Self> {
        let cuda = ffi::device_index(op, device)? >= 0;
        let (mut was_enabled, mut previous_kind) = (false, 0);
        // SAFETY: both output pointers are valid.
        let code = unsafe {
            ffi::ddil_autocast_push(
                cuda,
                enable,
                kind,
                &raw mut was_enabled,
                &raw mut previous_kind,
            )
        };
        check(op, code)?;
        Ok(Self { cuda, was_enabled, previous_kind, not_send: PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: passes plain values. It restores what `push` read on this thread, which does not fail.
        unsafe { ffi::ddil_autocast_pop(self.cuda, self.was_enabled, self.previous_kind) };
    }
}
