#![allow(unsafe_code, reason = "calls C++")]

use std::marker::PhantomData;

use tch::{Device, Kind};

use crate::ffi::{self, check, kind_number};
use crate::{Error, Result};

/// Mixed precision for as long as it lives: matrix products and convolutions run in a 16-bit kind, what needs more
/// range stays as it is.
///
/// Works on the CPU too, where `tch::autocast` does nothing. Holds for one kind of device and for this thread only,
/// so it cannot be sent to another. Guards nest, and must be dropped in the reverse order of their making, as scopes
/// do; each puts back what it found. When the last one goes, the cache of converted weights goes with it.
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
    /// Turns autocast on.
    ///
    /// # Errors
    ///
    /// [`Error::UnsupportedKind`] unless `kind` is `BFloat16` or `Half`, [`Error::UnsupportedDevice`] beyond CPU and
    /// CUDA, [`Error::Torch`] for CUDA where libtorch has none.
    pub fn new(device: Device, kind: Kind) -> Result<Self> {
        if !matches!(kind, Kind::BFloat16 | Kind::Half) {
            let expected = "BFloat16 and Half";
            return Err(Error::UnsupportedKind { op: "Autocast::new", kind, expected });
        }
        Self::push("Autocast::new", device, true, kind_number(kind))
    }

    /// Turns autocast off, for a part that needs full precision inside one that does not.
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
        // SAFETY: the two places that C++ writes to are valid.
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
        // SAFETY: passes plain values. It gives back what `push` read on this thread, and does not fail for that.
        unsafe { ffi::ddil_autocast_pop(self.cuda, self.was_enabled, self.previous_kind) };
    }
}
