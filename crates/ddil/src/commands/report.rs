//! `ddil report`.

use std::process::ExitCode;

use ddil_trainer::{Interrupt, Logging};

use super::print;
use crate::cli::ReportArgs;
use crate::report;

pub(crate) fn run(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    let write = || report::write(&args.folder, args.output.as_deref());
    if !args.watch {
        print(&format!("{}\n", write()?.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    Logging::start("info")?;
    let interrupt = Interrupt::listen()?;
    let mut announced = false;
    let mut renew = || -> anyhow::Result<()> {
        let path = write()?;
        if !announced {
            print(&format!("{}\nrenewed while files change; Ctrl-C ends this\n", path.display()))?;
            announced = true;
        }
        Ok(())
    };
    if report::watch(&args.folder, &|| interrupt.is_requested(), &mut renew)? {
        print("the run has ended; the report is final\n")?;
    }
    Ok(ExitCode::SUCCESS)
}
