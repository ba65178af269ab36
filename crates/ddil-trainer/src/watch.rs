//! Whether everything that a network answered was finite.
//!
//! Clean data that are held inside their range hide an infinity: a teacher that overflows would then teach the edge of
//! the range, with a loss that looks well. So a network's own answers are watched, by their sum, which is finite where
//! they are: one pass over an answer beside all that it took to make it, and nothing is waited for.

use std::cell::RefCell;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::evidence::rows_not_finite;

/// The answers of a network since it was last forgotten.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    sum: RefCell<Option<Tensor>>,
    /// Filled only while somebody looks for what went wrong.
    faulty: RefCell<Option<Vec<FaultyAnswer>>>,
}

/// An answer that is not finite to a question that was.
#[derive(Debug)]
pub(crate) struct FaultyAnswer {
    /// The rows of the question, which is that of the batch, or twice that for a guided network.
    pub(crate) rows: Vec<usize>,
    /// What the network was asked, one a row of the question.
    pub(crate) timesteps: Vec<i64>,
}

impl Watch {
    /// Sees an answer.
    pub(crate) fn see(&self, x_t: &Tensor, timesteps: &Tensor, answer: &Tensor) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let add = || {
            let sum = answer.f_detach()?.f_sum(Kind::Float)?;
            match &*self.sum.borrow() {
                Some(before) => before.f_add(&sum),
                None => Ok(sum),
            }
        };
        let sum = add().map_err(Error::torch("Watch::see"))?;
        self.sum.replace(Some(sum));
        if let Some(faulty) = &mut *self.faulty.borrow_mut() {
            faulty.extend(FaultyAnswer::of(x_t, timesteps, answer)?);
        }
        Ok(())
    }

    /// The sum of all answers, a scalar on the network's device; nothing if it was not asked.
    pub(crate) fn sum(&self) -> Option<Tensor> {
        self.sum.borrow().as_ref().map(Tensor::shallow_clone)
    }

    /// Starts over.
    pub(crate) fn forget(&self) {
        self.sum.replace(None);
    }

    /// Looks at every value from now on, and waits for the device to do so.
    pub(crate) fn look_closely(&self) {
        self.faulty.replace(Some(Vec::new()));
    }

    /// What was found since, and no more of that.
    pub(crate) fn faulty(&self) -> Vec<FaultyAnswer> {
        self.faulty.take().unwrap_or_default()
    }
}

impl FaultyAnswer {
    fn of(x_t: &Tensor, timesteps: &Tensor, answer: &Tensor) -> Result<Option<Self>> {
        let asked = rows_not_finite(x_t)?;
        let rows: Vec<usize> =
            rows_not_finite(answer)?.into_iter().filter(|row| !asked.contains(row)).collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let timesteps = Vec::try_from(timesteps).map_err(Error::torch("Watch::see"))?;
        Ok(Some(Self { rows, timesteps }))
    }
}
