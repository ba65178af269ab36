//! A network whose output is known in closed form.

use std::cell::Cell;

use ddil_core::{Conditioning, Denoiser, Error, Result};
use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Prediction, TimestepSpacing, Timesteps};
use tch::{Kind, Tensor, kind};

/// The exact denoiser of data `N(mean, std²)`, with a separate mean for each class label.
///
/// `E[x0 | x_t] = mean + alpha std² / (alpha² std² + sigma²) (x_t - alpha mean)`.
pub(crate) struct Gaussian {
    pub(crate) schedule: NoiseSchedule,
    /// Mean of class `c` is `center + c · per_class`.
    pub(crate) center: f64,
    pub(crate) per_class: f64,
    pub(crate) std: f64,
    /// Number of samples evaluated.
    pub(crate) num_evaluated: Cell<u64>,
}

impl Gaussian {
    pub(crate) fn new(center: f64, per_class: f64, std: f64) -> Self {
        Self { schedule: schedule(), center, per_class, std, num_evaluated: Cell::new(0) }
    }

    fn mean(&self, x_t: &Tensor, conditioning: &Conditioning) -> Result<Tensor> {
        let Some(labels) = conditioning.get(Conditioning::CLASS_LABELS) else {
            let network = "Gaussian".to_owned();
            return Err(Error::ConditioningMissing { network, field: Conditioning::CLASS_LABELS });
        };
        let mut shape = vec![1; x_t.dim()];
        shape[0] = -1;
        let mean = labels.to_kind(x_t.kind()) * self.per_class + self.center;
        Ok(mean.view(shape.as_slice()))
    }
}

impl Denoiser for Gaussian {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<Prediction> {
        self.num_evaluated.set(self.num_evaluated.get() + x_t.size()[0] as u64);
        let mean = self.mean(x_t, conditioning)?;
        let scales = self.schedule.scales_at(timesteps, x_t)?;
        let variance = self.std * self.std;
        let gain =
            &scales.alpha * variance / (scales.alpha.square() * variance + scales.sigma.square());
        let x0 = &mean + gain * (x_t - scales.alpha * &mean);
        Ok(Prediction::from_x0(&self.schedule, x0, x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

pub(crate) fn schedule() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the default is valid")
}

/// `[999, 749, 499, 249]` for 4.
pub(crate) fn trailing(n: u32) -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, n, 0).expect("n is in range")
}

pub(crate) fn labels(n: usize) -> Conditioning {
    Conditioning::class_labels(Tensor::arange(n as i64, kind::INT64_CPU))
}

/// Unit noise from a seed, apart from libtorch's own generator, which other tests draw from too.
pub(crate) fn normal(seed: u64, shape: &[i64]) -> Tensor {
    ddil_core::Generator::new(tch::Device::Cpu, seed)
        .and_then(|mut generator| generator.normal(shape, Kind::Float))
        .expect("the CPU is there")
}

pub(crate) fn max_abs_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

/// One shape a kind of data: vectors, audio, images, video.
pub(crate) const SHAPES: [&[i64]; 4] = [&[3, 5], &[3, 2, 7], &[3, 2, 4, 4], &[3, 2, 3, 4, 4]];
