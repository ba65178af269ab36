use std::path::PathBuf;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::{Result, Trainer};

/// Updates between two checkpoints.
const SAVE_INTERVAL: u64 = 200;
/// Updates between two lines on the terminal.
const REPORT_INTERVAL: u64 = 100;

/// What becomes of a stage of the training while it runs.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Where its checkpoints go, and where it goes on from if there is one; none keeps nothing.
    pub checkpoint: Option<PathBuf>,
    /// Whether it says on the terminal how far it is.
    pub report: bool,
}

impl Progress {
    /// Updates until the stage is done, and returns the mean loss of each update.
    ///
    /// Leaves the average in the networks.
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
