//! Sampler steps: DDIM and LCM by the general path and by plan, in new memory and in place, thresholding and noise.
//!
//! `cargo bench -p ddil-benches --bench schedulers`. `DDIL_BENCH_THREADS` sets the number of libtorch's threads,
//! otherwise one: fixed, so that numbers can be compared. `benches/peers/compare_steps.py` sets them against diffusers'.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use ddil_libtorch::Generator;
use ddil_schedulers::{
    DataRange, Ddim, Lcm, NoiseSchedule, NoiseScheduleConfig, Plan, PredictionType, Sampler,
    SamplerStep, Thresholding, TimestepSpacing, Timesteps,
};
use tch::{Device, Kind, Tensor, kind};

const SHAPES: [[i64; 4]; 2] = [[4, 4, 64, 64], [16, 4, 128, 128]];

/// What every step starts from: a batch at 749 on its way to 499.
struct Inputs {
    x_t: Tensor,
    model_output: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prev_timesteps: Tensor,
}

impl Inputs {
    fn new(shape: [i64; 4]) -> Self {
        tch::manual_seed(0);
        let [x_t, model_output, noise] = [0; 3].map(|_| Tensor::randn(shape, kind::FLOAT_CPU));
        let [timesteps, prev_timesteps] =
            [749, 499].map(|t| Tensor::full([shape[0]], t, kind::INT64_CPU));
        Self { x_t, model_output, noise, timesteps, prev_timesteps }
    }

    /// Convert, threshold, step: each sample may stand elsewhere.
    fn general(&self, sampler: &dyn Sampler, thresholding: &Thresholding) -> Tensor {
        let schedule = sampler.schedule();
        PredictionType::Epsilon
            .convert(schedule, &self.model_output, &self.x_t, &self.timesteps)
            .and_then(|raw| raw.thresholded(thresholding, schedule, &self.x_t, &self.timesteps))
            .and_then(|said| {
                let step = SamplerStep::new(&said, &self.timesteps, &self.prev_timesteps);
                sampler.step(&step.with_noise(&self.noise))
            })
            .expect("the inputs fit")
    }
}

fn grid() -> Timesteps {
    Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("4 steps fit")
}

fn schedule() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the defaults are valid")
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

/// One sampler's step, three ways, at both shapes.
fn steps(
    c: &mut Criterion,
    name: &str,
    sampler: &dyn Sampler,
    plan: &Plan,
    thresholding: &Thresholding,
) {
    let mut group = group(c, name);
    for shape in SHAPES {
        let inputs = Inputs::new(shape);
        let label = shape.map(|n| n.to_string()).join("x");
        group.throughput(Throughput::Elements(inputs.x_t.numel() as u64));
        group.bench_function(BenchmarkId::new("general", &label), |b| {
            b.iter(|| black_box(inputs.general(sampler, thresholding)));
        });
        let (output, noise) = (&inputs.model_output, Some(&inputs.noise));
        group.bench_function(BenchmarkId::new("plan", &label), |b| {
            b.iter(|| black_box(plan.step(1, &inputs.x_t, output, noise).expect("they fit")));
        });
        let mut x_t = inputs.x_t.copy();
        group.bench_function(BenchmarkId::new("plan in place", &label), |b| {
            b.iter(|| plan.step_inplace(1, black_box(&mut x_t), output, noise).expect("they fit"));
        });
    }
    group.finish();
}

fn ddim(c: &mut Criterion) {
    for (name, thresholding) in
        [("ddim", Thresholding::None), ("ddim clamped", Thresholding::clamp_pixels())]
    {
        let sampler = Ddim::new(schedule());
        let plan = sampler.plan(&grid(), PredictionType::Epsilon, &thresholding);
        steps(c, name, &sampler, &plan.expect("valid settings"), &thresholding);
    }
    let sampler = Ddim::with_eta(schedule(), 1.0).expect("1 is allowed");
    let plan = sampler.plan(&grid(), PredictionType::Epsilon, &Thresholding::None);
    steps(c, "ddim eta 1", &sampler, &plan.expect("valid settings"), &Thresholding::None);
}

