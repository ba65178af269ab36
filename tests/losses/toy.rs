//! Denoisers with known outputs.

use std::cell::RefCell;

use ddil_core::{Conditioning, Denoiser, RandomStreams, Source, States};
use ddil_losses::{LossRequest, LossTerms, Networks, Objective, Phase};
use ddil_schedulers::{
    EdmConfig, FlowConfig, NoiseSchedule, NoiseScheduleConfig, Prediction, TimestepSpacing,
    Timesteps,
};
use tch::{Kind, Tensor};

/// Stable Diffusion's schedule, flow matching and EDM.
pub(crate) fn schedules() -> [NoiseSchedule; 3] {
    [
        NoiseScheduleConfig::default(),
        NoiseScheduleConfig::Flow(FlowConfig::default()),
        NoiseScheduleConfig::Edm(EdmConfig::default()),
    ]
    .map(|config| config.build().expect("a family's defaults are valid"))
}

pub(crate) fn trailing(n: u32) -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, n, 0).expect("n is in 1..=1000")
}

/// States at the given entries of `grid`, in `Double`.
pub(crate) fn states(x_t: Tensor, grid: &Timesteps, grid_indices: &[usize]) -> States {
    States::new(x_t, grid, grid_indices.to_vec(), Source::Forward).expect("on the grid")
}

/// The loss of a batch for a method that draws nothing.
pub(crate) fn loss_at(
    objective: &dyn Objective,
    step: u64,
    phase: Phase,
    states: &States,
    networks: &Networks<'_>,
) -> ddil_losses::Result<LossTerms> {
    let streams = RandomStreams::new(0, 0);
    objective.loss(&LossRequest::new(step, phase, states, *networks, &streams))
}

/// The best prediction for data with one mean and standard deviation: linear in `x_t`.
#[derive(Debug)]
pub(crate) struct Gaussian {
    pub(crate) schedule: NoiseSchedule,
    pub(crate) mean: f64,
    pub(crate) std: f64,
}

impl Gaussian {
    /// `x0 = slope x_t + offset` at timestep `t`.
    pub(crate) fn line(&self, t: i64) -> (f64, f64) {
        let scale = self.schedule.scale_at(t).expect("tests stay on the grid");
        let variance = self.std.powi(2);
        let slope = scale.alpha * variance / (scale.alpha.powi(2) * variance + scale.sigma.powi(2));
        (slope, self.mean - slope * scale.alpha * self.mean)
    }
}

impl Denoiser for Gaussian {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        _: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let scales = self.schedule.scales_at(timesteps, x_t)?;
        let variance = self.std.powi(2);
        let slope =
            &scales.alpha * variance / (scales.alpha.square() * variance + scales.sigma.square());
        let x0 = &slope * (x_t - &scales.alpha * self.mean) + self.mean;
        Ok(Prediction::from_x0(&self.schedule, x0, x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

/// Predicts `factor x_t` for clean data; the factor may be trainable.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) schedule: NoiseSchedule,
    pub(crate) factor: Tensor,
}

impl Linear {
    pub(crate) fn trainable(schedule: NoiseSchedule, factor: f64) -> Self {
        Self { schedule, factor: Tensor::from(factor).set_requires_grad(true) }
    }
}

impl Denoiser for Linear {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        _: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let x0 = &self.factor * x_t;
        Ok(Prediction::from_x0(&self.schedule, x0, x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

/// Returns the sum of class label and guidance weight, whatever the sample.
#[derive(Debug)]
pub(crate) struct Echo(pub NoiseSchedule);

impl Denoiser for Echo {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let mut x0 = x_t.zeros_like();
        let names = [Conditioning::CLASS_LABELS, Conditioning::GUIDANCE_WEIGHT];
        for part in names.into_iter().filter_map(|name| conditioning.get(name)) {
            x0 += part.to_kind(Kind::Double).view([-1, 1]);
        }
        Ok(Prediction::from_x0(&self.0, x0, x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.0
    }
}

/// The values of a tensor in `Double`.
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).expect("a flat Double tensor")
}

/// The largest absolute difference.
pub(crate) fn gap(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    (left - right).abs().max().double_value(&[])
}

/// The best prediction for data that are `at` or `-at` with equal probability: a mixture of two points.
#[derive(Debug)]
pub(crate) struct TwoPoints {
    pub(crate) schedule: NoiseSchedule,
    pub(crate) at: f64,
}

impl TwoPoints {
    /// Its output for one value at timestep `t`.
    pub(crate) fn x0(&self, t: i64, x: f64) -> f64 {
        let scale = self.schedule.scale_at(t).expect("tests stay on the grid");
        self.at * (scale.alpha * self.at * x / scale.sigma.powi(2)).tanh()
    }
}

impl Denoiser for TwoPoints {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        _: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        let scales = self.schedule.scales_at(timesteps, x_t)?;
        let x0 = (scales.alpha * self.at * x_t / scales.sigma.square()).tanh() * self.at;
        Ok(Prediction::from_x0(&self.schedule, x0, x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

/// Must not be evaluated.
#[derive(Debug)]
pub(crate) struct Silent(pub NoiseSchedule);

impl Denoiser for Silent {
    fn predict(&self, _: &Tensor, _: &Tensor, _: &Conditioning) -> ddil_core::Result<Prediction> {
        let network = "the silent one".to_owned();
        Err(ddil_core::Error::ConditioningMissing { network, field: "class_labels" })
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.0
    }
}

/// Records its inputs and returns zeros.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) schedule: NoiseSchedule,
    /// Timesteps and class labels of each call.
    pub(crate) calls: RefCell<Vec<(Vec<i64>, Vec<i64>)>>,
}

impl Recorder {
    pub(crate) fn new(schedule: NoiseSchedule) -> Self {
        Self { schedule, calls: RefCell::default() }
    }

    pub(crate) fn record(&self, timesteps: &Tensor, conditioning: &Conditioning) {
        let integers = |tensor: &Tensor| Vec::try_from(tensor).expect("a vector of integers");
        let labels = conditioning.get(Conditioning::CLASS_LABELS).map(integers).unwrap_or_default();
        self.calls.borrow_mut().push((integers(timesteps), labels));
    }
}

impl Denoiser for Recorder {
    fn predict(
        &self,
        x_t: &Tensor,
        timesteps: &Tensor,
        conditioning: &Conditioning,
    ) -> ddil_core::Result<Prediction> {
        self.record(timesteps, conditioning);
        Ok(Prediction::from_x0(&self.schedule, x_t.zeros_like(), x_t, timesteps)?)
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}
