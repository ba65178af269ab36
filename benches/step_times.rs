//! Times sampler steps on demand, for `benches/peers/compare_steps.py`.
//!
//! `step_times THREADS [DEVICE]` reads lines from standard input. Each is a round: every case is timed once, and a line of JSON
//! says how many microseconds a step took, by case. So the caller can alternate rounds with another program's.

use std::collections::BTreeMap;
use std::error::Error;
use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

use ddil_benches::process::wait_for;
use ddil_libtorch::Generator;
use ddil_schedulers::{
    Ddim, Lcm, NoiseSchedule, NoiseScheduleConfig, Plan, PredictionType, Sampler, SamplerStep,
    Thresholding, TimestepSpacing, Timesteps,
};
use ddil_trainer::config::parse_device;
use tch::{Device, Kind, Tensor};

/// A batch with what the network said of it.
struct Batch {
    shape: [i64; 4],
    x_t: Tensor,
    model_output: Tensor,
}

impl Batch {
    fn new(shape: [i64; 4], device: Device) -> Self {
        let random = |_| Tensor::randn(shape, (Kind::Float, device));
        let [x_t, model_output] = [0; 2].map(random);
        Self { shape, x_t, model_output }
    }

    /// Microseconds a call, over as many calls as take some milliseconds.
    fn time(&self, mut call: impl FnMut()) -> f64 {
        let calls = if self.shape[0] > 8 { 20 } else { 200 };
        call();
        wait_for(self.x_t.device());
        let started = Instant::now();
        for _ in 0..calls {
            call();
        }
        wait_for(self.x_t.device());
        started.elapsed().as_secs_f64() * 1e6 / f64::from(calls)
    }

    fn label(&self, case: &str) -> String {
        format!("{case} {}", self.shape.map(|n| n.to_string()).join("x"))
    }
}

/// A sampler's step three ways: general path, plan, plan in place. As diffusers' does, one of LCM counts the drawing of
/// its noise.
struct Case {
    name: &'static str,
    sampler: Box<dyn Sampler>,
    plan: Plan,
    thresholding: Thresholding,
}

impl Case {
    fn noise(&self, batch: &Batch, generator: &mut Generator) -> Option<Tensor> {
        let draw = || generator.normal(batch.shape, batch.x_t.kind()).expect("there is memory");
        self.sampler.needs_noise().then(draw)
    }

    fn general(&self, batch: &Batch, noise: Option<&Tensor>) -> ddil_schedulers::Result<Tensor> {
        let integers = (Kind::Int64, batch.x_t.device());
        let at = |t: i64| Tensor::full([batch.shape[0]], t, integers);
        let (t, prev, schedule) = (at(749), at(499), self.sampler.schedule());
        let said = PredictionType::Epsilon
            .convert(schedule, &batch.model_output, &batch.x_t, &t)?
            .thresholded(&self.thresholding, schedule, &batch.x_t, &t)?;
        let step = SamplerStep::new(&said, &t, &prev);
        match noise {
            Some(noise) => self.sampler.step(&step.with_noise(noise)),
            None => self.sampler.step(&step),
        }
    }

    fn time(&self, batch: &Batch, generator: &mut Generator, times: &mut BTreeMap<String, f64>) {
        let mut record =
            |way: &str, time| times.insert(format!("{} | {way}", batch.label(self.name)), time);
        let general = || {
            let noise = self.noise(batch, generator);
            drop(black_box(self.general(batch, noise.as_ref()).expect("they fit")));
        };
        record("general", batch.time(general));
        let (x_t, output) = (&batch.x_t, &batch.model_output);
        let plan = || {
            let noise = self.noise(batch, generator);
            drop(black_box(self.plan.step(1, x_t, output, noise.as_ref()).expect("they fit")));
        };
        record("plan", batch.time(plan));
        let (mut x_t, mut noise) = (x_t.copy(), self.noise(batch, generator));
        let in_place = || {
            if let Some(noise) = &mut noise {
                generator.fill_normal(noise).expect("it is plain memory");
            }
            self.plan.step_inplace(1, &mut x_t, output, noise.as_ref()).expect("they fit");
        };
        record("plan in place", batch.time(in_place));
    }
}

fn cases(schedule: &NoiseSchedule) -> ddil_schedulers::Result<[Case; 3]> {
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
    let ddim = |name, thresholding: Thresholding| {
        let sampler = Ddim::new(schedule.clone());
        let plan = sampler.plan(&grid, PredictionType::Epsilon, &thresholding)?;
        Ok::<_, ddil_schedulers::Error>(Case {
            name,
            sampler: Box::new(sampler),
            plan,
            thresholding,
        })
    };
    let sampler = Lcm::new(schedule.clone());
    let plan = sampler.plan(&grid, PredictionType::Epsilon, &Thresholding::None, None)?;
    let thresholding = Thresholding::None;
    Ok([
        ddim("ddim", Thresholding::None)?,
        ddim("ddim clipped", Thresholding::clamp_pixels())?,
        Case { name: "lcm", sampler: Box::new(sampler), plan, thresholding },
    ])
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut asked = std::env::args().skip(1);
    let threads = asked.next().ok_or("step_times THREADS [DEVICE]")?.parse()?;
    let device = parse_device(asked.next().as_deref().unwrap_or("cpu"))?;
    tch::set_num_threads(threads);
    ddil_libtorch::keep_freed_pages();
    let _no_grad = tch::no_grad_guard();
    let cases = cases(&NoiseScheduleConfig::default().build()?)?;
    let batches = [[4, 4, 64, 64], [16, 4, 128, 128]].map(|shape| Batch::new(shape, device));
    let mut generator = Generator::new(device, 0)?;
    for line in std::io::stdin().lines() {
        line?;
        let mut times = BTreeMap::new();
        for batch in &batches {
            for case in &cases {
                case.time(batch, &mut generator, &mut times);
            }
        }
        println!("{}", serde_json::to_string(&times)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}
