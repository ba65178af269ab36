//! Sampling rate of a buffer that has spilled to disk, compared with merely reading the same pages.
//!
//! `cargo run --release --workspace --example buffer_on_disk -- FOLDER` fills 4 GiB of latents (4x64x64, half precision)
//! into files in `FOLDER` and draws batches of 64 from them; `--gibibytes 0.25 --rounds 3` is a quick run, and more
//! than the available memory measures the disk instead of the page cache. For comparison, the same number of rows of
//! the same files is read in two ways without further work: copied out of a mapping into one tensor, and by the
//! system's `read`. Rounds alternate; the output contains medians of the ratios per round, with the smallest and the
//! largest.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use ddil_core::{AggregationBuffer, BufferConfig, Source, SpillConfig, States};
use ddil_libtorch::{RowFile, gather_rows};
use ddil_schedulers::{TimestepSpacing, Timesteps};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor, kind};

type Failure = ddil_core::Report;

const SHAPE: [i64; 4] = [64, 4, 64, 64];
const BATCH: usize = SHAPE[0] as usize;
const ROW_BYTES: usize = (SHAPE[1] * SHAPE[2] * SHAPE[3] * 2) as usize;
/// Size of a file's header.
const HEAD_BYTES: usize = 4096;
/// States in memory, close to none.
const IN_MEMORY: u64 = 64 << 20;

#[derive(Parser)]
struct Args {
    /// Where files may be written; they are removed at the end.
    folder: PathBuf,
    /// Size of all of them.
    #[arg(long, default_value_t = 4.0)]
    gibibytes: f64,
    /// Timed rounds; each covers all states, but at most 64,000.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Threads of libtorch.
    #[arg(long, default_value_t = 1)]
    threads: i32,
}

/// The files of a buffer, read by hand.
struct Pages {
    mapped: Vec<RowFile>,
    files: Vec<File>,
    rows_a_file: usize,
    out: Tensor,
    bytes: Vec<u8>,
}

impl Pages {
    fn open(folder: &Path) -> Result<Self, Failure> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            paths.push(entry?.path());
        }
        let len = std::fs::metadata(paths.first().ok_or("no state was spilled")?)?.len() as usize;
        let rows_a_file = (len - HEAD_BYTES) / ROW_BYTES;
        let mapped: Result<Vec<_>, _> = paths
            .iter()
            .map(|path| RowFile::open(path, HEAD_BYTES, ROW_BYTES, rows_a_file))
            .collect();
        let files: Result<Vec<_>, _> = paths.iter().map(File::open).collect();
        let out = Tensor::zeros(SHAPE, (Kind::Half, Device::Cpu));
        Ok(Self { mapped: mapped?, files: files?, rows_a_file, out, bytes: vec![0; ROW_BYTES] })
    }

    fn draw(&self, rng: &mut StdRng) -> Vec<(usize, usize)> {
        let row =
            |_| (rng.random_range(0..self.files.len()), rng.random_range(0..self.rows_a_file));
        (0..BATCH).map(row).collect()
    }

    fn copy(&mut self, rows: &[(usize, usize)]) -> Result<(), Failure> {
        let picks = rows.iter().enumerate();
        let picks = picks.map(|(to, &(file, row))| (&self.mapped[file], row, to));
        gather_rows(&mut self.out, 0, picks)?;
        Ok(())
    }

    fn read(&mut self, rows: &[(usize, usize)]) -> Result<(), Failure> {
        for &(file, row) in rows {
            let offset = (HEAD_BYTES + row * ROW_BYTES) as u64;
            self.files[file].read_exact_at(&mut self.bytes, offset)?;
            black_box(&self.bytes);
        }
        Ok(())
    }
}

fn grid_indices() -> Vec<usize> {
    (0..BATCH).map(|row| 1 + row % 3).collect()
}

fn filled(folder: &Path, gibibytes: f64) -> Result<AggregationBuffer, Failure> {
    let byte_budget = (gibibytes * f64::from(1 << 30)) as u64;
    let spill = SpillConfig::new(folder, byte_budget);
    let config = BufferConfig::default().with(|config| {
        config.capacity = usize::MAX;
        config.byte_budget = IN_MEMORY;
        config.spill = Some(spill);
    });
    let grid = Timesteps::spaced(TimestepSpacing::Trailing, 1000, 4, 0)?;
    let mut buffer = AggregationBuffer::new(config, &grid)?;
    let x_t = Tensor::randn(SHAPE, kind::FLOAT_CPU);
    let states = States::new(x_t, &grid, grid_indices(), Source::Student)?;
    let started = Instant::now();
    let mut inserted = 0;
    while inserted == 0 || buffer.len() == inserted {
        buffer.insert(&states)?;
        inserted += BATCH;
    }
    let (statistics, seconds) = (buffer.statistics(0), started.elapsed().as_secs_f64());
    println!(
        "{} states, {:.2} GiB in files and {} MiB in memory; {:.1} us to insert one",
        statistics.len,
        statistics.spilled_bytes as f64 / f64::from(1 << 30),
        statistics.bytes >> 20,
        seconds / inserted as f64 * 1e6
    );
    Ok(buffer)
}

/// Microseconds per state.
fn timed(batches: usize, mut batch: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    let started = Instant::now();
    for _ in 0..batches {
        batch()?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / (batches * BATCH) as f64)
}

fn report(name: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[0], values[values.len() - 1]);
    println!("{name:<58} {:6.2} ({low:.2}-{high:.2})", values[values.len() / 2]);
}

fn main() -> Result<(), Failure> {
    let args = Args::parse();
    tch::set_num_threads(args.threads);
    ddil_libtorch::keep_freed_pages();
    let folder = args.folder.join("buffer_on_disk");
    let mut buffer = filled(&folder, args.gibibytes)?;
    let mut pages = Pages::open(&folder)?;
    let (indices, mut rng) = (grid_indices(), StdRng::seed_from_u64(0));
    let batches = (buffer.len() / BATCH).min(1000);
    let mut times = [vec![], vec![], vec![]];
    // The first round touches the pages for the first time.
    for round in 0..=args.rounds {
        let rows: Vec<_> = (0..batches).map(|_| pages.draw(&mut rng)).collect();
        let sampled = timed(batches, || {
            drop(black_box(buffer.sample(&indices, 0, &mut rng)?));
            Ok(())
        })?;
        let (mut copied, mut read) = (rows.iter(), rows.iter());
        let copied = timed(batches, || copied.next().map_or(Ok(()), |rows| pages.copy(rows)))?;
        let read = timed(batches, || read.next().map_or(Ok(()), |rows| pages.read(rows)))?;
        if round > 0 {
            times.iter_mut().zip([sampled, copied, read]).for_each(|(all, one)| all.push(one));
        }
    }
    let [sampled, copied, read] = times;
    let ratio = |other: &[f64]| other.iter().zip(&sampled).map(|(o, s)| o / s).collect();
    report("share of the throughput of copying from mapped pages", ratio(&copied));
    report("share of the throughput of the system's read", ratio(&read));
    report("microseconds per sampled state", sampled);
    report("microseconds per state copied from mapped pages", copied);
    report("microseconds per state read", read);
    drop(buffer);
    std::fs::remove_dir(&folder)?;
    Ok(())
}
