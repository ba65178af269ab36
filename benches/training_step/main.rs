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

mod table;

use clap::Parser;
use ddil_benches::training::{Arm, Method, Result, Way, Workload, precision};
use ddil_trainer::config::Precision;

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

fn main() -> Result<()> {
    let options = Options::parse();
    let test = options.test || !options.bench;
    // More would wait for each other longer than they work on a tiny network.
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
