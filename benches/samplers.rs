//! The cost of a sampler: one step of each sampler with each thresholding, and whole samples of four steps, at two
//! sizes.
//!
//! ```sh
//! cargo bench --workspace --bench samplers               # minutes; target/criterion/report/index.html
//! cargo bench --workspace --bench samplers -- --quick    # a quick run
//! ```
//!
//! The network costs nothing: it returns stored noise. Sizes are batch x channels x height x width, 4x4x64x64 being four
//! latents of Stable Diffusion at 512 pixels. Names read `sampler/thresholding/size`; `reference` is a copy of as many bytes
//! that a step in place reads and writes, and a step's formula in libtorch's operations. `DDIL_BENCH_THREADS` sets the
//! number of libtorch's threads, default one. `benches/peers/compare_sampling.py` compares whole samples with
//! diffusers'.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use ddil_benches::free::Free;
use ddil_core::{Conditioning, Denoiser, Rollout, SolverRollout, Thresholded};
use ddil_libtorch::Generator;
use ddil_schedulers::{
    DataRange, Ddim, Lcm, NoiseSchedule, NoiseScheduleConfig, Prediction, Sampler, SamplerStep,
    SolverConfig, Thresholding, TimestepSpacing, Timesteps,
};
use tch::{Device, Kind, Tensor, kind};

const SHAPES: [[i64; 4]; 2] = [[4, 4, 64, 64], [16, 4, 128, 128]];

fn schedule() -> NoiseSchedule {
    NoiseScheduleConfig::default().build().expect("the defaults are valid")
}

