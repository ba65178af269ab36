//! `ddil init`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::print;
use crate::cli::InitArgs;
use crate::presets::{PRESETS, TEACHERS, find, nearest};
use crate::shell::quoted;

pub(crate) fn run(args: &InitArgs) -> anyhow::Result<ExitCode> {
    let Some(name) = &args.preset else {
        let lines = PRESETS.iter().map(|preset| {
            format!("  {:<24} for `ddil {}`: {}\n", preset.name, preset.verb, preset.about)
        });
        print(
            &("Presets (write one with `ddil init <preset>`):\n".to_owned()
                + &lines.collect::<String>()),
        )?;
        return Ok(ExitCode::SUCCESS);
    };
    let Some(preset) = find(name) else {
        match nearest(name) {
            Some(nearest) => bail!("there is no preset `{name}`; did you mean `{nearest}`?"),
            None => bail!("there is no preset `{name}`; `ddil init` lists all presets"),
        }
    };
    let text = if args.plain {
        preset.plain().with_context(|| {
            format!(
                "--plain applies to presets for `ddil distill`; `{name}` is for `ddil {}`",
                preset.verb
            )
        })?
    } else {
        preset.text.to_owned()
    };
    let path = args.output.clone().unwrap_or_else(|| format!("{name}.toml").into());
    let mut file =
        OpenOptions::new().write(true).create_new(true).open(&path).with_context(|| {
            format!("could not create {}; an existing file is not overwritten", path.display())
        })?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("could not write {}", path.display()))?;
    let (path, verb) = (quoted(&path), preset.verb);
    print(&format!("wrote {path}; next:\n  ddil {verb} {path}\n"))?;
    let missing =
        TEACHERS.iter().find(|(teacher, _)| text.contains(teacher) && !Path::new(teacher).exists());
    if let Some((teacher, how)) = missing {
        print(&format!("its teacher, {teacher}, does not exist: {how}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}
