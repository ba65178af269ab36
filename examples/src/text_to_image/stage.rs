use std::path::PathBuf;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::{Result, Trainer};

/// Updates between two checkpoints.
const SAVE_INTERVAL: u64 = 200;
/// Updates between two lines of output.
const REPORT_INTERVAL: u64 = 100;

/// How a stage of the training saves and reports its progress.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Checkpoint file, from which it resumes if it exists; without one nothing is saved.
    pub checkpoint: Option<PathBuf>,
    /// Whether to print the progress.
    pub report: bool,
}

impl Progress {
    /// Trains until the stage is done, and returns the mean loss of each update.
    ///
    /// Afterwards the networks contain the average.
    pub(super) fn run(
        &self,
        what: &str,
        mut trainer: Trainer,
        updates: u64,
        mut per_sample: impl FnMut(u64) -> Result<Tensor>,
    ) -> Result<Vec<f64>> {
        let found = self.checkpoint.as_ref().filter(|path| path.is_file());
        if let Some(path) = found {
            trainer.resume(path)?;
        }
        let (start, first) = (Instant::now(), trainer.num_updates());
        let mut losses = Vec::new();
        for step in first..updates {
            let loss = per_sample(step)?;
            if !trainer.update(&loss)? {
                return Err(format!("{what}: diverged at update {step}").into());
            }
            losses.push(loss.mean(Kind::Float).double_value(&[]));
            let done = step + 1;
            if self.report && (done % REPORT_INTERVAL == 0 || done == updates) {
                report(what, [first, done, updates], &losses, start.elapsed());
            }
            if let Some(path) = &self.checkpoint
                && (done % SAVE_INTERVAL == 0 || done == updates)
            {
                trainer.save(path)?;
            }
        }
        trainer.finish()?;
        Ok(losses)
    }
}

fn report(what: &str, [first, done, updates]: [u64; 3], losses: &[f64], spent: Duration) {
    let recent = &losses[losses.len().saturating_sub(REPORT_INTERVAL as usize)..];
    let loss = recent.iter().sum::<f64>() / recent.len().max(1) as f64;
    let rate = (done - first) as f64 / spent.as_secs_f64();
    println!("{what}: update {done} of {updates}, loss {loss:.4}, {rate:.2} updates/s");
}
