//! The buffer of visited states: insertion and sampling of a batch of 64, pixel images and latents, all in memory or
//! next to all on disk. `buffer_on_disk` measures more states of the latter kind.
//!
//! `cargo bench -p ddil-benches --bench buffer`. `DDIL_BENCH_THREADS` sets the number of libtorch's threads, default
//! one. For comparison, the same rows are copied out of a plain tensor: the lower bound for sampling.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ddil_core::{
    AggregationBuffer, BufferConfig, Conditioning, Source, SpillConfig, States, StorageKind,
};
use ddil_schedulers::{TimestepSpacing, Timesteps};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tch::{Tensor, kind};

const BATCH: usize = 64;
const SHAPES: [[i64; 3]; 2] = [[1, 32, 32], [4, 64, 64]];

fn grid_indices() -> Vec<usize> {
    (0..BATCH).map(|row| 1 + row % 3).collect()
}

fn states(shape: [i64; 3]) -> States {
    let whole = [&[BATCH as i64][..], &shape].concat();
    let x_t = Tensor::randn(whole, kind::FLOAT_CPU);
    let labels = Conditioning::class_labels(Tensor::zeros([BATCH as i64], kind::INT64_CPU));
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("4 steps fit");
    let states = States::new(x_t, &grid, grid_indices(), Source::Student).expect("on the grid");
    states.with_conditioning(labels)
}

fn filled(shape: [i64; 3], config: BufferConfig) -> (AggregationBuffer, States) {
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("4 steps fit");
    let mut buffer = AggregationBuffer::new(config, &grid).expect("the settings are valid");
    let states = states(shape);
    for _ in 0..40 {
        buffer.insert(&states).expect("they fit");
    }
    (buffer, states)
}

fn buffer(c: &mut Criterion) {
    let mut group = c.benchmark_group("buffer");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for shape in SHAPES {
        let label = shape.map(|n| n.to_string()).join("x");
        group.throughput(Throughput::Elements(BATCH as u64));
        let folder = std::env::temp_dir().join(format!("ddil-buffer-{}", std::process::id()));
        let kinds = [("f16", StorageKind::F16), ("f32", StorageKind::F32)];
        let in_memory = kinds.map(|(name, storage)| {
            (name, BufferConfig::default().with(|config| config.storage = storage))
        });
        let spill = SpillConfig::new(folder.clone(), 128 << 20);
        let on_disk = BufferConfig::default().with(|config| {
            config.byte_budget = 0;
            config.spill = Some(spill);
        });
        for (name, config) in in_memory.into_iter().chain([("f16 on disk", on_disk)]) {
            let (mut buffer, states) = filled(shape, config);
            group.bench_function(BenchmarkId::new(format!("insert {name}"), &label), |b| {
                b.iter(|| buffer.insert(black_box(&states)).expect("they fit"));
            });
            let (indices, mut rng) = (grid_indices(), StdRng::seed_from_u64(0));
            group.bench_function(BenchmarkId::new(format!("sample {name}"), &label), |b| {
                b.iter(|| black_box(buffer.sample(&indices, 0, &mut rng).expect("it is full")));
            });
        }
        // The files are removed with their buffer; a folder that remains is recognised by its name.
        let _ = std::fs::remove_dir(&folder);
        let kept = Tensor::randn([&[2046_i64][..], &shape].concat(), kind::FLOAT_CPU);
        let rows = Tensor::randint(2046, [BATCH as i64], kind::INT64_CPU);
        group.bench_function(BenchmarkId::new("index_select f32", &label), |b| {
            b.iter(|| black_box(kept.index_select(0, &rows)));
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
    Criterion::default()
}

criterion_group! { name = benches; config = prepared(); targets = buffer }
criterion_main!(benches);
