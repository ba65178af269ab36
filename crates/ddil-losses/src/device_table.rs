//! Tables computed on the host, with one cached copy per device.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Tensor};

use crate::error::{Error, Result};

/// A small constant tensor and one cached copy of it per device: a copy in every step would synchronise with the
/// device.
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
        // After a panic with the lock held, at worst one cached copy is missing.
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
