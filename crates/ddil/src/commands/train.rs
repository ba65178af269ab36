//! `ddil train` and `ddil distill`.

use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use ddil_files::settings::{Settings, to_toml};
use ddil_trainer::config::{DataKind, DistillConfig, RunSection, TrainConfig};
use ddil_trainer::memory::MemoryPlan;
use ddil_trainer::run_folder::{RunFolder, is_in_use};
use ddil_trainer::{
    DistillTask, Interrupt, Logging, Outcome, Result, Session, SessionConfig, Task, TrainTask,
    when_stdin_closes,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{print, set_threads};
use crate::cli::{DistillArgs, RunArgs};
use crate::presets;
use crate::shell::quoted;

/// A config file of one of the two verbs.
trait Verb: Serialize + DeserializeOwned {
    type Task: Task;
    const NAME: &'static str;

    fn run_section(&self) -> &RunSection;
    fn session(&self) -> SessionConfig;
    fn task(&self, interrupt: &Interrupt) -> Result<Self::Task>;
    /// Checks that the task can be built, without writing anything.
    fn check(&self) -> Result<()>;
    /// The resources it will need, from settings alone; none for a verb without such a plan.
    fn plan(&self) -> Result<Option<MemoryPlan>>;
    /// The parts that [`check`](Self::check) examines.
    fn checked(&self) -> &'static str;
    fn num_updates(&self) -> u64;
    /// The teacher's folder, for a verb that has one.
    fn teacher(&self) -> Option<&Path> {
        None
    }
    /// The suggested next command for the run in `folder`.
    fn next(&self, folder: &Path) -> Vec<String>;
}

/// The verbs to run next with a model of pixels.
fn sample_and_evaluate(folder: &Path, data: DataKind) -> Vec<String> {
    let folder = quoted(folder);
    // Only Fashion-MNIST has a network of features of its own.
    let extractor =
        if data == DataKind::FashionMnist { "" } else { " --extractor inception-2015-12-05.pt" };
    vec![format!("ddil sample {folder}"), format!("ddil evaluate {folder}{extractor}")]
}

impl Verb for TrainConfig {
    type Task = TrainTask;
    const NAME: &'static str = "train";

    fn run_section(&self) -> &RunSection {
        &self.run
    }

    fn next(&self, folder: &Path) -> Vec<String> {
        sample_and_evaluate(folder, self.data.kind)
    }

    fn session(&self) -> SessionConfig {
        SessionConfig::from(self)
    }

    fn task(&self, interrupt: &Interrupt) -> Result<TrainTask> {
        TrainTask::interruptible(self, interrupt)
    }

    fn check(&self) -> Result<()> {
        TrainTask::check(self)
    }

    fn plan(&self) -> Result<Option<MemoryPlan>> {
        Ok(None)
    }

    fn checked(&self) -> &'static str {
        "all settings and the data"
    }

    fn num_updates(&self) -> u64 {
        self.train.updates
    }
}

impl Verb for DistillConfig {
    type Task = DistillTask;
    const NAME: &'static str = "distill";

    fn run_section(&self) -> &RunSection {
        &self.run
    }

    fn next(&self, folder: &Path) -> Vec<String> {
        if self.data.kind.is_text() {
            return vec![format!("ddil sample {} --prompt \"..\"", quoted(folder))];
        }
        sample_and_evaluate(folder, self.data.kind)
    }

    fn session(&self) -> SessionConfig {
        SessionConfig::from(self)
    }

    fn task(&self, interrupt: &Interrupt) -> Result<DistillTask> {
        DistillTask::interruptible(self, interrupt)
    }

    fn check(&self) -> Result<()> {
        DistillTask::check(self)
    }

    fn plan(&self) -> Result<Option<MemoryPlan>> {
        MemoryPlan::of(self).map(Some)
    }

    fn checked(&self) -> &'static str {
        "all settings, the data, the teacher's config, and the names and shapes of its weights (their values were not read)"
    }

    fn num_updates(&self) -> u64 {
        self.total_updates()
    }

    fn teacher(&self) -> Option<&Path> {
        Some(&self.teacher.path)
    }
}

pub(crate) fn train(args: &RunArgs) -> anyhow::Result<ExitCode> {
    run::<TrainConfig>(args, &[])
}

pub(crate) fn distill(args: &DistillArgs) -> anyhow::Result<ExitCode> {
    let changes: &[&str] = if args.plain { &presets::PLAIN } else { &[] };
    run::<DistillConfig>(&args.run, changes)
}

