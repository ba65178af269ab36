//! The cost of one update: each method plain and with DDIL, by student policy.
//!
//! `cargo bench --workspace --bench training_step` prints the tables of `docs/PERFORMANCE.md`. Options follow `--`:
//! `--method pd`, `lcm` or `dmd2` (repeatable; all by default), `--precision bfloat16`, `--rounds` and `--threads`.
//! It does not use criterion: the variants of a method alternate, update by update, under the same load of the machine;
//! a ratio is the median over rounds of five updates each.
//!
//! The loop is that of `ddil distill` between two lines of its log, on the network of
//! `assets/fashion-mnist-teacher` with random weights and random data. Mixers are filled in advance by a network that
//! costs nothing.

mod table;

use clap::Parser;
use ddil_benches::training::{Method, Result, TrainingLoop, Variant, Workload, precision};
use ddil_models::Precision;

/// Times updates of the three methods.
#[derive(Debug, Parser)]
struct Options {
    /// The methods; the default is all.
    #[arg(long, value_enum)]
    method: Vec<Method>,
    /// The precision: `float32` or `bfloat16`.
    #[arg(long, default_value = "float32", value_parser = precision)]
    precision: Precision,
    /// Rounds of five updates of each variant.
    #[arg(long, default_value_t = 6)]
    rounds: u64,
    /// Number of libtorch threads; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    threads: i32,
    /// Only checks that everything runs: one round of a tiny network.
    #[arg(long)]
    test: bool,
    /// Set by `cargo bench`; without it this is a test, as with criterion.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let test = options.test || !options.bench;
    // On a tiny network, more threads would mostly wait for each other.
    let threads = if test { 1 } else { options.threads };
    if threads > 0 {
        tch::set_num_threads(threads);
    }
    ddil_libtorch::keep_freed_pages();
    let workload = if test {
        Workload::tiny()
    } else {
        Workload::fashion_mnist(options.precision, options.rounds)
    };
    table::print_setting(&workload);
    let methods = if options.method.is_empty() { Method::ALL.to_vec() } else { options.method };
    let measured: Result<Vec<Vec<TrainingLoop>>> =
        methods.into_iter().map(|method| measure(method, &workload)).collect();
    table::print(&measured?, &workload);
    Ok(())
}

/// All variants of a method, alternating.
fn measure(method: Method, workload: &Workload) -> Result<Vec<TrainingLoop>> {
    let loops: Result<Vec<TrainingLoop>> = Variant::all(method)
        .into_iter()
        .map(|variant| TrainingLoop::new(variant, workload))
        .collect();
    let mut loops = loops?;
    for training in &mut loops {
        training.fill(workload.filling)?;
    }
    // The first round is a warm-up and is dropped.
    for round in 0..=workload.rounds {
        loops.iter_mut().for_each(TrainingLoop::begin_round);
        let first = workload.filling + round * workload.updates;
        for step in first..first + workload.updates {
            // The first one rotates, so that none always follows the same.
            let turn = step as usize % loops.len();
            loops.rotate_left(turn);
            for training in &mut loops {
                training.update(step)?;
            }
            loops.rotate_right(turn);
        }
        if round == 0 {
            loops.iter_mut().for_each(TrainingLoop::clear_rounds);
        }
    }
    Ok(loops)
}
