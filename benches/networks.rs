//! A small U-Net of pixels: passes, updates of each method on noised data, and the work after the gradients. Also the
//! operations that they consist of: a convolution, a normalisation, a copy.
//!
//! `cargo bench --workspace --bench networks`. `DDIL_BENCH_THREADS` sets the number of libtorch's threads, default
//! one. An update of DMD2 is a whole cycle of five, in one of which the student is trained.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use ddil_benches::training::{Method, Optimization, Passes, TrainingLoop, Variant, Workload};
use ddil_libtorch::{GroupNorm, TensorList, channels_last, foreach_lerp_, group_norm};
use ddil_models::Precision;
use tch::{Device, Kind, Tensor, kind};

const PRECISIONS: [(&str, Precision); 2] =
    [("f32", Precision::Float32), ("bf16", Precision::Bfloat16)];

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.sample_size(10);
    group
}

fn workload(batch: i64, precision: Precision) -> Workload {
    Workload { batch, ..Workload::fashion_mnist(precision, 0) }
}

/// A convolution with the channels of the network's middle block, and passes of the whole network.
fn pass(c: &mut Criterion) {
    let mut group = group(c, "pass");
    for batch in [8, 64] {
        group.throughput(Throughput::Elements(batch as u64));
        let x = Tensor::randn([batch, 32, 32, 32], kind::FLOAT_CPU);
        let weight = Tensor::randn([32, 32, 3, 3], kind::FLOAT_CPU);
        group.bench_function(BenchmarkId::new("convolution", batch), |b| {
            b.iter(|| black_box(x.conv2d(&weight, None::<Tensor>, 1, 1, 1, 1)));
        });
        for (name, precision) in PRECISIONS {
            let passes = Passes::new(&workload(batch, precision)).expect("valid settings");
            group.bench_function(BenchmarkId::new(name, batch), |b| {
                b.iter(|| black_box(passes.pass().expect("the batch fits")));
            });
        }
    }
    group.finish();
}

/// Group normalisation with `SiLU` of the network's feature maps, in one operation and in libtorch's two.
fn norm(c: &mut Criterion) {
    let mut group = group(c, "norm");
    let _no_grad = tch::no_grad_guard();
    for (channels, side) in [(16, 32), (32, 16), (64, 8)] {
        let [weight, bias] = [0; 2].map(|_| Tensor::randn([channels], kind::FLOAT_CPU));
        let (weight, bias) = (Some(&weight), Some(&bias));
        let settings =
            GroupNorm { num_groups: 8, eps: 1e-5, weight, bias, offset: None, silu: true };
        for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
            let x = Tensor::randn([64, channels, side, side], kind::FLOAT_CPU).to_kind(kind);
            let x = channels_last(&x).expect("images");
            group.throughput(Throughput::Elements(x.numel() as u64));
            let of = format!("{name}, {channels}x{side}x{side}");
            group.bench_function(BenchmarkId::new("group_norm", &of), |b| {
                b.iter(|| black_box(group_norm(&x, &settings).expect("they fit")));
            });
            group.bench_function(BenchmarkId::new("libtorch", &of), |b| {
                b.iter(|| black_box(x.group_norm(8, weight, bias, 1e-5, true).silu()));
            });
            group.bench_function(BenchmarkId::new("group_norm, gradient", &of), |b| {
                let norm = |x: &[Tensor]| group_norm(&x[0], &settings).expect("they fit");
                b.iter(|| forth_and_back(&[&x], norm));
            });
            group.bench_function(BenchmarkId::new("libtorch, gradient", &of), |b| {
                let norm = |x: &[Tensor]| x[0].group_norm(8, weight, bias, 1e-5, true).silu();
                b.iter(|| forth_and_back(&[&x], norm));
            });
        }
    }
    group.finish();
}

