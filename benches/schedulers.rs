//! Thresholding and noise alone; `samplers.rs` measures the steps that contain them.
//!
//! `cargo bench --workspace --bench schedulers`. `DDIL_BENCH_THREADS` sets the number of libtorch's threads, default
//! one: fixed, so that results are comparable.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use ddil_libtorch::Generator;
use ddil_schedulers::{DataRange, Thresholding};
use tch::{Device, Kind, Tensor, kind};

const SHAPES: [[i64; 4]; 2] = [[4, 4, 64, 64], [16, 4, 128, 128]];

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
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
        let x0 = Tensor::randn(shape, kind::FLOAT_CPU);
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

/// Noise as drawn by rollouts, in new memory and in place, and as drawn by libtorch.
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

/// The reference for the others: a copy of as many bytes as a step in place reads and writes.
fn reference(c: &mut Criterion) {
    let mut group = group(c, "reference");
    for shape in SHAPES {
        let label = shape.map(|n| n.to_string()).join("x");
        group.throughput(Throughput::Elements(shape.iter().product::<i64>() as u64));
        let from = Tensor::randn([shape[0] * 3 / 2, shape[1], shape[2], shape[3]], kind::FLOAT_CPU);
        let mut to = from.zeros_like();
        group.bench_function(BenchmarkId::new("copy_", &label), |b| b.iter(|| to.copy_(&from)));
    }
    group.finish();
}

/// Fixes the number of threads, and keeps freed memory like the programs of this project.
fn prepared() -> Criterion {
    let threads = std::env::var("DDIL_BENCH_THREADS").ok().and_then(|n| n.parse().ok());
    tch::set_num_threads(threads.unwrap_or(1));
    ddil_libtorch::keep_freed_pages();
    ddil_benches::register_fonts();
    Criterion::default()
}

criterion_group! { name = benches; config = prepared(); targets = reference, thresholding, noise }
criterion_main!(benches);
