//! The cost of a pass by batch and by resolution, of sampling by steps, and of a batch of states by the buffer's
//! contents: a table and a plot.
//!
//! `cargo run --release --workspace --example cost -- --threads 2 --out docs/cost.svg`. The network is that of
//! `assets/fashion-mnist-teacher` with random weights. All sizes alternate, round by round. `exponent` is the power
//! of the size with which the cost grows, fitted to the medians: 1 is proportional, 0 is constant.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use ddil::compare::plot::{Line, Panel, Scale, draw};
use ddil::compare::statistics::Estimate;
use ddil_benches::training::{Passes, Result, Workload};
use ddil_core::{
    AggregationBuffer, BufferConfig, Conditioning, Rollout, Source, States, StorageKind,
};
use ddil_models::Precision;
use ddil_schedulers::{Ddim, TimestepSpacing, Timesteps};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tch::{Tensor, kind};

/// Prints the cost of operations by size.
#[derive(Debug, Parser)]
struct Options {
    /// Threads of libtorch.
    #[arg(long, default_value_t = 1)]
    threads: i32,
    /// Rounds of all sizes.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// The output plot.
    #[arg(long, default_value = "cost.svg")]
    out: PathBuf,
    /// Only checks that everything runs: small sizes, two rounds.
    #[arg(long)]
    test: bool,
}

/// One operation at one size.
struct Point {
    size: f64,
    label: String,
    run: Box<dyn FnMut() -> Result<()>>,
    milliseconds: Vec<f64>,
}

/// The same operation at several sizes.
struct Curve {
    name: &'static str,
    points: Vec<Point>,
}

/// Curves in one panel.
struct Group {
    title: &'static str,
    x_title: &'static str,
    curves: Vec<Curve>,
}

const PRECISIONS: [(&str, Precision); 2] =
    [("float32", Precision::Float32), ("bfloat16", Precision::Bfloat16)];

fn point(size: f64, label: String, run: impl FnMut() -> Result<()> + 'static) -> Point {
    Point { size, label, run: Box::new(run), milliseconds: Vec::new() }
}

fn pass(batch: i64, side: i64, precision: Precision) -> Result<Passes> {
    Passes::new(&Workload { batch, side, ..Workload::fashion_mnist(precision, 0) })
}

/// A pass by one of its sizes, in both kinds.
fn passes(sizes: &[i64], of_size: impl Fn(i64) -> (f64, i64, i64)) -> Result<Vec<Curve>> {
    let curve = |(name, precision)| {
        let points = sizes.iter().map(|&size| {
            let (place, batch, side) = of_size(size);
            let passes = pass(batch, side, precision)?;
            Ok(point(place, size.to_string(), move || {
                drop(black_box(passes.pass()?));
                Ok(())
            }))
        });
        Ok(Curve { name, points: points.collect::<Result<_>>()? })
    };
    PRECISIONS.into_iter().map(curve).collect()
}

/// Four samples in the given number of DDIM steps.
fn sampling(steps: &[i64]) -> Result<Curve> {
    let points = steps.iter().map(|&n| {
        let passes = pass(4, 32, Precision::Float32)?;
        let timesteps = Timesteps::spaced(TimestepSpacing::Trailing, 1000, n as u32, 0)?;
        let (sampler, noise) =
            (Ddim::new(Workload::schedule()?), Tensor::randn([4, 1, 32, 32], kind::FLOAT_CPU));
        Ok(point(n as f64, n.to_string(), move || {
            let _no_grad = tch::no_grad_guard();
            let (network, conditioning) = (passes.network(), passes.conditioning());
            let noise = noise.shallow_clone();
            let rollout = Rollout::new(network, &sampler, &timesteps).conditioning(conditioning);
            drop(black_box(rollout.sample(noise)?));
            Ok(())
        }))
    });
    Ok(Curve { name: "float32", points: points.collect::<Result<_>>()? })
}

/// States of a batch, each at an index.
fn states(batch: usize) -> States {
    let x_t = Tensor::randn([batch as i64, 1, 32, 32], kind::FLOAT_CPU);
    let labels = Conditioning::class_labels(Tensor::zeros([batch as i64], kind::INT64_CPU));
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0).expect("it is valid");
    let states = States::new(x_t, &grid, vec![2; batch], Source::Student).expect("on the grid");
    states.with_conditioning(labels)
}

/// A batch of 64 into or out of a buffer of the given size.
fn buffer(sizes: &[i64], name: &'static str, inserts: bool) -> Result<Curve> {
    const BATCH: usize = 64;
    let points = sizes.iter().map(|&size| {
        let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
        let capacity = usize::try_from(size)?;
        let config = BufferConfig::default().with(|config| {
            config.storage = StorageKind::F16;
            config.capacity = capacity;
        });
        let mut buffer = AggregationBuffer::new(config, &grid)?;
        for _ in 0..=capacity / BATCH {
            buffer.insert(&states(BATCH))?;
        }
        let (batch, mut rng) = (states(BATCH), StdRng::seed_from_u64(0));
        Ok(point(size as f64, size.to_string(), move || {
            if inserts {
                buffer.insert(&batch)?;
            } else {
                drop(black_box(buffer.sample(&batch.grid_indices, 0, &mut rng)?));
            }
            Ok(())
        }))
    });
    Ok(Curve { name, points: points.collect::<Result<_>>()? })
}