/// Attention and convolutions of these networks in each kind, forward and backward; attention in 16 bits also through
/// `Float`.
fn kinds(c: &mut Criterion) {
    const ATTENTION: [(&str, Kind, Kind); 4] = [
        ("f32", Kind::Float, Kind::Float),
        ("bf16", Kind::BFloat16, Kind::BFloat16),
        ("bf16 in f32", Kind::BFloat16, Kind::Float),
        ("f16", Kind::Half, Kind::Half),
    ];
    let mut group = group(c, "kinds");
    for [batch, heads, tokens, width] in [[8, 2, 64, 32], [8, 3, 16, 32], [1, 8, 1024, 80]] {
        let floats = [0; 3].map(|_| Tensor::randn([batch, heads, tokens, width], kind::FLOAT_CPU));
        for (name, kind, computed) in ATTENTION {
            let given = floats.each_ref().map(|t| t.to_kind(kind));
            let of = format!("attention, {batch}x{heads}x{tokens}x{width}");
            group.bench_function(BenchmarkId::new(of, name), |b| {
                b.iter(|| forth_and_back(&given.each_ref(), |t| attention(t, computed)));
            });
        }
    }
    for (channels, side) in [(32, 32), (64, 16), (96, 8)] {
        let x = Tensor::randn([64, channels, side, side], kind::FLOAT_CPU);
        let weight = Tensor::randn([channels, channels, 3, 3], kind::FLOAT_CPU);
        for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
            let [x, weight] =
                [&x, &weight].map(|t| channels_last(&t.to_kind(kind)).expect("images"));
            let of = format!("convolution, {channels}x{side}x{side}");
            group.bench_function(BenchmarkId::new(of, name), |b| {
                let convolve = |t: &[Tensor]| t[0].conv2d(&t[1], None::<Tensor>, 1, 1, 1, 1);
                b.iter(|| forth_and_back(&[&x, &weight], convolve));
            });
        }
    }
    group.finish();
}

/// Attention of queries, keys and values, with the result in their kind.
fn attention(of: &[Tensor], computed: Kind) -> Tensor {
    let [query, key, value] = [0, 1, 2].map(|i| of[i].to_kind(computed));
    let none = None::<Tensor>;
    Tensor::scaled_dot_product_attention(&query, &key, &value, none, 0.0, false, None, false)
        .to_kind(of[0].kind())
}

/// An operation on leaf tensors with these values, and its gradient.
fn forth_and_back(values: &[&Tensor], operation: impl Fn(&[Tensor]) -> Tensor) {
    let leaves: Vec<Tensor> = values.iter().map(|t| t.detach().set_requires_grad(true)).collect();
    tch::with_grad(|| {
        let y = operation(&leaves);
        let loss = (&y * y.detach()).sum(Kind::Float);
        black_box(Tensor::run_backward(&[loss], &leaves, false, false));
    });
}

/// Updates of batches of 8.
fn update(c: &mut Criterion) {
    let mut group = group(c, "update");
    for (precision_name, precision) in PRECISIONS {
        for method in Method::ALL {
            let training = TrainingLoop::new(Variant::forward(method), &workload(8, precision));
            let (mut training, mut step) = (training.expect("valid settings"), 0);
            let turn = if method == Method::Dmd2 { 5 } else { 1 };
            group.bench_function(BenchmarkId::new(method.name(), precision_name), |b| {
                b.iter(|| {
                    for _ in 0..turn {
                        black_box(training.update(step).expect("the batch fits"));
                        step += 1;
                    }
                });
            });
        }
    }
    group.finish();
}

/// With 10 million parameters: clipping, `AdamW` and moving average; the average alone; a copy.
fn optimizer(c: &mut Criterion) {
    let mut group = group(c, "optimizer");
    let mut optimization = Optimization::new(false, Device::Cpu).expect("valid settings");
    group.bench_function("clip, AdamW, EMA", |b| {
        b.iter(|| optimization.update().expect("gradients are there"));
    });
    let lists = [0; 2].map(|_| {
        let tensors = (0..200).map(|_| Tensor::randn([250, 200], kind::FLOAT_CPU));
        TensorList::new(tensors.collect::<Vec<_>>()).expect("tensors of one kind")
    });
    group.bench_function("lerp", |b| {
        b.iter(|| foreach_lerp_(&lists[0], &lists[1], 1e-3).expect("the same shapes"));
    });
    let (mut to, from) = (Tensor::zeros([10_000_000], kind::FLOAT_CPU), lists[1].to_vec());
    let from = Tensor::cat(&from.expect("it is there"), 0).flatten(0, -1);
    group.bench_function("copy_", |b| b.iter(|| to.copy_(&from)));
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

criterion_group! { name = benches; config = prepared(); targets = pass, norm, kinds, update, optimizer }
criterion_main!(benches);
