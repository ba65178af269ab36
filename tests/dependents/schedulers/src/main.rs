//! Samples a Gaussian in four DDIM steps, using only `ddil-schedulers`.

use ddil_schedulers::tch::{Kind, Tensor, kind, manual_seed, no_grad_guard};
use ddil_schedulers::{
    Ddim, Estimate, NoiseScheduleConfig, PredictionType, Report, Sampler, TimestepSpacing,
    Timesteps,
};

/// Standard deviation of the data, which have mean 0.
const STD: f64 = 0.5;

fn main() -> Result<(), Report> {
    manual_seed(0);
    let _guard = no_grad_guard();
    let schedule = NoiseScheduleConfig::default().build()?;
    let sampler = Ddim::new(schedule.clone());
    let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;

    let mut x = Tensor::randn([4096, 2], kind::FLOAT_CPU);
    // Each step of a Gaussian multiplies the samples by a number.
    let mut expected = 1.0;
    for (t, prev) in timesteps.pairs() {
        let (now, next) = (schedule.scale_at(t)?, schedule.scale_at(prev)?);
        // The output of a perfect network: the mean of the data, given `x`.
        let variance = now.alpha.powi(2) * STD.powi(2) + now.sigma.powi(2);
        let gain = now.alpha * STD.powi(2) / variance;
        let estimate = Estimate::of_output(&schedule, PredictionType::Sample, &x * gain, t)?;
        x = sampler.step_at(x, &estimate, prev, None)?;
        expected *= next.alpha * gain + next.sigma * (1.0 - now.alpha * gain) / now.sigma;
    }

    // Four steps are coarse: the samples are narrower than the data, by a known factor.
    let std = x.std(false).to_kind(Kind::Double).double_value(&[]);
    println!("standard deviation: {std:.3}, in closed form {expected:.3}, of the data {STD}");
    if (std / expected - 1.0).abs() > 0.03 {
        return Err(format!("standard deviation {std}, expected {expected}").into());
    }
    Ok(())
}
