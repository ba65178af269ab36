//! Training of small networks.

use std::collections::BTreeMap;
use std::path::Path;

use ddil_models::weights;
use ddil_trainer::{AdamW, AdamWConfig, Decay, Ema, EmaConfig, LrSchedule};
use tch::{Kind, Tensor};

use crate::Result;

/// How a small network is trained.
#[derive(Clone, Copy, Debug)]
pub struct Training {
    /// Number of updates.
    pub updates: u64,
    /// The initial learning rate; it decays to 0 along half a cosine.
    pub learning_rate: f64,
    /// Decay of the average used for sampling.
    pub ema_decay: f64,
}

/// Steps the optimizer of small networks and updates the average used for sampling.
#[derive(Debug)]
pub struct Trainer {
    parameters: Vec<(String, Tensor)>,
    optimizer: AdamW,
    ema: Ema,
    lr: LrSchedule,
    updates: u64,
}

/// The parts of a checkpoint.
const PARAMETER: &str = "parameter";
const OPTIMIZER: &str = "optimizer";
const AVERAGE: &str = "average";

impl Trainer {
    /// A trainer of these parameters, which are shared, not copied.
    ///
    /// # Errors
    ///
    /// Invalid settings.
    pub fn new(parameters: Vec<(String, Tensor)>, training: Training) -> Result<Self> {
        let Training { updates, learning_rate, ema_decay } = training;
        let shared = || -> Vec<(String, Tensor)> {
            parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
        };
        let config = AdamWConfig::default().with(|config| config.beta2 = 0.99);
        let optimizer = config.build(shared())?;
        let ema = EmaConfig::default().with(|config| config.decay = ema_decay).build(shared())?;
        let lr = LrSchedule::default().with(|config| {
            config.peak = learning_rate;
            config.decay = Decay::Cosine;
        });
        Ok(Self { parameters, optimizer, ema, lr, updates })
    }

    /// Number of updates done.
    pub fn num_updates(&self) -> u64 {
        self.optimizer.num_steps()
    }

    /// Performs one update; returns false, without a step, if loss or gradient are NaN or infinite.
    ///
    /// # Errors
    ///
    /// Errors of libtorch.
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

    /// Copies the average into the networks.
    ///
    /// # Errors
    ///
    /// Errors of libtorch.
    pub fn finish(self) -> Result<()> {
        Ok(self.ema.copy_to(&self.parameters)?)
    }

    /// Writes everything that [`resume`](Self::resume) needs; the file is complete or absent.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub fn save(&self, path: &Path) -> Result<()> {
        let state = self.optimizer.state_tensors()?;
        let groups: [(&str, &[(String, Tensor)]); 3] =
            [(PARAMETER, &self.parameters), (OPTIMIZER, &state), (AVERAGE, self.ema.tensors())];
        let mut tensors = Vec::new();
        for (group, of_group) in groups {
            let named = |(name, tensor): &(String, Tensor)| {
                (format!("{group}.{name}"), tensor.shallow_clone())
            };
            tensors.extend(of_group.iter().map(named));
        }
        Ok(weights::save(&tensors, path, &BTreeMap::new())?)
    }

    /// Resumes from a file of [`save`](Self::save).
    ///
    /// # Errors
    ///
    /// A file of other networks.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let mut groups: BTreeMap<String, Vec<(String, Tensor)>> = BTreeMap::new();
        for (name, tensor) in weights::read_all(path)? {
            let (group, name) = name.split_once('.').ok_or("not a checkpoint of a trainer")?;
            groups.entry(group.to_owned()).or_default().push((name.to_owned(), tensor));
        }
        let mut take = |group| groups.remove(group).unwrap_or_default();
        self.optimizer.load_state(&take(OPTIMIZER))?;
        // A loaded average is copied into the parameters in the same way as the average at the end of a run.
        self.ema.load(&take(PARAMETER), self.optimizer.num_steps())?;
        self.ema.copy_to(&self.parameters)?;
        Ok(self.ema.load(&take(AVERAGE), self.optimizer.num_steps())?)
    }
}
