//! Schedules, tensors and recorded numbers that several files need.

use std::path::PathBuf;

use ddil_schedulers::{
    BetaSchedule, EdmConfig, FinalAlphaCumprod, FlowConfig, NoiseSchedule, NoiseScheduleConfig,
    VpConfig,
};
use tch::{Kind, Tensor};

pub(crate) const BETA_SCHEDULES: [BetaSchedule; 3] =
    [BetaSchedule::Linear, BetaSchedule::ScaledLinear, BetaSchedule::SquaredcosCapV2];

/// The schedules of the recorded files: published betas, rescaled or not.
pub(crate) fn vp(
    beta_schedule: BetaSchedule,
    zero_snr: bool,
    last: FinalAlphaCumprod,
) -> NoiseSchedule {
    let (beta_start, beta_end) = match beta_schedule {
        BetaSchedule::ScaledLinear => (0.000_85, 0.012),
        BetaSchedule::Linear | BetaSchedule::SquaredcosCapV2 => (0.0001, 0.02),
    };
    let config = VpConfig {
        beta_schedule,
        beta_start,
        beta_end,
        rescale_betas_zero_snr: zero_snr,
        final_alpha_cumprod: last,
        ..VpConfig::default()
    };
    NoiseScheduleConfig::Vp(config).build().expect("published betas are valid")
}

/// Stable Diffusion's schedule.
pub(crate) fn stable_diffusion() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the defaults are valid")
}

/// One schedule of each family, and one whose last timestep has no signal.
pub(crate) fn families() -> [NoiseSchedule; 4] {
    let build = |config: NoiseScheduleConfig| config.build().expect("the defaults are valid");
    [
        stable_diffusion(),
        vp(BetaSchedule::Linear, true, FinalAlphaCumprod::One),
        build(NoiseScheduleConfig::Flow(FlowConfig::default())),
        build(NoiseScheduleConfig::Edm(EdmConfig::default())),
    ]
}

/// One number a sample of `[1]`, as `Int64`.
pub(crate) fn timesteps(list: &[i64]) -> Tensor {
    Tensor::from_slice(list)
}

/// `[batch, values]` in `Double`.
pub(crate) fn rows(batch: i64, values: &[f64]) -> Tensor {
    Tensor::from_slice(values).view([1, -1]).repeat([batch, 1])
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).contiguous().view(-1)).expect("a flat Double tensor")
}

/// The largest absolute difference.
pub(crate) fn gap(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    (left.to_kind(Kind::Double) - right.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// Fails unless each value is within `tolerance` of the expected one.
#[track_caller]
pub(crate) fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let close = |(a, b): (&f64, &f64)| (a - b).abs() <= tolerance;
    assert!(found.iter().zip(expected).all(close), "{found:?} is not {expected:?}");
}

/// A file that `tools/record/record_schedulers.py` wrote.
pub(crate) fn recorded(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/schedulers").join(file)
}

/// One tensor of a recorded file, flat.
pub(crate) fn recorded_values(file: &str, name: &str) -> Vec<f64> {
    let tensors = Tensor::read_safetensors(recorded(file)).expect("the file is checked in");
    let tensor = tensors.into_iter().find(|(found, _)| found == name).expect("it was recorded");
    values(&tensor.1)
}
