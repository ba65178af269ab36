//! Shared helpers.

use std::error::Error;

use ddil_models::Model;
use ddil_trainer::ema::{Ema, EmaConfig};
use ddil_trainer::lr_schedule::{Decay, LrSchedule};
use ddil_trainer::optimizer::{AdamW, AdamWConfig};
use tch::{Kind, Tensor};

/// What an example returns, across threads too.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How a small network is trained.
#[derive(Clone, Copy, Debug)]
pub struct Training {
    /// Number of updates.
    pub updates: u64,
    /// The first learning rate; it falls to 0 along half a cosine.
    pub learning_rate: f64,
    /// Decay of the average that is sampled with.
    pub ema_decay: f64,
}

/// Steps the optimizer of a small network and keeps the average that is sampled with.
#[derive(Debug)]
pub struct Trainer<'a> {
    model: &'a Model,
    optimizer: AdamW,
    ema: Ema,
    lr: LrSchedule,
    updates: u64,
}

impl<'a> Trainer<'a> {
    /// # Errors
    ///
    /// Settings that cannot be.
    pub fn new(model: &'a Model, training: Training) -> Result<Self> {
        let Training { updates, learning_rate, ema_decay } = training;
        let config = AdamWConfig { beta2: 0.99, ..AdamWConfig::default() };
        let optimizer = config.build(model.parameters().learned())?;
        let ema = EmaConfig { decay: ema_decay, ..EmaConfig::default() };
        let ema = ema.build(model.parameters().learned())?;
        let lr = LrSchedule { peak: learning_rate, decay: Decay::Cosine, ..LrSchedule::default() };
        Ok(Self { model, optimizer, ema, lr, updates })
    }

    /// One update; false, and nothing is done, if loss or gradient are not finite.
    ///
    /// # Errors
    ///
    /// What libtorch says.
    pub fn update(&mut self, per_sample: &Tensor) -> Result<bool> {
        self.optimizer.zero_grad()?;
        let loss = per_sample.mean(Kind::Float);
        loss.backward();
        let norm = self.optimizer.clip()?;
        if !(loss.double_value(&[]).is_finite() && norm.double_value(&[]).is_finite()) {
            return Ok(false);
        }
        self.optimizer.step(self.lr.lr_at(self.optimizer.num_steps(), self.updates))?;
        self.ema.update()?;
        Ok(true)
    }

    /// Leaves the average in the network.
    ///
    /// # Errors
    ///
    /// What libtorch says.
    pub fn finish(self) -> Result<()> {
        Ok(self.ema.copy_to(&self.model.parameters().learned())?)
    }
}

/// Mean and its standard error.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}
