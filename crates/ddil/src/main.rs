//! The program `ddil`.

#![forbid(unsafe_code)]

mod cli;
mod commands;
mod presets;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use ddil::exit_code::NOT_FINITE;
use ddil_trainer::Error;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.command) {
        Ok(code) => code,
        Err(error) => {
            // The error and its causes, each on its own line; if it cannot be printed, the exit code still reports it.
            let mut stderr = std::io::stderr();
            let _ = writeln!(stderr, "error: {error}");
            for cause in error.chain().skip(1) {
                let _ = writeln!(stderr, "  because {cause}");
            }
            exit_code(&error)
        }
    }
}

/// NaN or infinite numbers have their own exit code; such samples cannot be written as images.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    let is_not_finite = |cause: &(dyn std::error::Error + 'static)| {
        let of_run = matches!(
            cause.downcast_ref(),
            Some(Error::NonFinite { .. } | Error::Pipelines(ddil_pipelines::Error::Image { .. }))
        );
        of_run || matches!(cause.downcast_ref(), Some(ddil_pipelines::Error::Image { .. }))
    };
    if error.chain().any(is_not_finite) { ExitCode::from(NOT_FINITE) } else { ExitCode::FAILURE }
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
        Command::Range(args) => commands::range::run(args),
        Command::Demo(args) => commands::demo::run(args),
        Command::Compare(args) => commands::compare::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
    }
}
