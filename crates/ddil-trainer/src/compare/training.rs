use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::config::DistillConfig;
use crate::distill::DistillTask;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::logging::Logging;
use crate::run_folder::RunFolder;
use crate::session::{Outcome, Session, SessionConfig};

/// How long a run may be in use by a process that was told to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// Distils as `ddil distill` does: starts the config's run, or goes on with it where its folder is there.
///
/// # Errors
///
/// What the config, the data or the teacher refuse; [`Error::OtherConfig`] if the folder is that of a run with other
/// settings; what stops the run.
pub fn distil(config: &DistillConfig, logging: &Logging, interrupt: &Interrupt) -> Result<Outcome> {
    config.run.apply_determinism()?;
    let path = config.run.path();
    let resumes = path.join("config.toml").is_file();
    if resumes {
        RunFolder::ensure_config_at(&path, config)?;
    }
    let task = DistillTask::new(config)?;
    let settings = SessionConfig::from(config);
    let mut session = if resumes {
        let folder = patiently(interrupt, || RunFolder::resume(&path))?;
        logging.also_to(&folder.file("run.log"))?;
        Session::resume(task, settings, folder)?
    } else {
        let folder = RunFolder::create(&path, config)?;
        logging.also_to(&folder.file("run.log"))?;
        Session::start(task, settings, folder)?
    };
    session.run(interrupt)
}

/// Waits for a process that is about to leave the folder.
fn patiently<T>(interrupt: &Interrupt, take: impl Fn() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match take() {
            Err(Error::FolderInUse { .. })
                if started.elapsed() < PATIENCE && !interrupt.is_requested() =>
            {
                sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}
