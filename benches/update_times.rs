//! Times passes and updates of a small U-Net of pixels, and the optimizer alone, on demand, for
//! `benches/peers/bench_peers.py`; also writes updates to files for it to reproduce.
//!
//! `update_times --threads N forward|update|optimizer ..` initialises, prints a line of JSON with its resident memory
//! (`resident_kib`), and reads lines from standard input. Each is a round, answered by a line with the seconds of one
//! pass or update and the peak memory since initialisation (`seconds`, `peak_kib`). So the caller can alternate rounds
//! with other programs'.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Parser, Subcommand};
use ddil_benches::process::{forget_peak, peak_kib, resident_kib, wait_for};
use ddil_benches::training::{
    Method, Optimization, Passes, Result, Role, TrainingLoop, Update, Variant, Workload, precision,
};
use ddil_core::{Conditioning, Data, States, Stream};
use ddil_models::weights;
use ddil_trainer::config::{Precision, parse_device};
use serde_json::{Value, json};
use tch::{Device, Tensor};

/// Answers each line of its input with a measurement.
#[derive(Debug, Parser)]
struct Options {
    /// Threads of libtorch.
    #[arg(long)]
    threads: i32,
    /// `cpu`, `cuda` or `cuda:<index>`.
    #[arg(long, default_value = "cpu")]
    device: String,
    #[command(subcommand)]
    case: Case,
}

#[derive(Debug, Subcommand)]
enum Case {
    /// Passes without gradients.
    Forward {
        #[command(flatten)]
        options: NetworkOptions,
        /// Passes of a round.
        #[arg(long, default_value_t = 1)]
        repeats: u32,
    },
    /// Updates of a method on noised data, without DDIL.
    Update {
        method: Method,
        #[command(flatten)]
        options: NetworkOptions,
    },
    /// Clipping, `AdamW` and moving average of 10 million parameters in 200 tensors.
    Optimizer {
        /// Whether gradients are above the limit each time.
        #[arg(long)]
        clipped: bool,
    },
    /// Writes updates of a method into a folder: weights before and after, states, draws, losses, passes.
    Record {
        method: Method,
        #[command(flatten)]
        options: NetworkOptions,
        /// Where to.
        #[arg(long)]
        folder: PathBuf,
        /// The teacher's weights.
        #[arg(long)]
        weights: PathBuf,
        /// How many.
        #[arg(long, default_value_t = 6)]
        updates: u64,
    },
}

/// The batch and precision of a network.
#[derive(Debug, Args)]
struct NetworkOptions {
    #[arg(long)]
    batch: i64,
    /// `float32`, or `bfloat16` by autocast.
    #[arg(long, default_value = "float32", value_parser = precision)]
    precision: Precision,
}

impl NetworkOptions {
    fn workload(&self, device: Device) -> Workload {
        Workload { batch: self.batch, device, ..Workload::fashion_mnist(self.precision, 0) }
    }
}

/// Updates of a method: a whole cycle of DMD2, a single one of the others.
struct Updates {
    training: TrainingLoop,
    step: u64,
    turn: u64,
}

impl Updates {
    fn new(method: Method, workload: &Workload) -> Result<Self> {
        let training = TrainingLoop::new(Variant::forward(method), workload)?;
        let turn = if method == Method::Dmd2 { 5 } else { 1 };
        Ok(Self { training, step: 0, turn })
    }

    fn round(&mut self) -> Result<f64> {
        self.training.begin_round();
        for _ in 0..self.turn {
            self.training.update(self.step)?;
            self.step += 1;
        }
        let wall = self.training.rounds.last().map(|round| round.wall).unwrap_or_default();
        Ok(wall.as_secs_f64() / self.turn as f64)
    }
}

/// Seconds of an update; restoring gradients is not counted.
fn mean_seconds(optimization: &mut Optimization, device: Device) -> Result<f64> {
    const UPDATES: u32 = 10;
    let mut seconds = 0.0;
    for _ in 0..UPDATES {
        optimization.refill();
        wait_for(device);
        let started = Instant::now();
        optimization.update()?;
        wait_for(device);
        seconds += started.elapsed().as_secs_f64();
    }
    Ok(seconds / f64::from(UPDATES))
}