fn powers_of_two(first: u32, last: u32) -> Vec<i64> {
    (first..=last).map(|power| 1 << power).collect()
}

fn groups(test: bool) -> Result<[Group; 4]> {
    let cut = |mut sizes: Vec<i64>| {
        sizes.truncate(if test { 2 } else { sizes.len() });
        sizes
    };
    let (batches, sides) = (cut(powers_of_two(0, 7)), cut(powers_of_two(4, 7)));
    let (steps, held) = (cut(powers_of_two(0, 6)), cut(powers_of_two(10, 17)));
    Ok([
        Group {
            title: "A pass by batch, ms",
            x_title: "samples of 32x32",
            curves: passes(&batches, |batch| (batch as f64, batch, 32))?,
        },
        Group {
            title: "A pass by resolution, ms",
            x_title: "side in pixels, batch 4",
            curves: passes(&sides, |side| ((side * side) as f64, 4, side))?,
        },
        Group {
            title: "Sampling by steps, ms",
            x_title: "steps of DDIM, batch 4",
            curves: vec![sampling(&steps)?],
        },
        Group {
            title: "64 states by buffer size, ms",
            x_title: "capacity in states, 1x32x32 in f16",
            curves: vec![buffer(&held, "insert", true)?, buffer(&held, "sample", false)?],
        },
    ])
}

impl Point {
    /// Enough calls for the resolution of the clock.
    fn time(&mut self, keep: bool) -> Result<()> {
        let (started, mut calls) = (Instant::now(), 0);
        while calls == 0 || (started.elapsed().as_millis() < 20 && calls < 1000) {
            (self.run)()?;
            calls += 1;
        }
        if keep {
            self.milliseconds.push(started.elapsed().as_secs_f64() * 1e3 / f64::from(calls));
        }
        Ok(())
    }

    fn median(&self) -> f64 {
        let mut sorted = self.milliseconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

impl Curve {
    /// Slope of the least-squares line through the logarithms of size and cost.
    fn exponent(&self) -> f64 {
        let place = |point: &Point| (point.size.ln(), point.median().ln());
        let places: Vec<(f64, f64)> = self.points.iter().map(place).collect();
        let n = places.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| places.iter().map(of).sum::<f64>() / n;
        let (mean_x, mean_y) = (mean(|place| place.0), mean(|place| place.1));
        let products = places.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>();
        products / places.iter().map(|(x, _)| (x - mean_x).powi(2)).sum::<f64>()
    }

    fn line(&self) -> Line {
        let place = |point: &Point| Some((point.size.log2(), Estimate::of(&point.milliseconds)?));
        Line {
            name: format!("{}, exponent {:.2}", self.name, self.exponent()),
            points: self.points.iter().filter_map(place).collect(),
        }
    }
}

impl Group {
    fn panel(&self) -> Panel {
        let marks = self.curves[0].points.iter();
        Panel {
            title: self.title.to_owned(),
            x_title: self.x_title,
            x_marks: marks.map(|point| (point.size.log2(), point.label.clone())).collect(),
            y_scale: Scale::Log,
            lines: self.curves.iter().map(Curve::line).collect(),
            levels: Vec::new(),
        }
    }

    fn print(&self) {
        println!("\n{} ({}):\n", self.title, self.x_title);
        let labels: Vec<&str> =
            self.curves[0].points.iter().map(|point| point.label.as_str()).collect();
        println!("| | {} | exponent |", labels.join(" | "));
        println!("|{}", " --- |".repeat(labels.len() + 2));
        for curve in &self.curves {
            let cells = curve.points.iter().map(|point| format!("{:.3}", point.median()));
            let cells = cells.collect::<Vec<_>>().join(" | ");
            println!("| {} | {cells} | {:.2} |", curve.name, curve.exponent());
        }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    tch::set_num_threads(options.threads);
    tch::manual_seed(0);
    ddil_libtorch::keep_freed_pages();
    let mut groups = groups(options.test)?;
    let rounds = if options.test { 2 } else { options.rounds };
    // The first round is a warm-up and is dropped.
    for round in 0..=rounds {
        let curves = groups.iter_mut().flat_map(|group| &mut group.curves);
        for point in curves.flat_map(|curve| &mut curve.points) {
            point.time(round > 0)?;
        }
    }
    println!("{} thread(s), medians of {rounds} rounds", options.threads);
    groups.iter().for_each(Group::print);
    let panels: Vec<Panel> = groups.iter().map(Group::panel).collect();
    std::fs::write(&options.out, draw(&panels)?)?;
    println!("\n{}", options.out.display());
    Ok(())
}
