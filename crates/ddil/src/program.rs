//! The program: from its arguments to its exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::commands;
use crate::error::{Error, is_not_finite};
use crate::exit_code::NOT_FINITE;

/// Runs the program `ddil` with the arguments of this process.
///
/// Prints to the standard output and error, and returns the exit code: 0 for success, 1 for an error, 2 for a wrong
/// command line, 3 for NaN or infinite numbers, 75 for work that is not finished.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.command) {
        Ok(code) => code,
        Err(error) => {
            // The error and its causes, each on its own line; if it cannot be printed, the exit code still reports it.
            let mut stderr = std::io::stderr();
            let causes = ddil_files::causes(error.as_ref());
            let _ = writeln!(stderr, "error: {}", causes.first().map_or("", String::as_str));
            for cause in causes.iter().skip(1) {
                let _ = writeln!(stderr, "  because {cause}");
            }
            exit_code(&error)
        }
    }
}

/// NaN or infinite numbers have their own exit code.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    let of_cause = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref().is_some_and(Error::is_not_finite)
            || cause.downcast_ref().is_some_and(is_not_finite)
            || matches!(cause.downcast_ref(), Some(ddil_pipelines::Error::Image { .. }))
    };
    if error.chain().any(of_cause) { ExitCode::from(NOT_FINITE) } else { ExitCode::FAILURE }
}

fn run(command: &Command) -> anyhow::Result<ExitCode> {
    // Before libtorch allocates anything: pages freed by temporaries are kept and reused.
    ddil_libtorch::keep_freed_pages();
    // When other work competes for the processors, libtorch's threads would otherwise spin for each other.
    ddil_libtorch::adapt_thread_waiting();
    match command {
        Command::Init(args) => commands::init::run(args),
        Command::Train(args) => commands::train::train(args),
        Command::Distill(args) => commands::train::distill(args),
        Command::Sample(args) => commands::sample::run(args),
        Command::Evaluate(args) => commands::evaluate::run(args),
        Command::Export(args) => commands::export::run(args),
        Command::Import(args) => commands::import::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Report(args) => commands::report::run(args),
        Command::Runs(args) => commands::runs::run(args),
        Command::Range(args) => commands::range::run(args),
        Command::Demo(args) => commands::demo::run(args),
        Command::Compare(args) => commands::compare::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
    }
}
