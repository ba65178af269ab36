//! `ddil compare`: runs many distillations and compares their results.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::compare::workers::{self, Event};
use crate::compare::{
    CellProgress, CellRecord, Comparison, ComparisonReport, End, Matrix, Outcome, PlanFile,
    PlannedCell, Program, WorkItem, Worker,
};
use crate::exit_code::TRY_AGAIN;
use anyhow::{Context, bail};
use ddil_files::settings::Settings;
use ddil_trainer::{Interrupt, Logging};

use super::print;
use crate::cli::CompareArgs;
use crate::presets;

pub(crate) fn run(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    let matrix = Matrix::from_file(&args.matrix)?;
    let base = read_base(&matrix, &args.matrix)?;
    if args.list {
        let cells = matrix.cells(&base)?;
        print(&cells.iter().fold(String::new(), |text, cell| text + &cell.name + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let comparison = Comparison::new(matrix, &base)?;
    if args.dry_run {
        print(&plan_text(&comparison)?)?;
        comparison.ensure_possible()?;
        return Ok(ExitCode::SUCCESS);
    }
    Logging::start("info")?;
    let interrupt = Interrupt::listen()?;
    match &args.cell {
        Some(name) => one_cell(&comparison, name, args.fresh, &interrupt),
        None => all_cells(&comparison, args.fresh, &interrupt),
    }
}

/// The config that a matrix starts from; `path` is where the matrix comes from.
pub(super) fn read_base(matrix: &Matrix, path: &Path) -> anyhow::Result<Settings> {
    match presets::find(&matrix.base) {
        Some(preset) if preset.verb == "distill" => {
            Ok(Settings::parse(format!("{}.toml", preset.name), preset.text)?)
        }
        Some(preset) => bail!(
            "{}: `base` is the preset `{}`, which is for `ddil {}`; expected a preset for `ddil distill`",
            path.display(),
            preset.name,
            preset.verb
        ),
        None => Settings::from_file(Path::new(&matrix.base)).with_context(|| {
            format!(
                "{}: `base` is `{}`, which is neither a preset nor a readable file",
                path.display(),
                matrix.base
            )
        }),
    }
}

/// The output of `--dry-run`.
fn plan_text(comparison: &Comparison) -> anyhow::Result<String> {
    let cells = comparison.progress()?;
    let width = cells.iter().map(|(planned, _)| planned.cell.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (planned, progress) in &cells {
        writeln!(text, "{:<width$}  {progress}", planned.cell.name)?;
    }
    let (all, teachers) = (cells.len(), comparison.teachers.len());
    let [draws, rows, cells] = comparison.stages()?.map(|items| items.len());
    writeln!(
        text,
        "\n{all} cells, {cells} to do; {teachers} teacher rows, {rows} to do after {draws} jobs; nothing was written"
    )?;
    Ok(text)
}

/// Runs what is left of a comparison, prints its tables and writes its page.
pub(super) fn all_cells(
    comparison: &Comparison,
    fresh: bool,
    interrupt: &Interrupt,
) -> anyhow::Result<ExitCode> {
    comparison.resolve_changes(&comparison.cells, fresh)?;
    comparison.ensure_possible()?;
    comparison.write_configs(&comparison.cells)?;
    PlanFile::write(comparison)?;
    let program = Program::current()?;
    let mut num_failed = 0;
    for stage in comparison.stages()? {
        let progress_log = StageProgress::new(comparison, stage.len());
        let on_event = |item: &WorkItem, event: Event| progress_log.log(item, &event);
        let ended = workers::run(stage, comparison, &program, interrupt, &on_event)?;
        let failed = |end: &End| matches!(end, End::Failed(_));
        num_failed += ended.iter().filter(|(_, end)| failed(end)).count();
        if let Some((item, End::Failed(message))) =
            ended.iter().find(|(item, end)| !item.is_cell() && failed(end))
        {
            bail!("{}: {message}", item.about());
        }
    }
    report(comparison, interrupt)?;
    Ok(if num_failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs one cell, drawing its teacher's samples if they are missing; the last cell to finish writes the tables.
fn one_cell(
    comparison: &Comparison,
    name: &str,
    fresh: bool,
    interrupt: &Interrupt,
) -> anyhow::Result<ExitCode> {
    let planned = comparison.cell(name)?;
    let cell = WorkItem::Cell(Box::new(planned.clone()));
    comparison.resolve_changes(std::slice::from_ref(planned), fresh)?;
    if comparison.is_done(&cell)? {
        print(&format!("{name}: {}\n", result(comparison, planned)))?;
        return Ok(ExitCode::SUCCESS);
    }
    comparison.write_configs(std::slice::from_ref(planned))?;
    PlanFile::write(comparison)?;
    let should_stop = || interrupt.is_requested();
    let worker = Worker { comparison, program: &Program::current()?, should_stop: &should_stop };
    if !draw_teacher_samples(&worker, planned)? {
        print(&format!("{name}: stopped before it started; run the same command to start it\n"))?;
        return Ok(ExitCode::from(TRY_AGAIN));
    }
    tracing::info!("{name}: started");
    match worker.perform(&cell)? {
        End::Done => print(&format!("{name}: {}\n", result(comparison, planned)))?,
        End::Stopped => {
            print(&format!("{name}: stopped and saved; run the same command to continue\n"))?;
            return Ok(ExitCode::from(TRY_AGAIN));
        }
        End::InUse(holder) => {
            eprintln!("error: {name}: {holder} is working on this cell; wait for it, or stop it");
            return Ok(ExitCode::from(TRY_AGAIN));
        }
        End::Failed(message) => {
            let log = cell.log(comparison.folder());
            bail!("{name}: {message}\n  full output: {}", log.display());
        }
    }
    if comparison.is_recorded()? {
        ComparisonReport::gather(comparison)?.write(comparison.folder())?;
        crate::report::write_or_warn(comparison.folder().path());
        let folder = comparison.folder().path().display();
        print(&format!(
            "that was the last cell: the tables are in {folder}; `ddil compare` adds the rows of the teachers\n"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Draws the samples of a cell's teacher, sharing the work with other processes that need them; false if stopped.
fn draw_teacher_samples(worker: &Worker<'_>, planned: &PlannedCell) -> anyhow::Result<bool> {
    const INTERVAL: Duration = Duration::from_millis(200);
    loop {
        let left = worker.comparison.needed_by(planned)?;
        if left.is_empty() {
            return Ok(true);
        }
        let mut drawn = false;
        for item in left {
            match worker.attempt(&item)? {
                End::Done => {
                    tracing::info!("{}: drawn", item.about());
                    drawn = true;
                }
                End::InUse(_) => {}
                End::Stopped => return Ok(false),
                End::Failed(message) => bail!("{}: {message}", item.about()),
            }
        }
        if (worker.should_stop)() {
            return Ok(false);
        }
        if !drawn {
            sleep(INTERVAL);
        }
    }
}

/// Logs the progress of the items of a stage, one line per event.
struct StageProgress<'a> {
    comparison: &'a Comparison,
    total: usize,
    ended: AtomicUsize,
    started: Instant,
}

impl<'a> StageProgress<'a> {
    fn new(comparison: &'a Comparison, total: usize) -> Self {
        Self { comparison, total, ended: 0.into(), started: Instant::now() }
    }

    fn log(&self, item: &WorkItem, event: &Event) {
        let Event::Ended(end, seconds) = event else {
            tracing::info!("{}: started", item.about());
            return;
        };
        let ended = 1 + self.ended.fetch_add(1, Ordering::Relaxed);
        let (about, total) = (item.about(), self.total);
        match end {
            End::Done => {
                let left =
                    self.started.elapsed().as_secs_f64() / ended as f64 * (total - ended) as f64;
                let left =
                    if ended < total { format!("; about {left:.0} s left") } else { String::new() };
                let result = match item {
                    WorkItem::Cell(planned) => result(self.comparison, planned),
                    _ => "done".to_owned(),
                };
                tracing::info!("{about}: {result} in {seconds:.0} s ({ended} of {total}{left})");
            }
            End::Stopped => tracing::info!("{about}: stopped and saved after {seconds:.0} s"),
            End::InUse(holder) => {
                tracing::info!("{about}: skipped, {holder} is working on it ({ended} of {total})");
            }
            End::Failed(message) => {
                let log = item.log(self.comparison.folder());
                tracing::error!("{about}: failed: {message} ({ended} of {total})");
                tracing::error!("{about}: full output: {}", log.display());
            }
        }
    }
}

/// A one-line summary of a cell's result.
fn result(comparison: &Comparison, planned: &PlannedCell) -> String {
    let record = comparison.record_of(planned).ok().flatten();
    match record.map(|CellRecord { outcome, .. }| outcome) {
        Some(Outcome::Diverged { message, .. }) => format!("diverged ({message})"),
        Some(Outcome::Done { rows }) => {
            let own = rows.iter().find(|row| row.own_steps);
            let scores = own.and_then(|row| row.measurement.as_ref()).map_or(String::new(), |m| {
                let coverage = m.coverage.map(|coverage| format!(", coverage {coverage:.3}"));
                let frechet = m.frechet.map(|frechet| format!(", frechet {frechet:.2}"));
                let cosine = m.clip_score.as_ref();
                let cosine = cosine.map(|score| format!(", clip cosine {:.4}", score.cosine.mean));
                [frechet, coverage, cosine].into_iter().flatten().collect()
            });
            let collapsed = rows.iter().any(|row| row.own_steps && row.collapsed.is_some());
            format!("done{scores}{}", if collapsed { ", collapsed" } else { "" })
        }
        _ => "done".to_owned(),
    }
}

/// The number of cells without a result.
fn num_open(comparison: &Comparison) -> anyhow::Result<usize> {
    let open = |progress: &CellProgress| {
        !matches!(progress, CellProgress::Done | CellProgress::Diverged(_))
    };
    Ok(comparison.progress()?.iter().filter(|(_, progress)| open(progress)).count())
}

/// Prints the tables on the terminal and writes all results to the folder.
fn report(comparison: &Comparison, interrupt: &Interrupt) -> anyhow::Result<()> {
    let report = ComparisonReport::gather(comparison)?;
    report.write(comparison.folder())?;
    print(&report.text())?;
    let left = num_open(comparison)?;
    let note = if interrupt.is_requested() {
        format!("\nstopped with {left} cells left; run the same command to continue\n")
    } else if left > 0 {
        format!("\n{left} cells have no result yet; run the same command to continue\n")
    } else {
        String::new()
    };
    let page = crate::report::write_or_warn(comparison.folder().path());
    let page = page.map_or(String::new(), |page| format!("  open {}\n", page.display()));
    let (folder, files) = (comparison.folder().path().display(), report.files().join(", "));
    print(&format!("{note}\n{folder}\n  {files}\n{page}"))
}
