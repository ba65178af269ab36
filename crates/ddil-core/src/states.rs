//! The batch that every later stage reads.

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::conditioning::Conditioning;
use crate::error::{Error, Result};

/// Clean samples of a dataset, `[batch, ..]`, with what is known of them.
#[derive(Debug)]
pub struct Data {
    /// Clean samples, data scale.
    pub x0: Tensor,
    /// Their labels, captions, ..; parts of `batch` rows.
    pub conditioning: Conditioning,
}

impl Data {
    /// Everything on `device`.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if the device is not there.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let x0 = self.x0.f_to_device(device).map_err(Error::torch("Data::to_device"))?;
        Ok(Self { x0, conditioning: self.conditioning.to_device(device)? })
    }
}

/// Where a training state comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A dataset sample, noised.
    Forward,
    /// The student's own backward trajectory.
    Student,
    /// The teacher's backward trajectory.
    Teacher,
    /// A trajectory that student and teacher took turns on.
    Mixed,
    /// Pure noise: the first state of every trajectory, whoever walks on from it.
    Noise,
}

impl Source {
    /// All of them, in the order in which they are logged.
    pub const ALL: [Self; 5] =
        [Self::Forward, Self::Student, Self::Teacher, Self::Mixed, Self::Noise];

    /// The name in configs and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Student => "student",
            Self::Teacher => "teacher",
            Self::Mixed => "mixed",
            Self::Noise => "noise",
        }
    }
}

/// A batch of training states: where each sample is, what was said of it, where it comes from.
///
/// Holds no labels: the teacher is asked at the loss, so that states stay valid when loss, guidance or teacher
/// change (the learner acts, the expert labels; [Ross et al. 2011](https://arxiv.org/abs/1011.0686)).
#[derive(Debug)]
pub struct States {
    /// Noisy samples, `[batch, ..]`, never with a graph behind them.
    pub x_t: Tensor,
    /// Their timesteps, `[batch]`, `Int64`.
    pub timesteps: Tensor,
    /// Index of each timestep in the student's grid, 0 the noisiest.
    pub grid_indices: Vec<usize>,
    /// What was said of each sample on its way here.
    pub conditioning: Conditioning,
    /// Where each sample comes from.
    pub sources: Vec<Source>,
    /// The student's step at which each state was made.
    pub births: Vec<u64>,
}

impl States {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }
}
