//! What one update costs: each method plain and with DDIL, by how the student's states are come by.
//!
//! `cargo bench --workspace --bench training_step` prints the tables of `docs/PERFORMANCE.md`. After `--` may stand
//! `--method pd`, `lcm` or `dmd2` (more than once; all without), `--precision bfloat16`, `--rounds` and `--threads`.
//! Not criterion's: the ways of a method take turns, update by update, so that all meet the same machine; a ratio is
//! the median over rounds of five updates each.
//!
//! The loop is that of `ddil distill` between two lines of its record, on the network of
//! `assets/fashion-mnist-teacher` with random weights and random data. Mixers are filled beforehand by a network that
//! costs nothing.

mod arm;
mod meter;
mod table;
mod way;

use clap::Parser;
use ddil_models::{DownBlockType, Model, Placement, SampleSize, UNet2DConfig, UpBlockType};
use ddil_schedulers::{BetaSchedule, NoiseSchedule, NoiseScheduleConfig, PredictionType, VpConfig};
use ddil_trainer::config::Precision;
use ddil_trainer::network::Network;

use crate::arm::Arm;
use crate::way::{Method, Way};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Times updates of the three methods.
#[derive(Debug, Parser)]
struct Options {
    /// Which methods; all without.
    #[arg(long, value_enum)]
    method: Vec<Method>,
    /// `float32` or `bfloat16`.
    #[arg(long, default_value = "float32", value_parser = precision)]
    precision: Precision,
    /// Rounds of five updates of each way.
    #[arg(long, default_value_t = 6)]
    rounds: u64,
    /// Threads of libtorch; 0 is one a core.
    #[arg(long, default_value_t = 0)]
    threads: i32,
    /// Only sees that everything runs: one round of a tiny network.
    #[arg(long)]
    test: bool,
    /// What `cargo bench` says; without it this is a test, as criterion has it.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What an update is of.
struct Workload {
    batch: i64,
    side: i64,
    unet: UNet2DConfig,
    precision: Precision,
    /// Updates of the mixer alone, before anything is timed; a multiple of 5.
    filling: u64,
    /// Trajectories in the teacher's pool, so few that they are all there after the filling.
    pool: usize,
    rounds: u64,
    /// Updates of a round: a whole turn of DMD2, which trains its student in one of five.
    updates: u64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let test = options.test || !options.bench;
    // More would wait for each other longer than they work on a tiny network.
    let threads = if test { 1 } else { options.threads };
    if threads > 0 {
        tch::set_num_threads(threads);
    }
    ddil_libtorch::keep_freed_pages();
    let workload = if test { Workload::tiny() } else { Workload::of(&options) };
    table::print_setting(&workload);
    let methods = if options.method.is_empty() { Method::ALL.to_vec() } else { options.method };
    let measured: Result<Vec<Vec<Arm>>> =
        methods.into_iter().map(|method| measure(method, &workload)).collect();
    table::print(&measured?, &workload);
    Ok(())
}

/// All ways of a method, in turn.
fn measure(method: Method, workload: &Workload) -> Result<Vec<Arm>> {
    let arms: Result<Vec<Arm>> =
        Way::all(method).into_iter().map(|way| Arm::new(way, workload)).collect();
    let mut arms = arms?;
    for arm in &mut arms {
        arm.fill(workload.filling)?;
    }
    // One more round at the start, which is not kept.
    for round in 0..=workload.rounds {
        arms.iter_mut().for_each(Arm::begin_round);
        let first = workload.filling + round * workload.updates;
        for step in first..first + workload.updates {
            // Another one is first each time, so that none always follows the same.
            let turn = step as usize % arms.len();
            arms.rotate_left(turn);
            for arm in &mut arms {
                arm.update(step)?;
            }
            arms.rotate_right(turn);
        }
        if round == 0 {
            arms.iter_mut().for_each(Arm::forget_rounds);
        }
    }
    Ok(arms)
}

impl Workload {
    fn of(options: &Options) -> Self {
        Self {
            batch: 32,
            side: 32,
            unet: fashion_mnist(),
            precision: options.precision,
            filling: 300,
            pool: 32,
            rounds: options.rounds,
            updates: 5,
        }
    }

    fn tiny() -> Self {
        let unet = UNet2DConfig {
            sample_size: Some(SampleSize::Square(8)),
            block_out_channels: vec![8],
            attention_head_dim: Some(8),
            down_block_types: vec![DownBlockType::DownBlock2D],
            up_block_types: vec![UpBlockType::UpBlock2D],
            ..fashion_mnist()
        };
        let (precision, pool) = (Precision::Float32, 2);
        Self { batch: 4, side: 8, unet, precision, filling: 5, pool, rounds: 1, updates: 1 }
    }

    fn schedule() -> Result<NoiseSchedule> {
        let config = VpConfig {
            beta_schedule: BetaSchedule::Linear,
            beta_start: 1e-4,
            beta_end: 0.02,
            ..VpConfig::default()
        };
        Ok(NoiseScheduleConfig::Vp(config).build()?)
    }

    /// A teacher with random weights.
    fn teacher(&self) -> Result<Network> {
        let placement = Placement { channels_last: true, ..Placement::default() };
        let unet = self.unet.build(placement, 0)?;
        unet.parameters().set_trainable(false);
        let output = PredictionType::VPrediction;
        Ok(Network::new(Model::UNet2D(unet), output, Self::schedule()?, self.precision))
    }
}

/// The network of `assets/fashion-mnist-teacher`.
fn fashion_mnist() -> UNet2DConfig {
    use DownBlockType::{AttnDownBlock2D, DownBlock2D};
    use UpBlockType::{AttnUpBlock2D, UpBlock2D};
    UNet2DConfig {
        sample_size: Some(SampleSize::Square(32)),
        in_channels: 1,
        out_channels: 1,
        block_out_channels: vec![16, 32, 64, 96],
        layers_per_block: 1,
        norm_num_groups: 8,
        attention_head_dim: Some(32),
        down_block_types: vec![DownBlock2D, DownBlock2D, AttnDownBlock2D, DownBlock2D],
        up_block_types: vec![UpBlock2D, AttnUpBlock2D, UpBlock2D, UpBlock2D],
        num_class_embeds: Some(11),
        ..UNet2DConfig::default()
    }
}

fn precision(name: &str) -> std::result::Result<Precision, String> {
    match name {
        "float32" => Ok(Precision::Float32),
        "bfloat16" => Ok(Precision::Bfloat16),
        _ => Err("expected float32 or bfloat16".to_owned()),
    }
}
