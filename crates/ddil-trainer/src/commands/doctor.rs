//! `ddil doctor`.

use std::process::ExitCode;

use ddil_trainer::doctor::Doctor;

use crate::cli::DoctorArgs;

pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let report = Doctor::default().examine()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(if report.is_broken() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
