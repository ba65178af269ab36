//! Metrics on 64 features per sample, the number of the Fashion-MNIST classifier, with one thread of libtorch.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ddil_metrics::{
    Neighbours, Statistics, energy_distance, frechet_distance, kid, mean_pairwise_distance, prdc,
    sliced_wasserstein,
};
use tch::{Tensor, kind};

fn metrics(c: &mut Criterion) {
    tch::set_num_threads(1);
    tch::manual_seed(0);
    let mut group = c.benchmark_group("metrics");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.sample_size(10);
    for n in [2_000, 10_000] {
        let sets = [0; 2].map(|_| Tensor::randn([n, 64], kind::FLOAT_CPU));
        let [real, fake] = &sets;
        group.bench_with_input(BenchmarkId::new("all distances", n), &sets, |b, _| {
            b.iter(|| black_box(Tensor::cdist(real, fake, 2.0, None::<i64>)));
        });
        group.bench_with_input(BenchmarkId::new("frechet", n), &sets, |b, _| {
            b.iter(|| {
                let [real, fake] = [real, fake].map(Statistics::from_features);
                black_box(frechet_distance(&real?, &fake?))
            });
        });
        group.bench_with_input(BenchmarkId::new("prdc", n), &sets, |b, _| {
            b.iter(|| black_box(prdc(real, fake, Neighbours::default())));
        });
        group.bench_with_input(BenchmarkId::new("kid", n), &sets, |b, _| {
            b.iter(|| black_box(kid(real, fake)));
        });
        group.bench_with_input(BenchmarkId::new("energy_distance", n), &sets, |b, _| {
            b.iter(|| black_box(energy_distance(real, fake)));
        });
        group.bench_with_input(BenchmarkId::new("sliced_wasserstein", n), &sets, |b, _| {
            b.iter(|| black_box(sliced_wasserstein(real, fake, 128, 0)));
        });
        group.bench_with_input(BenchmarkId::new("mean_pairwise_distance", n), &sets, |b, _| {
            b.iter(|| black_box(mean_pairwise_distance(fake)));
        });
    }
    group.finish();
}

fn prepared() -> Criterion {
    ddil_benches::register_fonts();
    Criterion::default()
}

criterion_group! { name = benches; config = prepared(); targets = metrics }
criterion_main!(benches);
