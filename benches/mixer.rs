//! The cost of mixing without the networks: batches of 64 pixel images with a denoiser that costs nothing.
//!
//! `cargo bench -p ddil-benches --bench mixer`. `DDIL_BENCH_THREADS` sets the number of libtorch's threads, default
//! one. Each measurement consists of a batch and the mixer's work after its loss.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ddil_core::{
    AdaptivePriors, BufferConfig, Clock, Conditioning, Data, Denoiser, Feedback, MixBatch, Mixer,
    MixerConfig, PriorSchedule, Priors, RandomStreams, Result, RolloutNetworks, StudentPolicy,
};
use ddil_schedulers::{
    Ddim, NoiseSchedule, NoiseScheduleConfig, Prediction, TimestepSpacing, Timesteps,
};
use tch::{Tensor, kind};

const SHAPE: [i64; 4] = [64, 1, 32, 32];

/// Returns its input.
struct Echo(NoiseSchedule);

impl Denoiser for Echo {
    fn predict(&self, x_t: &Tensor, _: &Tensor, _: &Conditioning) -> Result<Prediction> {
        Ok(Prediction { x0: x_t.shallow_clone(), epsilon: x_t.shallow_clone() })
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.0
    }
}

/// A mixer and its step counter.
struct Run {
    mixer: Mixer,
    network: Echo,
    data: Data,
    prompts: Conditioning,
    streams: RandomStreams,
    step: u64,
}

impl Run {
    fn new(config: MixerConfig) -> Self {
        let schedule = NoiseScheduleConfig::default().build().expect("the defaults are valid");
        let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("4 steps fit");
        let sampler = Box::new(Ddim::new(schedule.clone()));
        let labels = || Conditioning::class_labels(Tensor::zeros([SHAPE[0]], kind::INT64_CPU));
        let x0 = Tensor::randn(SHAPE, kind::FLOAT_CPU);
        Self {
            mixer: Mixer::new(config, grid, sampler).expect("the settings are valid"),
            network: Echo(schedule),
            data: Data::new(x0).with_conditioning(labels()),
            prompts: labels(),
            streams: RandomStreams::new(0, 0),
            step: 0,
        }
    }

    fn advance(&mut self) -> Result<()> {
        let clock = Clock::new(self.step, u64::MAX, self.streams);
        let batch = MixBatch::new(&self.data).with_prompts(&self.prompts);
        let networks = RolloutNetworks::new(&self.network, &self.network);
        let states = self.mixer.next_states(&clock, &batch, &networks)?;
        self.mixer.feed_back(&clock, &states, &Feedback::new(&states.x_t))?;
        self.step += 1;
        black_box(states);
        Ok(())
    }
}

fn settings() -> Vec<(&'static str, MixerConfig)> {
    let priors = Priors::new(0.5, 0.25, 0.25).expect("they sum to 1");
    let mixed = |policy: StudentPolicy| {
        MixerConfig::default().with(|config| {
            config.priors = PriorSchedule::constant(priors);
            config.student.policy = policy;
            // Full during the warm-up, as for most of a run.
            config.teacher.pool = 64;
        })
    };
    let adaptive = AdaptivePriors::default().with(|config| config.warm_up = 0.0);
    let buffer = BufferConfig::default();
    vec![
        ("forward only", MixerConfig::forward_only()),
        ("fresh", mixed(StudentPolicy::Fresh)),
        ("fresh all", mixed(StudentPolicy::FreshAll)),
        ("buffer", mixed(StudentPolicy::Buffer { new_fraction: 0.25, buffer })),
        ("chain", mixed(StudentPolicy::Chain { refresh_fraction: 0.1 })),
        (
            "chain, adaptive by shift",
            mixed(StudentPolicy::Chain { refresh_fraction: 0.1 })
                .with(|config| config.priors = PriorSchedule::Adaptive(adaptive)),
        ),
    ]
}

fn mixer(c: &mut Criterion) {
    let mut group = c.benchmark_group("mixer");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Elements(SHAPE[0] as u64));
    // The lower bound of any mixture: random draws by libtorch.
    let x0 = Tensor::zeros(SHAPE, kind::FLOAT_CPU);
    group.bench_function("noise alone", |b| b.iter(|| black_box(x0.randn_like())));
    for (name, config) in settings() {
        let mut run = Run::new(config);
        group.bench_function(name, |b| b.iter(|| run.advance().expect("the batch fits")));
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

criterion_group! { name = benches; config = prepared(); targets = mixer }
criterion_main!(benches);