/// Initialised when this returns; each call is a round.
fn prepared(case: Case, device: Device) -> Result<Box<dyn FnMut() -> Result<f64>>> {
    Ok(match case {
        Case::Forward { options, repeats } => {
            let passes = Passes::new(&options.workload(device))?;
            Box::new(move || {
                let started = Instant::now();
                (0..repeats)
                    .try_for_each(|_| passes.pass().map(|respond| drop(black_box(respond))))?;
                wait_for(device);
                Ok(started.elapsed().as_secs_f64() / f64::from(repeats))
            })
        }
        Case::Update { method, options } => {
            let mut updates = Updates::new(method, &options.workload(device))?;
            Box::new(move || updates.round())
        }
        Case::Optimizer { clipped } => {
            let mut optimization = Optimization::new(clipped, device)?;
            Box::new(move || mean_seconds(&mut optimization, device))
        }
        Case::Record { .. } => return Err("records are not timed".into()),
    })
}

fn respond(line: &Value) -> Result<()> {
    println!("{line}");
    Ok(std::io::stdout().flush()?)
}

fn serve(case: Case, device: Device) -> Result<()> {
    let mut round = prepared(case, device)?;
    // Otherwise the peak would be that of loading.
    let forgotten = forget_peak();
    respond(&json!({ "resident_kib": resident_kib() }))?;
    for line in std::io::stdin().lines() {
        line?;
        let seconds = round()?;
        let peak = forgotten.then(peak_kib).flatten();
        respond(&json!({ "seconds": seconds, "peak_kib": peak }))?;
    }
    Ok(())
}

/// A method that starts from a teacher's weights, and the record of its updates.
struct Record<'a> {
    training: TrainingLoop,
    folder: &'a Path,
    updates: Vec<Value>,
}

impl Record<'_> {
    fn save(&self, moment: &str) -> Result<()> {
        let folder = self.folder.join(moment);
        std::fs::create_dir_all(&folder)?;
        self.training.save(&folder)
    }

    fn update(&mut self, step: u64) -> Result<()> {
        let Update { states, real, losses } = self.training.update(step)?;
        let path = self.folder.join(format!("update_{step}.safetensors"));
        weights::save(&tensors(&states, &real)?, path, &BTreeMap::new())?;
        let seed = |stream| self.training.streams().seed_of(step, stream);
        self.updates.push(json!({
            "losses": losses,
            "student_seed": seed(Stream::StudentLoss),
            "critic_seed": seed(Stream::CriticLoss),
        }));
        Ok(())
    }

    /// Samples that passed through each network, and the number of those with gradients.
    fn passes(&self) -> Value {
        let roles = [
            ("student", Role::Student),
            ("teacher", Role::Teacher),
            ("target", Role::Target),
            ("critic", Role::Critic),
            ("discriminator", Role::Discriminator),
        ];
        let tally = |role| self.training.meters.of(role);
        let count = |(name, role)| (name, json!([tally(role).passes, tally(role).backward]));
        roles.into_iter().map(count).map(|(name, count)| (name.to_owned(), count)).collect()
    }
}

/// The inputs of an update.
fn tensors(states: &States, real: &Data) -> Result<Vec<(String, Tensor)>> {
    let labels = |conditioning: &Conditioning| {
        let labels = conditioning.get(Conditioning::CLASS_LABELS).map(Tensor::shallow_clone);
        labels.ok_or("samples have classes")
    };
    let named = [
        ("x_t", states.x_t.shallow_clone()),
        ("timesteps", states.timesteps.shallow_clone()),
        ("labels", labels(&states.conditioning)?),
        ("real_x0", real.x0.shallow_clone()),
        ("real_labels", labels(&real.conditioning)?),
    ];
    Ok(named.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect())
}

fn record(method: Method, workload: &Workload, folder: &Path, updates: u64) -> Result<()> {
    let training = TrainingLoop::new(Variant::forward(method), workload)?;
    let mut record = Record { training, folder, updates: Vec::new() };
    record.save("before")?;
    for step in 0..updates {
        record.update(step)?;
    }
    record.save("after")?;
    let whole = json!({
        "method": method.name(),
        "precision": workload.precision,
        "learning_rate": workload.learning_rate,
        "updates": record.updates,
        "passes": record.passes(),
    });
    Ok(std::fs::write(folder.join("record.json"), whole.to_string())?)
}

fn main() -> Result<()> {
    let Options { threads, device, case } = Options::parse();
    let device = parse_device(&device)?;
    tch::set_num_threads(threads);
    tch::manual_seed(0);
    ddil_libtorch::keep_freed_pages();
    match case {
        Case::Record { method, options, folder, weights, updates } => {
            let workload = Workload { weights: Some(weights), ..options.workload(device) };
            record(method, &workload, &folder, updates)
        }
        case => serve(case, device),
    }
}
