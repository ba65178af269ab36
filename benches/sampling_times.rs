//! Times whole samples with a network that costs nothing, on demand, for `benches/peers/compare_sampling.py`.
//!
//! `sampling_times THREADS [DEVICE]` reads lines from standard input. Each is a round: every case is timed once, and a line
//! of JSON contains the microseconds of one sample of four steps, by case. So the caller can alternate rounds with
//! another program's.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

use ddil_benches::free::Free;
use ddil_benches::process::wait_for;
use ddil_core::{Conditioning, Denoiser, Report, Rollout, SolverRollout, Thresholded};
use ddil_libtorch::Generator;
use ddil_schedulers::{
    Ddim, Lcm, NoiseLevels, NoiseSchedule, NoiseScheduleConfig, Prediction, Sampler, Solver,
    SolverConfig, Thresholding, TimestepSpacing, Timesteps,
};
use ddil_trainer::config::parse_device;
use tch::{Device, Kind, Tensor};

const SHAPES: [[i64; 4]; 2] = [[4, 4, 64, 64], [16, 4, 128, 128]];

/// A denoiser that returns the same `x0` and `epsilon`, whatever its input.
struct Stored {
    schedule: NoiseSchedule,
    prediction: Prediction,
}

impl Denoiser for Stored {
    fn predict(&self, _: &Tensor, _: &Tensor, _: &Conditioning) -> ddil_core::Result<Prediction> {
        let Prediction { x0, epsilon } = &self.prediction;
        Ok(Prediction { x0: x0.shallow_clone(), epsilon: epsilon.shallow_clone() })
    }

    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
}

/// A sampler on timesteps, or a solver on noise levels.
enum Path {
    Timesteps(Box<dyn Sampler>, Timesteps),
    Levels(Box<dyn Solver>, NoiseLevels),
}

/// A denoiser and its sampler.
struct Case {
    name: &'static str,
    path: Path,
    denoiser: Box<dyn Denoiser>,
    keeps_states: bool,
}

impl Case {
    fn run(&self, noise: &Tensor, generator: &mut Generator) -> ddil_core::Result<Tensor> {
        let noise = noise.shallow_clone();
        let (sampler, timesteps) = match &self.path {
            Path::Timesteps(sampler, timesteps) => (sampler, timesteps),
            Path::Levels(solver, levels) => {
                return SolverRollout::new(&*self.denoiser, &**solver, levels).sample(noise);
            }
        };
        let generator = sampler.needs_noise().then_some(generator);
        let rollout = Rollout::new(&*self.denoiser, &**sampler, timesteps);
        let rollout = rollout.generator(generator);
        if self.keeps_states { Ok(rollout.run(noise)?.x0) } else { rollout.sample(noise) }
    }

    /// Microseconds per sample, averaged over enough samples for some milliseconds.
    fn time(&self, noise: &Tensor, generator: &mut Generator) -> ddil_core::Result<f64> {
        let samples = if noise.size()[0] > 8 { 8 } else { 80 };
        drop(black_box(self.run(noise, generator)?));
        wait_for(noise.device());
        let started = Instant::now();
        for _ in 0..samples {
            drop(black_box(self.run(noise, generator)?));
        }
        wait_for(noise.device());
        Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(samples))
    }
}

fn cases(shape: [i64; 4], device: Device) -> Result<Vec<Case>, Report> {
    let schedule = NoiseScheduleConfig::default().build()?;
    let trailing = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
    let free = || Free::new(schedule.clone(), shape, device);
    let clamped = || Thresholded::new(free(), Thresholding::clamp_pixels());
    let [x0, epsilon] = [0; 2].map(|_| Tensor::randn(shape, (Kind::Float, device)));
    let stored = Stored { schedule: schedule.clone(), prediction: Prediction { x0, epsilon } };
    let ddim = |name, denoiser: Box<dyn Denoiser>, keeps_states| Case {
        name,
        path: Path::Timesteps(Box::new(Ddim::new(schedule.clone())), trailing.clone()),
        denoiser,
        keeps_states,
    };
    let solver = |name, config: SolverConfig| -> Result<Case, Report> {
        let path = Path::Levels(config.build()?, config.levels(&schedule, 4)?);
        Ok(Case { name, path, denoiser: Box::new(free()), keeps_states: false })
    };
    Ok(vec![
        ddim("DDIM", Box::new(free()), false),
        ddim("DDIM, states kept", Box::new(free()), true),
        ddim("DDIM, clamped", Box::new(clamped()?), false),
        ddim("DDIM, x0 and epsilon given", Box::new(stored), false),
        Case {
            name: "LCM",
            path: Path::Timesteps(
                Box::new(Lcm::new(schedule.clone())),
                Timesteps::lcm(1000, 50, 4)?,
            ),
            denoiser: Box::new(free()),
            keeps_states: false,
        },
        solver("Euler", SolverConfig::euler())?,
        solver("DPM-Solver++ 2M", SolverConfig::dpm_solver())?,
        solver("UniPC", SolverConfig::uni_pc())?,
    ])
}

fn main() -> Result<(), Report> {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().ok_or("sampling_times THREADS [DEVICE]")?.parse()?;
    let device = parse_device(arguments.next().as_deref().unwrap_or("cpu"))?;
    tch::set_num_threads(threads);
    ddil_libtorch::keep_freed_pages();
    let mut generator = Generator::new(device, 0)?;
    let mut all = Vec::new();
    for shape in SHAPES {
        all.push((Tensor::randn(shape, (Kind::Float, device)), cases(shape, device)?));
    }
    for line in std::io::stdin().lines() {
        line?;
        let mut times = BTreeMap::new();
        for (noise, cases) in &all {
            let label = noise.size().iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
            for case in cases {
                times.insert(format!("{} {label}", case.name), case.time(noise, &mut generator)?);
            }
        }
        println!("{}", serde_json::to_string(&times)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}
