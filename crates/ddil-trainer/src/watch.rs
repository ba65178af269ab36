//! Detects network outputs that are not finite.
//!
//! Thresholding hides an infinity: an overflow in the teacher would become the edge of the range, with a loss that
//! looks plausible. Therefore the networks' own outputs are checked by their sum, which is finite if they are. This
//! costs one pass over each output, little compared with its computation, and does not wait for the device.

use std::cell::RefCell;
use std::rc::Rc;

use ddil_models::{BoxedError, NetworkDenoiser, OutputObserver};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// The watches of a run's networks, by name.
#[derive(Debug, Default)]
pub(crate) struct Watches(Vec<(&'static str, Rc<Watch>)>);

/// The outputs of a network since the last reset.
#[derive(Debug, Default)]
struct Watch {
    sum: RefCell<Option<Tensor>>,
    /// None unless single values are inspected.
    faulty: RefCell<Option<Vec<FaultyOutput>>>,
}

/// The outputs of a network since the last reset.
#[derive(Debug)]
pub(crate) struct Outputs {
    pub(crate) network: &'static str,
    /// Of all outputs; none if there was no output.
    pub(crate) sum: Option<Tensor>,
    /// Of the outputs since single values were inspected.
    pub(crate) faulty: Vec<FaultyOutput>,
}

/// An output with NaN or infinite values for a finite input.
#[derive(Debug)]
pub(crate) struct FaultyOutput {
    /// The affected rows of the input, which is the batch, or twice the batch for a guided network.
    pub(crate) rows: Vec<usize>,
    /// The timestep of each row of the input.
    pub(crate) timesteps: Vec<i64>,
}

impl Watches {
    /// The network with a watch attached.
    pub(crate) fn on(&mut self, name: &'static str, network: NetworkDenoiser) -> NetworkDenoiser {
        let watch = Rc::new(Watch::default());
        self.0.push((name, Rc::clone(&watch)));
        network.with_observer(watch)
    }

    /// The sum of all outputs, a scalar on the networks' device; none if there was no output.
    pub(crate) fn sum(&self) -> Result<Option<Tensor>> {
        let sums: Vec<Tensor> = self.0.iter().filter_map(|(_, watch)| watch.sum()).collect();
        if sums.is_empty() {
            return Ok(None);
        }
        let sum = Tensor::f_stack(&sums, 0).and_then(|sums| sums.f_sum(Kind::Float));
        sum.map(Some).map_err(Error::torch("Watches::sum"))
    }

    /// Forgets all outputs.
    pub(crate) fn reset(&self) {
        for (_, watch) in &self.0 {
            watch.sum.replace(None);
        }
    }

    /// Inspects single values from now on, which waits for the device at every output.
    pub(crate) fn inspect_values(&self) {
        for (_, watch) in &self.0 {
            watch.faulty.replace(Some(Vec::new()));
        }
    }

    /// The outputs of each network; ends the inspection of single values.
    pub(crate) fn take(&self) -> Vec<Outputs> {
        let outputs = |(network, watch): &(&'static str, Rc<Watch>)| Outputs {
            network,
            sum: watch.sum(),
            faulty: watch.faulty.take().unwrap_or_default(),
        };
        self.0.iter().map(outputs).collect()
    }
}

impl Watch {
    fn sum(&self) -> Option<Tensor> {
        self.sum.borrow().as_ref().map(Tensor::shallow_clone)
    }
}

impl OutputObserver for Watch {
    fn observe(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        output: &Tensor,
    ) -> std::result::Result<(), BoxedError> {
        let _no_grad = tch::no_grad_guard();
        let add = || {
            let sum = output.f_detach()?.f_sum(Kind::Float)?;
            match &*self.sum.borrow() {
                Some(before) => before.f_add(&sum),
                None => Ok(sum),
            }
        };
        let sum = add().map_err(Error::torch("Watch::observe"))?;
        self.sum.replace(Some(sum));
        if let Some(faulty) = &mut *self.faulty.borrow_mut() {
            faulty.extend(FaultyOutput::of(x_t, timesteps, output)?);
        }
        Ok(())
    }
}

impl FaultyOutput {
    fn of(x_t: &Tensor, timesteps: &Tensor, output: &Tensor) -> Result<Option<Self>> {
        let of_input = rows_not_finite(x_t)?;
        let rows: Vec<usize> =
            rows_not_finite(output)?.into_iter().filter(|row| !of_input.contains(row)).collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let timesteps = Vec::try_from(timesteps).map_err(Error::torch("Watch::observe"))?;
        Ok(Some(Self { rows, timesteps }))
    }
}

/// The rows with values that are not finite. Waits for the device.
pub(crate) fn rows_not_finite(tensor: &Tensor) -> Result<Vec<usize>> {
    if tensor.numel() == 0 || !is_float(tensor) {
        return Ok(Vec::new());
    }
    let rows = tensor.size().first().copied().unwrap_or(1);
    let finite = || {
        let by_row = tensor.f_detach()?.f_isfinite()?.f_reshape([rows, -1])?;
        Vec::<bool>::try_from(by_row.f_all_dim(1, false)?)
    };
    let finite = finite().map_err(Error::torch("rows_not_finite"))?;
    Ok(finite.iter().enumerate().filter(|(_, finite)| !**finite).map(|(row, _)| row).collect())
}

/// Other kinds have no values that are not finite.
pub(crate) fn is_float(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}