fn lcm(c: &mut Criterion) {
    let sampler = Lcm::new(schedule());
    let plan = sampler.plan(&grid(), PredictionType::Epsilon, &Thresholding::None, None);
    steps(c, "lcm", &sampler, &plan.expect("valid settings"), &Thresholding::None);
}

fn thresholding(c: &mut Criterion) {
    let kinds = [
        ("clamp", Thresholding::clamp_pixels()),
        (
            "clamp per channel",
            Thresholding::Clamp(DataRange::per_channel(vec![-1.0; 4], vec![1.0; 4])),
        ),
        ("dynamic", Thresholding::Dynamic { ratio: 0.995, max_value: 2.0 }),
        ("reflect", Thresholding::Reflect(DataRange::default())),
    ];
    let mut group = group(c, "thresholding");
    for shape in SHAPES {
        let x0 = Inputs::new(shape).x_t;
        group.throughput(Throughput::Elements(x0.numel() as u64));
        for (name, thresholding) in &kinds {
            let id = BenchmarkId::new(*name, shape.map(|n| n.to_string()).join("x"));
            group.bench_function(id, |b| {
                b.iter(|| black_box(thresholding.apply(&x0).expect("valid settings")));
            });
        }
    }
    group.finish();
}

/// Noise as rollouts draw it, in new memory and in place, and as libtorch draws it.
fn noise(c: &mut Criterion) {
    let mut group = group(c, "noise");
    let mut generator = Generator::new(Device::Cpu, 0).expect("there is a CPU");
    for shape in SHAPES {
        let mut noise = Tensor::zeros(shape, kind::FLOAT_CPU);
        let label = shape.map(|n| n.to_string()).join("x");
        group.throughput(Throughput::Elements(noise.numel() as u64));
        group.bench_function(BenchmarkId::new("normal", &label), |b| {
            b.iter(|| generator.normal(shape, Kind::Float).expect("there is memory"));
        });
        group.bench_function(BenchmarkId::new("fill_normal", &label), |b| {
            b.iter(|| generator.fill_normal(&mut noise).expect("it is plain memory"));
        });
        group.bench_function(BenchmarkId::new("randn", &label), |b| {
            b.iter(|| Tensor::randn(shape, kind::FLOAT_CPU));
        });
    }
    group.finish();
}

/// What the others are measured by: a copy of as many bytes as a step in place reads and writes, and the formula of a
/// step, written down.
fn reference(c: &mut Criterion) {
    let mut group = group(c, "reference");
    for shape in SHAPES {
        let Inputs { x_t, model_output, .. } = Inputs::new(shape);
        let label = shape.map(|n| n.to_string()).join("x");
        group.throughput(Throughput::Elements(x_t.numel() as u64));
        let from = Tensor::randn([shape[0] * 3 / 2, shape[1], shape[2], shape[3]], kind::FLOAT_CPU);
        let mut to = from.zeros_like();
        group.bench_function(BenchmarkId::new("copy_", &label), |b| b.iter(|| to.copy_(&from)));
        group.bench_function(BenchmarkId::new("formula", &label), |b| {
            b.iter(|| black_box(&x_t * 0.9 + &model_output * 0.1));
        });
    }
    group.finish();
}

/// Threads fixed, freed memory kept as the programs of this project keep it.
fn prepared() -> Criterion {
    let threads = std::env::var("DDIL_BENCH_THREADS").ok().and_then(|n| n.parse().ok());
    tch::set_num_threads(threads.unwrap_or(1));
    ddil_libtorch::keep_freed_pages();
    Criterion::default()
}

criterion_group! { name = benches; config = prepared(); targets = reference, ddim, lcm, thresholding, noise }
criterion_main!(benches);
