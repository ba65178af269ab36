//! The cost of each method in addition to its networks: losses of a batch of Fashion-MNIST's size, with networks that
//! cost a few passes over memory, forward alone and with the gradient of the trained network.
//!
//! `cargo bench -p ddil-benches --bench losses`. `DDIL_BENCH_THREADS` sets the number of libtorch's threads, default
//! one: fixed, so that results are comparable.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ddil_core::{Conditioning, Data, Denoiser, Discriminator, RandomStreams, Source, States};
use ddil_losses::{
    Critic, Dmd2Config, LatentConsistencyConfig, LossRequest, Networks, ObjectiveConfig, Phase,
    ProgressiveConfig,
};
use ddil_schedulers::{NoiseSchedule, NoiseScheduleConfig, Prediction, Timesteps};
use tch::{Kind, Tensor, kind};

const SHAPE: [i64; 4] = [64, 1, 32, 32];

/// Predicts `factor x_t` for clean data.
struct Linear {
    schedule: NoiseSchedule,
    factor: Tensor,
}

impl Linear {
    fn new(schedule: &NoiseSchedule, factor: f32, trainable: bool) -> Self {
        let factor = Tensor::from(factor).set_requires_grad(trainable);
        Self { schedule: schedule.clone(), factor }
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

/// The logit is a multiple of the sample's mean.
struct MeanDiscriminator(Tensor);

impl Discriminator for MeanDiscriminator {
    fn logits(&self, x_t: &Tensor, _: &Tensor, _: &Conditioning) -> ddil_core::Result<Tensor> {
        Ok(&self.0 * x_t.flatten(1, -1).mean_dim(1, false, Kind::Float))
    }
}

/// States spread over all timesteps.
fn states(grid: &Timesteps) -> States {
    let batch = SHAPE[0] as usize;
    let grid_indices: Vec<usize> = (0..batch).map(|i| i % grid.len()).collect();
    let x_t = Tensor::randn(SHAPE, kind::FLOAT_CPU);
    States::new(x_t, grid, grid_indices, Source::Forward).expect("on the grid")
}

/// The phases of one method, each forward and with its gradient.
fn method(c: &mut Criterion, config: &ObjectiveConfig, phases: &[(&str, Phase)]) {
    let schedule = NoiseScheduleConfig::default().build().expect("the defaults are valid");
    let grid = config.training_grid(&schedule, 4).expect("4 steps fit");
    let objective = config.build(&schedule, &grid).expect("the defaults are valid");
    let states = states(&grid);
    let real = Data::new(Tensor::randn(SHAPE, kind::FLOAT_CPU));
    let streams = RandomStreams::new(0, 0);
    let mut group = c.benchmark_group(config.as_str());
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Elements(SHAPE[0] as u64));
    for &(name, phase) in phases {
        let trains = |who| phase == who;
        let student = Linear::new(&schedule, 0.5, trains(Phase::Student));
        let [teacher, target] = [0.9, 0.6].map(|f| Linear::new(&schedule, f, false));
        let fake_score = Linear::new(&schedule, 0.7, trains(Phase::Critic));
        let discriminator =
            MeanDiscriminator(Tensor::from(0.3_f32).set_requires_grad(trains(Phase::Critic)));
        let critic = Critic::new(&fake_score).with_discriminator(&discriminator);
        let networks = Networks::new(&student, &teacher).with_target(&target).with_critic(critic);
        let request = LossRequest::new(0, phase, &states, networks, &streams)
            .with_student_x0(trains(Phase::Critic).then_some(&real.x0))
            .with_real(&real);
        let loss = || objective.loss(&request).expect("the request is valid").per_sample;
        group.bench_function(name, |b| b.iter(|| black_box(loss())));
        group.bench_function(format!("{name} with gradient"), |b| {
            b.iter(|| loss().mean(Kind::Float).backward());
        });
    }
    group.finish();
}

fn progressive(c: &mut Criterion) {
    let config = ObjectiveConfig::Progressive(ProgressiveConfig::default());
    method(c, &config, &[("student", Phase::Student)]);
}

fn lcm(c: &mut Criterion) {
    let config = ObjectiveConfig::Lcm(LatentConsistencyConfig::default());
    method(c, &config, &[("student", Phase::Student)]);
}

fn dmd2(c: &mut Criterion) {
    let config = ObjectiveConfig::Dmd2(Dmd2Config::default());
    method(c, &config, &[("student", Phase::Student), ("critic", Phase::Critic)]);
}

/// The lower bound for a loss of one network, with its gradient.
fn reference(c: &mut Criterion) {
    let mut group = c.benchmark_group("reference");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Elements(SHAPE[0] as u64));
    let [x, target] = [0; 2].map(|_| Tensor::randn(SHAPE, kind::FLOAT_CPU));
    let factor = Tensor::from(0.5_f32).set_requires_grad(true);
    group.bench_function("squared error with gradient", |b| {
        b.iter(|| (&factor * &x - &target).square().mean(Kind::Float).backward());
    });
    group.finish();
}

/// Fixes the number of threads, and keeps freed memory like the programs of this project.
fn prepared() -> Criterion {
    let threads = std::env::var("DDIL_BENCH_THREADS").ok().and_then(|n| n.parse().ok());
    tch::set_num_threads(threads.unwrap_or(1));
    tch::manual_seed(0);
    ddil_libtorch::keep_freed_pages();
    ddil_benches::register_fonts();
    Criterion::default()
}

criterion_group! { name = benches; config = prepared(); targets = reference, progressive, lcm, dmd2 }
criterion_main!(benches);
