//! Every method on states of every origin, in two dimensions: five settings, over seeds.
//!
//! The teacher is the exact denoiser of a mixture of Gaussians, so every error of a student is the student's own.
//! For each setting and method, a small network is distilled from the same start on
//!
//! - `forward`: noised data, which is the method without imitation learning;
//! - `mix`: half of them, half states of the student's own trajectories, which is DDIL;
//! - `student`, `teacher`: states of the student's or the teacher's trajectories alone;
//!
//! each without and with thresholding, where teacher, rollouts, target and critic, and sampling are all clipped to a
//! box just around the data. A cell is one such run. Finished cells are lines of `<out>/cells.jsonl`; a stopped run
//! continues where it stopped, and cells with other budgets than the current ones are run again. At the end,
//! `<out>/table.md` and images are written.
//!
//! Run with `cargo run --release --example toy_matrix -- [options]`:
//!
//! - `--setting`, `--method`, `--source`, `--threshold` (`off`, `on`): some of the cells, separated by commas; all
//!   by default
//! - `--seeds 5`: how many, or `--seeds 3..8`: which
//! - `--workers 2`: threads; one per processor by default
//! - `--out runs/toy_matrix`: the folder
//! - `--updates 500`, `--lr 1e-3`, `--critic-lr 1e-3`, `--start-updates 500`, `--start-lr 1e-3`: other budgets than
//!   the method's, for all arms; use a separate folder
//! - `--dmd2 timestep,up-to-state`: DMD2's critic models the samples of each of the student's steps separately; DMD2
//!   compares with the teacher at most as noisy as the state; neither by default, as published; use a separate folder
//! - `--report`: only the report, without runs
//! - `--smoke`: a few updates of everything, as a check; of the other options, only `--out` has an effect

mod cell;
mod distil;
mod lab;
mod measure;
mod options;
mod picture;
mod report;
mod store;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, thread};

use ddil_examples::Result;

use crate::cell::{Arm, Cell};
use crate::measure::{Bench, Starts};
use crate::options::Options;
use crate::store::Store;

fn main() -> Result<()> {
    let start = Instant::now();
    let options = Options::parse(env::args().skip(1))?;
    // Tensors are so small that threads within an operation would mostly wait for each other.
    tch::set_num_threads(1);
    let store = Store::open(&options.out)?;
    if !options.report {
        run(&options, &store)?;
    }
    report::write(&options, &store)?;
    println!("{}, {:.0} s", options.out.display(), start.elapsed().as_secs_f64());
    Ok(())
}

/// Runs the missing cells; the arms of a setting, method and seed together.
fn run(options: &Options, store: &Store) -> Result<()> {
    let groups = options.groups();
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let error = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..options.workers {
            scope.spawn(|| {
                let mut starts = Starts::default();
                while !failed.load(Ordering::Relaxed) {
                    let Some(arms) = groups.get(next.fetch_add(1, Ordering::Relaxed)) else {
                        return;
                    };
                    if let Err(e) = run_group(options, store, arms, &mut starts) {
                        failed.store(true, Ordering::Relaxed);
                        *error.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(e);
                    }
                }
            });
        }
    });
    match error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn run_group(options: &Options, store: &Store, arms: &[Cell], starts: &mut Starts) -> Result<()> {
    let budget = options.budget(arms[0].method);
    let hash = budget.hash()?;
    let arms: Vec<Cell> = arms.iter().copied().filter(|c| !store.has(*c, &hash)).collect();
    let Some(&first) = arms.first() else { return Ok(()) };
    let bench = Bench::new(first, &budget)?;
    if first.seed == options.first_seed() {
        store.put_points(&measure::points_name(first, true), &bench.reference_points())?;
    }
    for cell in arms {
        let begun = Instant::now();
        let (record, points) = bench.run(cell, &budget, starts)?;
        if cell.seed == options.first_seed() {
            store.put_points(&measure::points_name(cell, false), &points)?;
        }
        println!(
            "{} {} {} {} seed {}: {:.2} in 4 steps, x 1000; {:.1} s",
            cell.setting.name(),
            cell.method.name(),
            Arm::name(cell.arm),
            if cell.thresholded { "threshold" } else { "no threshold" },
            cell.seed,
            record.distances[2].unwrap_or(f64::NAN) * 1e3,
            begun.elapsed().as_secs_f64(),
        );
        store.put(record)?;
    }
    Ok(())
}