fn run<V: Verb>(args: &RunArgs, changes: &[&str]) -> anyhow::Result<ExitCode> {
    let logging = Logging::start("info")?;
    let interrupt = Interrupt::listen()?;
    if args.parent.stop_with_stdin {
        let interrupt = interrupt.clone();
        when_stdin_closes(move || interrupt.request());
    }
    let config: V = read_config(args, changes)?;
    if let Some(missing) = config.teacher().and_then(presets::missing_teacher) {
        bail!("{missing}");
    }
    set_threads(config.run_section().threads)?;
    config.run_section().apply_determinism()?;
    if args.dry_run {
        return dry_run(&config);
    }
    let mut session = match &args.resume {
        Some(path) => resume(&config, path, &logging, &interrupt)?,
        None if args.continues => start_or_resume(&config, &logging, &interrupt)?,
        None => start(&config, &logging, &interrupt)?,
    };
    tracing::info!("{} in {}", V::NAME, session.folder().path().display());
    let outcome = session.run(&interrupt).with_context(|| {
        format!(
            "the run stopped at step {}; its checkpoints are intact. To continue from the last one, run\n  ddil {} \
             --resume {}",
            session.step(),
            V::NAME,
            quoted(session.folder().path())
        )
    });
    // Also of a run that failed: its curves may show why.
    let page = crate::report::write_or_warn(session.folder().path());
    if let Some(page) = page {
        print(&format!("curves and samples: {}\n", page.display()))?;
    }
    print(&report(&outcome?, &config, session.folder().path()))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the plan of a run, then checks it: the plan is printed even if something is missing.
fn dry_run<V: Verb>(config: &V) -> anyhow::Result<ExitCode> {
    print(&to_toml(config)?)?;
    match config.plan() {
        Ok(Some(plan)) => print(&format!("\n# {}\n", plan.to_string().replace('\n', "\n# ")))?,
        Ok(None) => {}
        // If the plan fails, the check has the better error message.
        Err(error) => {
            config.check()?;
            return Err(error.into());
        }
    }
    config.check()?;
    print(&format!("\n# checked: {}\n", config.checked()))?;
    print(&format!("# {} updates; nothing was written\n", config.num_updates()))?;
    Ok(ExitCode::SUCCESS)
}

/// The config of the command line, or of the run to resume, which must then be the same.
fn read_config<V: Verb>(args: &RunArgs, changes: &[&str]) -> anyhow::Result<V> {
    let path = match (&args.config, &args.resume) {
        (Some(path), _) => path.clone(),
        (None, Some(folder)) => {
            if !folder.join("config.toml").is_file() {
                bail!("{} is not a run folder: it has no config.toml", folder.display());
            }
            folder.join("config.toml")
        }
        (None, None) => bail!("expected a config file, or --resume with a run folder"),
    };
    let mut settings = Settings::from_file(&path)?;
    // From the file alone: an override with a key of another verb is a wrong override.
    let verb_of_file = presets::verb_of(&settings);
    // Overrides of the command line come last and win.
    for text in changes.iter().copied().chain(args.overrides.iter().map(String::as_str)) {
        settings.set(text)?;
    }
    settings.build().map_err(|error| match verb_of_file {
        Some((verb, key)) if verb != V::NAME => {
            let path = quoted(&path);
            anyhow!(
                "{path} is a config for `ddil {verb}`: it has `{key}`; run `ddil {verb} {path}`"
            )
        }
        _ => error.into(),
    })
}

/// Starts a new run; an error in the task leaves no folder behind.
fn start<V: Verb>(
    config: &V,
    logging: &Logging,
    interrupt: &Interrupt,
) -> anyhow::Result<Session<V::Task>> {
    let task = config.task(interrupt)?;
    let folder = RunFolder::create(&config.run_section().path(), config)?;
    logging.also_to(&folder.file("run.log"))?;
    Ok(Session::start(task, config.session(), folder)?)
}

/// Starts the config's run, or resumes it if its folder exists.
fn start_or_resume<V: Verb>(
    config: &V,
    logging: &Logging,
    interrupt: &Interrupt,
) -> anyhow::Result<Session<V::Task>> {
    let path = config.run_section().path();
    if path.join("config.toml").is_file() {
        wait_until_released(&path, interrupt)?;
        resume(config, &path, logging, interrupt)
    } else {
        start(config, logging, interrupt)
    }
}

/// Waits for a process that is about to release the folder: one that is stopping and saves its run.
fn wait_until_released(path: &Path, interrupt: &Interrupt) -> anyhow::Result<()> {
    const MAX_WAIT: Duration = Duration::from_secs(60);
    const INTERVAL: Duration = Duration::from_millis(50);
    let started = Instant::now();
    while started.elapsed() < MAX_WAIT && !interrupt.is_requested() && is_in_use(path)? {
        sleep(INTERVAL);
    }
    Ok(())
}

fn resume<V: Verb>(
    config: &V,
    path: &Path,
    logging: &Logging,
    interrupt: &Interrupt,
) -> anyhow::Result<Session<V::Task>> {
    // An invalid config, data set or teacher leaves the run unchanged, as does a run with other settings.
    RunFolder::ensure_config_at(path, config)?;
    let task = config.task(interrupt)?;
    let folder = RunFolder::resume(path)?;
    logging.also_to(&folder.file("run.log"))?;
    Ok(Session::resume(task, config.session(), folder)?)
}

fn report<V: Verb>(outcome: &Outcome, config: &V, folder: &Path) -> String {
    match outcome {
        Outcome::Completed { export } => {
            let done = format!("done: the model is in {}\n", export.display());
            let next = config.next(folder);
            next.iter().fold(done, |text, command| text + "  " + command + "\n")
        }
        Outcome::Interrupted { step } => {
            let folder = quoted(folder);
            format!("saved at step {step}; continue with\n  ddil {} --resume {folder}\n", V::NAME)
        }
    }
}
