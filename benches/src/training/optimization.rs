//! The work of an update after the backward pass, and nothing else.

use std::hint::black_box;

use ddil_trainer::{AdamW, AdamWConfig, Ema, EmaConfig};
use tch::{Device, Kind, Tensor};

use super::Result;

const TENSORS: usize = 200;
const SHAPE: [i64; 2] = [250, 200];

/// 10 million parameters in 200 tensors, with gradients, optimizer and moving average.
pub struct Optimization {
    optimizer: AdamW,
    ema: Ema,
    params: Vec<Tensor>,
    /// Gradients above the limit of clipping, if clipping is measured.
    above: Option<Vec<Tensor>>,
}

impl Optimization {
    /// Creates random parameters; `clipped` if the norm of the gradients should be above the limit.
    ///
    /// # Errors
    ///
    /// Errors of the optimizer about the parameters.
    pub fn new(clipped: bool, device: Device) -> Result<Self> {
        let random = |_| Tensor::randn(SHAPE, (Kind::Float, device));
        let params: Vec<Tensor> =
            (0..TENSORS).map(random).map(|param| param.set_requires_grad(true)).collect();
        let named = || {
            let name = |(n, param): (usize, &Tensor)| (format!("{n:03}"), param.shallow_clone());
            params.iter().enumerate().map(name).collect::<Vec<_>>()
        };
        let optimizer = AdamWConfig::default().build(named())?;
        let ema = EmaConfig::default().build(named())?;
        let norm = (TENSORS as f64 * (SHAPE[0] * SHAPE[1]) as f64).sqrt();
        let scale = if clipped { 1.0 } else { 0.5 / norm };
        let grads: Vec<Tensor> = (0..TENSORS).map(random).map(|grad| grad * scale).collect();
        let products =
            params.iter().zip(&grads).map(|(param, grad)| (param * grad).sum(Kind::Float));
        Tensor::stack(&products.collect::<Vec<_>>(), 0).sum(Kind::Float).backward();
        Ok(Self { optimizer, ema, params, above: clipped.then_some(grads) })
    }

    /// Restores gradients above the limit, if clipping is measured.
    pub fn refill(&self) {
        for (param, grad) in self.params.iter().zip(self.above.iter().flatten()) {
            param.grad().copy_(grad);
        }
    }

    /// Clips the gradients, steps the optimizer, updates the average.
    ///
    /// # Errors
    ///
    /// Errors of the optimizer.
    pub fn update(&mut self) -> Result<()> {
        black_box(self.optimizer.clip()?.double_value(&[]));
        self.optimizer.step(1e-4)?;
        Ok(self.ema.update()?)
    }
}
