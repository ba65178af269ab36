//! The loading of a batch before an update: one of pixels, and one of latents with their prompts.
//!
//! `cargo bench --workspace --bench data`. `DDIL_BENCH_THREADS` sets the number of libtorch's threads, default one.
//! Pages of the files are in memory after the first batches, so disk speed has no effect.

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ddil_core::{RandomStreams, Stream};
use ddil_data::{BatchIndices, EncodedDataset, ImageDataset, flip_horizontally};
use ddil_models::weights;
use tch::{Device, Kind, Tensor, kind};

/// Samples per dataset.
const SAMPLES: i64 = 512;

fn images(c: &mut Criterion) {
    let mut group = c.benchmark_group("data");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (batch, shape) in [(64, [1, 32, 32]), (64, [3, 64, 64])] {
        let size = [&[SAMPLES][..], &shape].concat();
        let pixels = Tensor::randint(256, size, (Kind::Uint8, Device::Cpu));
        let labels = Tensor::randint(10, [SAMPLES], kind::INT64_CPU);
        let data = ImageDataset::new(&pixels, Some(&labels)).expect("they fit");
        let mut indices = BatchIndices::new(data.len(), batch, 0).expect("a batch fits");
        let label = shape.map(|n| n.to_string()).join("x");
        group.throughput(Throughput::Elements(batch as u64));
        let mut step = 0;
        group.bench_function(BenchmarkId::new("images, mirrored", &label), |b| {
            b.iter(|| {
                step += 1;
                let chosen = data.batch(&indices.at(step)).expect("indices are there");
                black_box(flip_horizontally(&chosen.x0, &indices.flips_at(step)).expect("they fit"))
            });
        });
    }
    group.finish();
}

/// Latents in the format of Stable Diffusion 1.5's autoencoder, with a prompt for each.
fn write_encoded(folder: &Path) {
    let save = |name: &str, tensors: Vec<(String, Tensor)>| {
        let path = folder.join(format!("{name}.safetensors"));
        weights::save(&tensors, path, &BTreeMap::default()).expect("there is room");
    };
    let half = |size: &[i64]| Tensor::randn(size, kind::FLOAT_CPU).to_kind(Kind::Half);
    let size = [SAMPLES, 4, 64, 64];
    save("latents", vec![("mean".into(), half(&size)), ("std".into(), half(&size).abs())]);
    save("prompts", vec![("encoder_hidden_states".into(), half(&[SAMPLES, 77, 768]))]);
    let rows = Tensor::arange(SAMPLES, kind::INT64_CPU).unsqueeze(1);
    save("samples", vec![("prompts".into(), rows)]);
    let texts: Vec<String> = (0..SAMPLES).map(|row| format!("\"{row}\"")).collect();
    fs::write(folder.join("prompts.json"), format!("[{}]", texts.join(",")))
        .expect("there is room");
    let info = format!(
        r#"{{"format_version": 1, "image_size": [512, 512], "scaling": {{"factor": 0.18215}},
            "num_samples": {SAMPLES}, "num_prompts": {SAMPLES}, "empty_prompt": 0}}"#
    );
    fs::write(folder.join("dataset.json"), info).expect("there is room");
}

fn latents(c: &mut Criterion) {
    const BATCH: usize = 12;
    let folder = tempfile::tempdir().expect("there is room");
    write_encoded(folder.path());
    let data = EncodedDataset::open(folder.path(), None).expect("just written");
    let mut indices = BatchIndices::new(data.len(), BATCH, 0).expect("a batch fits");
    let streams = RandomStreams::new(0, 0);
    let mut group = c.benchmark_group("data");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group.throughput(Throughput::Elements(BATCH as u64));
    let mut step = 0;
    group.bench_function(BenchmarkId::new("latents and prompts", "4x64x64, 77x768"), |b| {
        b.iter(|| {
            step += 1;
            let mut draws = streams.draws(step, Stream::Data, Device::Cpu).expect("the CPU");
            let batch = data.batch(&indices.at(step), [4, 64, 64], &mut draws, Device::Cpu);
            black_box(batch.expect("indices are there"))
        });
    });
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

criterion_group! { name = benches; config = prepared(); targets = images, latents }
criterion_main!(benches);
