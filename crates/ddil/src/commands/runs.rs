//! `ddil runs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::print;
use crate::cli::RunsArgs;
use crate::report::metrics::shown;
use crate::report::page::{Moment, duration, size};
use crate::report::summary::{Summary, is_run, size_on_disk};
use crate::results::aligned;

pub(crate) fn run(args: &RunsArgs) -> anyhow::Result<ExitCode> {
    if !args.folder.is_dir() {
        bail!(
            "{} is not a folder; expected one that contains run folders, such as `runs`",
            args.folder.display()
        );
    }
    let mut found = Vec::new();
    find(&args.folder, DEPTH, &mut found)?;
    found.sort();
    let text = if args.json {
        let runs: Vec<Value> = found.iter().map(|path| as_json(path)).collect();
        serde_json::to_string_pretty(&runs)? + "\n"
    } else if found.is_empty() {
        format!("no runs in {}\n", args.folder.display())
    } else {
        let mut rows = vec![HEADS.map(str::to_owned).to_vec()];
        rows.extend(found.iter().map(|path| row(path, &args.folder)));
        aligned(&rows)
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Cells of a comparison are two levels below it.
const DEPTH: u32 = 3;

/// All run folders below a folder; those within a run are no runs. Links to folders are not followed.
fn find(folder: &Path, depth: u32, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    if is_run(folder) {
        found.push(folder.to_owned());
        return Ok(());
    }
    let entries =
        fs::read_dir(folder).with_context(|| format!("could not list {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("could not list {}", folder.display()))?;
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&entry.path(), depth - 1, found)?;
        }
    }
    Ok(())
}

const HEADS: [&str; 6] = ["run", "state", "updates", "last figures", "changed", "size"];

/// One line; of a run that cannot be read, the reason.
fn row(path: &Path, below: &Path) -> Vec<String> {
    let name = path.strip_prefix(below).ok().filter(|rest| !rest.as_os_str().is_empty());
    let name = name.unwrap_or(path).display().to_string();
    let bytes = size(size_on_disk(path));
    match Summary::read(path) {
        Ok(summary) => {
            let total = summary.total.map_or(String::new(), |total| format!("/{total}"));
            let updates = format!("{}{total}", summary.step);
            vec![
                name,
                summary.state.as_str().to_owned(),
                updates,
                figures(&summary),
                age(&summary),
                bytes,
            ]
        }
        Err(error) => {
            let rest = [String::new(), ddil_files::with_causes(&error), String::new(), bytes];
            [name, "unreadable".to_owned()].into_iter().chain(rest).collect()
        }
    }
}

/// Evaluations first, since they compare runs; at most three figures.
fn figures(summary: &Summary) -> String {
    let figures = summary.metrics.figures();
    let evaluations = figures.iter().filter(|figure| figure.name.starts_with("eval_"));
    let losses = figures.iter().filter(|figure| ["loss", "critic_loss"].contains(&figure.name));
    let last = |figure: &crate::report::metrics::Figure<'_>| {
        Some(format!("{} {}", figure.name, shown(figure.last()?.1)))
    };
    let shown: Vec<String> = evaluations.chain(losses).filter_map(last).take(3).collect();
    shown.join("  ")
}

fn age(summary: &Summary) -> String {
    let passed = summary.modified.and_then(|time| SystemTime::now().duration_since(time).ok());
    passed.map_or("-".to_owned(), |passed| format!("{} ago", duration(passed.as_secs_f64())))
}

fn as_json(path: &Path) -> Value {
    let bytes = size_on_disk(path);
    match Summary::read(path) {
        Ok(summary) => {
            let figures = summary.metrics.figures();
            let last = figures.iter().filter_map(|f| Some((f.name.to_owned(), json!(f.last()?.1))));
            json!({
                "path": path.display().to_string(),
                "state": summary.state.as_str(),
                "step": summary.step,
                "total": summary.total,
                "error": summary.error,
                "last": Value::Object(last.collect()),
                "seconds": summary.seconds(),
                "modified": summary.modified.map(|time| Moment::of(time).iso),
                "bytes": bytes,
            })
        }
        Err(error) => json!({
            "path": path.display().to_string(),
            "state": "unreadable",
            "error": ddil_files::with_causes(&error),
            "bytes": bytes,
        }),
    }
}
