//! Host-made tables, kept on each device that asks for them.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Tensor};

use crate::error::{Error, Result};

/// A small constant tensor and its copies on other devices, made once each: a copy in every step would wait for
/// the device.
#[derive(Debug)]
pub(crate) struct DeviceTable {
    copies: Mutex<Vec<Tensor>>,
}

impl DeviceTable {
    pub(crate) fn new(host: Tensor) -> Self {
        Self { copies: Mutex::new(vec![host]) }
    }

    /// The table on `device`.
    pub(crate) fn on(&self, device: Device) -> Result<Tensor> {
        // A panic while the lock is held leaves at worst one copy less.
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(copy) = copies.iter().find(|copy| copy.device() == device) {
            return Ok(copy.shallow_clone());
        }
        let copy =
            copies[0].f_to_device(device).map_err(Error::torch("copying a table to the device"))?;
        copies.push(copy.shallow_clone());
        Ok(copy)
    }
}