fn samplers() -> [(&'static str, Box<dyn Sampler>); 3] {
    let renewing = Ddim::with_eta(schedule(), 1.0).expect("1 is allowed");
    [
        ("DDIM step", Box::new(Ddim::new(schedule()))),
        ("DDIM step, eta 1", Box::new(renewing)),
        ("LCM step", Box::new(Lcm::new(schedule()))),
    ]
}

fn thresholdings() -> [(&'static str, Thresholding); 5] {
    let per_channel = DataRange::per_channel(vec![-1.0; 4], vec![1.0; 4]);
    [
        ("no thresholding", Thresholding::None),
        ("clamp", Thresholding::clamp_pixels()),
        ("clamp per channel", Thresholding::Clamp(per_channel)),
        ("dynamic", Thresholding::Dynamic { ratio: 0.995, max_value: 2.0 }),
        ("reflect", Thresholding::Reflect(DataRange::default())),
    ]
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    group
}

fn label(shape: [i64; 4]) -> String {
    shape.map(|n| n.to_string()).join("x")
}

/// One step from 749 to 499: a network's output, thresholded and stepped, in new memory.
fn steps(c: &mut Criterion) {
    for (name, sampler) in samplers() {
        let mut group = group(c, name);
        for shape in SHAPES {
            let network = Free::new(schedule(), shape, Device::Cpu);
            let [x_t, noise] = [0; 2].map(|_| Tensor::randn(shape, kind::FLOAT_CPU));
            group.throughput(Throughput::Elements(x_t.numel() as u64));
            for (thresholding, settings) in thresholdings() {
                let denoiser = Thresholded::new(&network, settings).expect("valid settings");
                let level = network.schedule().level_at(749).expect("on the grid");
                let step = || {
                    let estimate = denoiser.estimate(&x_t, level, &Conditioning::none())?;
                    let x_t = x_t.shallow_clone();
                    Ok::<_, ddil_core::Error>(sampler.step_at(x_t, &estimate, 499, Some(&noise))?)
                };
                group.bench_function(BenchmarkId::new(thresholding, label(shape)), |b| {
                    b.iter(|| black_box(step().expect("the tensors fit")));
                });
            }
        }
        group.finish();
    }
}

/// The same for a batch with different timesteps per sample, where the network's output has already been read.
fn mixed_timesteps(c: &mut Criterion) {
    let (sampler, mut group) = (Ddim::new(schedule()), group(c, "DDIM step, mixed timesteps"));
    for shape in SHAPES {
        let [x0, epsilon] = [0; 2].map(|_| Tensor::randn(shape, kind::FLOAT_CPU));
        group.throughput(Throughput::Elements(x0.numel() as u64));
        let prediction = Prediction { x0, epsilon };
        let batch = 0..shape[0];
        let (t, prev): (Vec<i64>, Vec<i64>) = batch.map(|i| (500 + i, 250 + i)).unzip();
        let step = SamplerStep::new(&prediction, &t, &prev);
        group.bench_function(BenchmarkId::new("no thresholding", label(shape)), |b| {
            b.iter(|| black_box(sampler.step(&step).expect("the tensors fit")));
        });
    }
    group.finish();
}

/// Whole samples, from noise to clean data: the memory of the state is reused from step to step.
fn samples(c: &mut Criterion) {
    let trailing = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("4 steps fit");
    let lcm = Timesteps::lcm(1000, 50, 4).expect("4 steps fit");
    let mut generator = Generator::new(Device::Cpu, 0).expect("there is a CPU");
    for (name, sampler) in samplers() {
        let timesteps = if name.starts_with("LCM") { &lcm } else { &trailing };
        let mut group = group(c, &name.replace("step", "sample of 4 steps"));
        for shape in SHAPES {
            let network = Free::new(schedule(), shape, Device::Cpu);
            let noise = Tensor::randn(shape, kind::FLOAT_CPU);
            group.throughput(Throughput::Elements(noise.numel() as u64));
            for (thresholding, settings) in thresholdings().into_iter().take(2) {
                let denoiser = Thresholded::new(&network, settings).expect("valid settings");
                let mut run = || {
                    let rollout = Rollout::new(&denoiser, &*sampler, timesteps);
                    rollout.generator(&mut generator).sample(noise.shallow_clone())
                };
                group.bench_function(BenchmarkId::new(thresholding, label(shape)), |b| {
                    b.iter(|| black_box(run().expect("the tensors fit")));
                });
            }
        }
        group.finish();
    }
}

/// The same for solvers of teachers, which keep earlier predictions.
fn solver_samples(c: &mut Criterion) {
    for (name, config) in [
        ("Euler", SolverConfig::euler()),
        ("DPM-Solver++ 2M", SolverConfig::dpm_solver()),
        ("UniPC", SolverConfig::uni_pc()),
    ] {
        let solver = config.build().expect("the defaults are valid");
        let levels = config.levels(&schedule(), 4).expect("4 steps fit");
        let mut group = group(c, &format!("{name} sample of 4 steps"));
        for shape in SHAPES {
            let network = Free::new(schedule(), shape, Device::Cpu);
            let noise = Tensor::randn(shape, kind::FLOAT_CPU);
            group.throughput(Throughput::Elements(noise.numel() as u64));
            for (thresholding, settings) in thresholdings().into_iter().take(2) {
                let denoiser = Thresholded::new(&network, settings).expect("valid settings");
                let run = || {
                    let rollout = SolverRollout::new(&denoiser, &*solver, &levels);
                    rollout.sample(noise.shallow_clone())
                };
                group.bench_function(BenchmarkId::new(thresholding, label(shape)), |b| {
                    b.iter(|| black_box(run().expect("the tensors fit")));
                });
            }
        }
        group.finish();
    }
}

/// The references for the others.
fn reference(c: &mut Criterion) {
    let mut group = group(c, "reference");
    for shape in SHAPES {
        let [x_t, output] = [0; 2].map(|_| Tensor::randn(shape, kind::FLOAT_CPU));
        group.throughput(Throughput::Elements(x_t.numel() as u64));
        let [batch, rest @ ..] = shape;
        let longer = [batch * 3 / 2, rest[0], rest[1], rest[2]];
        let from = Tensor::randn(longer, (Kind::Float, Device::Cpu));
        let mut to = from.zeros_like();
        group.bench_function(BenchmarkId::new("copy_", label(shape)), |b| {
            b.iter(|| to.copy_(&from));
        });
        group.bench_function(BenchmarkId::new("formula", label(shape)), |b| {
            b.iter(|| black_box(&x_t * 0.9 + &output * 0.1));
        });
    }
    group.finish();
}

/// Fixes the number of threads, and keeps freed memory like the programs of this project.
fn prepared() -> Criterion {
    let threads = std::env::var("DDIL_BENCH_THREADS").ok().and_then(|n| n.parse().ok());
    tch::set_num_threads(threads.unwrap_or(1));
    ddil_libtorch::keep_freed_pages();
    ddil_benches::register_fonts();
    // Plots take longer than a quick run.
    if std::env::args().any(|argument| argument == "--quick") {
        return Criterion::default().without_plots();
    }
    Criterion::default()
}

criterion_group! {
    name = benches;
    config = prepared();
    targets = reference, steps, mixed_timesteps, samples, solver_samples
}
criterion_main!(benches);
