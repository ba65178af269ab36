//! `ddil compare`: many distillations, what they came to, and how far they differ.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use ddil_files::settings::Settings;
use ddil_trainer::compare::workers::{self, End, Event};
use ddil_trainer::compare::{CellRecord, Job, Matrix, Outcome, Plan, Report, Standing};
use ddil_trainer::interrupt::Interrupt;
use ddil_trainer::logging::Logging;
use ddil_trainer::run_folder::lock;

use super::say;
use crate::cli::CompareArgs;
use crate::presets;

pub(crate) fn run(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    let logging = Logging::start("info")?;
    let interrupt = Interrupt::listen()?;
    if args.worker {
        workers::serve(&logging, &interrupt)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(path) = &args.matrix else { bail!("expected the file of a comparison") };
    let plan = read_plan(path)?;
    if args.dry_run {
        say(&listed(&plan)?)?;
        plan.ensure_possible()?;
        return Ok(ExitCode::SUCCESS);
    }
    plan.folder().create()?;
    let _lock = lock(plan.folder().path())?;
    plan.settle_changes(args.fresh)?;
    plan.ensure_possible()?;
    plan.write_configs()?;
    let num_failed = work(&plan, &interrupt)?;
    report(&plan, &interrupt)?;
    Ok(if num_failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn read_plan(path: &Path) -> anyhow::Result<Plan> {
    let matrix = Matrix::read(path)?;
    let base = match presets::find(&matrix.base) {
        Some(preset) if preset.verb == "distill" => {
            Settings::parse(format!("{}.toml", preset.name), preset.text)?
        }
        Some(preset) => bail!(
            "{}: `base` is the preset `{}`, which is for `ddil {}`; expected one of `ddil distill`",
            path.display(),
            preset.name,
            preset.verb
        ),
        None => Settings::read(Path::new(&matrix.base)).with_context(|| {
            format!("{}: `base` is `{}`, neither a preset nor a file", path.display(), matrix.base)
        })?,
    };
    Ok(Plan::new(matrix, &base)?)
}

/// What `--dry-run` prints.
fn listed(plan: &Plan) -> anyhow::Result<String> {
    let standings = plan.standings()?;
    let width = standings.iter().map(|(planned, _)| planned.cell.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (planned, standing) in &standings {
        writeln!(text, "{:<width$}  {standing}", planned.cell.name)?;
    }
    let (all, teachers) = (standings.len(), plan.teachers.len());
    let [draws, rows, cells] = plan.stages()?.map(|jobs| jobs.len());
    writeln!(
        text,
        "\n{all} cells, {cells} to do; {teachers} rows of teachers, {rows} to do after {draws} jobs; nothing was written"
    )?;
    Ok(text)
}

/// Does what is left; returns how many jobs failed.
fn work(plan: &Plan, interrupt: &Interrupt) -> anyhow::Result<usize> {
    let mut num_failed = 0;
    for stage in plan.stages()? {
        let counted = Counted::new(stage.len());
        let on_event = |job: &Job, event: Event| counted.tell(job, &event);
        let ended = workers::run(stage, plan.matrix.workers, interrupt, &program, &on_event)?;
        let failed = |end: &End| matches!(end, End::Failed(_));
        num_failed += ended.iter().filter(|(_, end)| failed(end)).count();
        if let Some((job, End::Failed(message))) =
            ended.iter().find(|(job, end)| job.can_end_at_once() && failed(end))
        {
            bail!("{}: {message}", job.about());
        }
    }
    Ok(num_failed)
}

/// This program, asked for a job.
fn program() -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["compare", "--worker"]);
    Ok(command)
}

/// Counts the jobs of a stage, one line an event.
struct Counted {
    total: usize,
    ended: std::sync::atomic::AtomicUsize,
}

impl Counted {
    fn new(total: usize) -> Self {
        Self { total, ended: 0.into() }
    }

    fn tell(&self, job: &Job, event: &Event) {
        let Event::Ended(end, seconds) = event else {
            tracing::info!("{}: begun", job.about());
            return;
        };
        let ended = 1 + self.ended.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (about, total) = (job.about(), self.total);
        match end {
            End::Done => {
                let outcome = outcome(job);
                tracing::info!("{about}: {outcome} in {seconds:.0} s ({ended} of {total})");
            }
            End::Stopped => tracing::info!("{about}: stopped after {seconds:.0} s, saved"),
            End::Failed(message) => {
                tracing::error!("{about}: failed: {message} ({ended} of {total})");
                tracing::error!("{about}: what it said is in {}", job.log().display());
            }
        }
    }
}

/// What a cell came to, in a few words.
fn outcome(job: &Job) -> String {
    let record = job.cell_record().ok().flatten();
    match record.map(|CellRecord { outcome, .. }| outcome) {
        Some(Outcome::Diverged { message, .. }) => format!("diverged, {message},"),
        Some(Outcome::Done { rows }) => {
            let own = rows.iter().find(|row| row.own_steps);
            let scores = own.and_then(|row| row.measurement.as_ref()).map_or(String::new(), |m| {
                format!(", frechet {:.2}, coverage {:.3}", m.frechet, m.coverage)
            });
            let collapsed = rows.iter().any(|row| row.own_steps && row.collapsed.is_some());
            format!("done{scores}{}", if collapsed { ", collapsed" } else { "" })
        }
        _ => "done".to_owned(),
    }
}

/// Tables on the terminal, and everything in the folder.
fn report(plan: &Plan, interrupt: &Interrupt) -> anyhow::Result<()> {
    let report = Report::gather(plan)?;
    report.write(plan.folder())?;
    say(&report.text())?;
    let open = |standing: &Standing| !matches!(standing, Standing::Done | Standing::Diverged(_));
    let left = plan.standings()?.iter().filter(|(_, standing)| open(standing)).count();
    let stopped = if interrupt.is_requested() {
        format!("\nstopped; {left} cells are left, and the same command goes on from here\n")
    } else {
        String::new()
    };
    let (folder, files) = (plan.folder().path().display(), report.files().join(", "));
    say(&format!("{stopped}\n{folder}\n  {files}\n"))
}
