//! Training states from a custom source: forward states with too much noise.
//!
//! A student is never sampled at exactly the states it was trained on. Input perturbation ([Ning et al.
//! 2023](https://arxiv.org/abs/2301.11706)) prepares it for that without any rollout: each training state has slightly
//! more noise than its timestep. Here that is a [`TrajectorySource`] of ten lines, which is added to a [`Mixer`] under
//! a name and with a share.
//!
//! Run with `cargo run --release --example custom_source`.

use ddil_core::{
    Clock, Data, GaussianMixture, MixBatch, Mixer, MixerConfig, RandomStreams, Report,
    RolloutNetworks, Source, SourceRequest, States, Stream, TrajectorySource,
};
use ddil_losses::{LossRequest, Networks, Objective, Phase, Progressive, ProgressiveConfig};
use ddil_models::{MlpConfig, ModelConfig, NetworkDenoiser, Placement};
use ddil_schedulers::{
    Ddim, NoiseScheduleConfig, PredictionType, Scales, TimestepSpacing, Timesteps,
};
use tch::{COptimizer, Device, Kind, Tensor};

const BATCH_SIZE: i64 = 256;
const UPDATES: u64 = 50;

/// Dataset samples under noise of variance `1 + strength²`.
#[derive(Debug)]
struct Perturbed {
    strength: f64,
}

impl TrajectorySource for Perturbed {
    fn states(&mut self, request: &SourceRequest<'_>) -> ddil_core::Result<States> {
        let x0 = &request.data.x0;
        // All randomness comes from the request's streams, so that a resumed run draws the same numbers. The mixer
        // has drawn from `Noise` already; `Refresh` is free here.
        let mut generator =
            request.streams.generator(request.step, Stream::Refresh, x0.device())?;
        let extra = generator.normal(x0.size(), x0.kind())?;
        let noise = request.noise + extra * self.strength;

        let timesteps = Tensor::from_slice(&request.timesteps()).to_device(x0.device());
        let x_t = request.sampler.schedule().add_noise(x0, &noise, &timesteps)?;
        Ok(request.states(x_t, request.data.conditioning.shallow_clone(), Source::Forward))
    }
}

fn main() -> Result<(), Report> {
    tch::set_num_threads(1);
    let schedule = NoiseScheduleConfig::default().build()?;
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
    let teacher = GaussianMixture::ring(8)?.on(schedule.clone());
    let model = ModelConfig::Mlp(MlpConfig::default()).build(Placement::default(), 0)?;
    let student = NetworkDenoiser::new(model, PredictionType::Sample, schedule.clone())?;
    let objective = Progressive::new(ProgressiveConfig::default(), schedule.clone(), grid.clone())?;
    let mut optimizer = COptimizer::adamw(2e-3, 0.9, 0.999, 1e-2, 1e-8, false)?;
    for (_name, parameter) in student.parameters().learned() {
        optimizer.add_parameters(&parameter, 0)?;
    }

    let config = MixerConfig::forward_only();
    let mut mixer = Mixer::new(config, grid, Box::new(Ddim::new(schedule.clone())))?.with_source(
        "perturbed",
        1.0,
        Box::new(Perturbed { strength: 0.5 }),
    )?;

    let streams = RandomStreams::new(0, 0);
    let (mut losses, mut variance) = (Vec::new(), 0.0);
    for step in 0..UPDATES {
        let mut generator = streams.generator(step, Stream::Data, Device::Cpu)?;
        let x0 = teacher.mixture().sample(BATCH_SIZE, None, &mut generator)?;
        let data = Data::new(x0);
        let clock = Clock::new(step, UPDATES, streams);
        let actors = RolloutNetworks::new(&student, &teacher);
        let states = mixer.next_states(&clock, &MixBatch::new(&data), &actors)?;

        let networks = Networks::new(&student, &teacher);
        let request = LossRequest::new(step, Phase::Student, &states, networks, &streams);
        let terms = objective.loss(&request)?;
        let loss = terms.per_sample.mean(Kind::Float);
        optimizer.zero_grad()?;
        loss.backward();
        optimizer.step()?;
        losses.push(loss.double_value(&[]));

        // The mixer returns a state for each sample in the order of the data, so the noise can be computed from it.
        let Scales { alpha, sigma } = schedule.scales_at(&states.timesteps, &data.x0)?;
        let noise = (&states.x_t - alpha * &data.x0) / sigma;
        variance += noise.square().mean(Kind::Double).double_value(&[]) / UPDATES as f64;
    }

    println!("variance of the noise: {variance:.3}, where plain forward states have 1");
    assert!((variance - 1.25).abs() < 0.02, "expected 1 + 0.5²");
    let [first, last] = [&losses[..10], &losses[40..]].map(|l| l.iter().sum::<f64>() / 10.0);
    println!("mean loss of the first and the last ten updates: {first:.4}, {last:.4}");
    assert!(last < 0.5 * first, "the student learns from these states");
    Ok(())
}
