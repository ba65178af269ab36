//! `ddil doctor`.

use std::process::ExitCode;

use crate::doctor::Doctor;

use super::print;
use crate::cli::DoctorArgs;

pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let folders = vec!["runs".into(), std::env::temp_dir()];
    let report = Doctor { folders, verify_datasets: true }.examine()?;
    let text =
        if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.to_string() };
    print(&text)?;
    Ok(if report.is_broken() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
