//! Sums that stay on the device until they are read.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// A sum and a count at each of a fixed number of places, updated without waiting for the device.
///
/// In `Double`, in which sums of single-precision values are exact if they are of similar size: the order in which a
/// device adds them then does not matter.
#[derive(Debug)]
pub(crate) struct Tally {
    len: usize,
    /// `[2, len]`: sums, then counts. Allocated on the device of the first values.
    sums: Option<Tensor>,
}

impl Tally {
    pub(crate) fn new(len: usize) -> Self {
        Self { len, sums: None }
    }

    /// Extends it to `len` places, if there are fewer.
    pub(crate) fn grow(&mut self, op: &'static str, len: usize) -> Result<()> {
        if len <= self.len {
            return Ok(());
        }
        if let Some(sums) = &mut self.sums {
            let more = zeros(len - self.len, sums.device());
            *sums = Tensor::f_cat(&[&*sums, &more], 1).map_err(Error::torch(op))?;
        }
        self.len = len;
        Ok(())
    }

    /// Adds `values` (`[n]`) at `places` (`[n]`, `Int64`, below the length).
    pub(crate) fn add(&mut self, op: &'static str, places: &Tensor, values: &Tensor) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let device = self.sums.as_ref().map_or(values.device(), Tensor::device);
        let values = values.detach().to_device(device).to_kind(Kind::Double);
        let values = Tensor::f_stack(&[&values, &values.ones_like()], 0);
        let values = values.map_err(Error::torch(op))?;
        let places = places.to_device(device);
        let sums = self.sums.get_or_insert_with(|| zeros(self.len, device));
        let _ = sums.f_index_add_(1, &places, &values).map_err(Error::torch(op))?;
        Ok(())
    }

    /// Sum and count at each place, then resets. Waits for the device.
    pub(crate) fn take(&mut self, op: &'static str) -> Result<Vec<(f64, f64)>> {
        let Some(sums) = self.sums.take() else { return Ok(vec![(0.0, 0.0); self.len]) };
        let flat: Vec<f64> =
            Vec::try_from(&sums.to_device(Device::Cpu).flatten(0, -1)).map_err(Error::torch(op))?;
        let (sums, counts) = flat.split_at(self.len);
        Ok(sums.iter().copied().zip(counts.iter().copied()).collect())
    }

    /// A copy of the sums; none if nothing was added.
    pub(crate) fn tensor(&self) -> Option<Tensor> {
        Some(self.sums.as_ref()?.copy())
    }

    /// Restores what [`tensor`](Self::tensor) returned.
    pub(crate) fn restore(&mut self, what: &'static str, sums: Option<&Tensor>) -> Result<()> {
        let expected = [2, self.len as i64];
        if let Some(sums) = sums.filter(|s| s.size() != expected || s.kind() != Kind::Double) {
            let (shape, kind) = (sums.size(), sums.kind());
            let problem =
                format!("sums are {shape:?} of {kind:?}; expected {expected:?} of Double");
            return Err(Error::Restore { what, problem });
        }
        self.sums = sums.map(Tensor::copy);
        Ok(())
    }
}

fn zeros(len: usize, device: Device) -> Tensor {
    Tensor::zeros([2, len as i64], (Kind::Double, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_sums_are_the_added_ones() -> Result<()> {
        let mut tally = Tally::new(3);
        assert_eq!(tally.take("test")?, [(0.0, 0.0); 3]);
        let places = Tensor::from_slice(&[2_i64, 0, 2]);
        tally.add("test", &places, &Tensor::from_slice(&[1_f32, 5.0, 3.0]))?;
        tally.add("test", &places, &Tensor::from_slice(&[0_f32, 1.0, 0.0]))?;
        let mut copy = Tally::new(3);
        copy.restore("test", tally.tensor().as_ref())?;
        for tally in [&mut tally, &mut copy] {
            assert_eq!(tally.take("test")?, [(6.0, 2.0), (0.0, 0.0), (4.0, 4.0)]);
            assert_eq!(tally.take("test")?, [(0.0, 0.0); 3]);
        }
        Ok(())
    }

    #[test]
    fn refuses_mismatches() -> Result<()> {
        let mut tally = Tally::new(3);
        let one = Tensor::from_slice(&[1_f32]);
        let beyond = tally.add("test", &Tensor::from_slice(&[3_i64]), &one);
        assert!(matches!(beyond, Err(Error::Torch { .. })));
        let mut other = Tally::new(4);
        other.add("test", &Tensor::from_slice(&[3_i64]), &one)?;
        let restored = tally.restore("test", other.tensor().as_ref());
        assert!(matches!(restored, Err(Error::Restore { what: "test", .. })));
        Ok(())
    }
}
