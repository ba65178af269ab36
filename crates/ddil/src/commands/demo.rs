//! `ddil demo`: a comparison that shows what DDIL is for.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::Instant;

use crate::compare::{Comparison, Matrix};
use anyhow::{Context, bail, ensure};
use ddil_files::settings::{Settings, parse_assignment};
use ddil_trainer::{Interrupt, Logging};

use super::compare::{all_cells, read_base};
use super::print;
use crate::cli::DemoArgs;
use crate::presets;

const PRESET: &str = "compare-demo";

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    ensure!(args.num_samples >= 20, "--num-samples is {}; expected at least 20", args.num_samples);
    if let Some(missing) = presets::missing_teacher(&args.teacher) {
        bail!("{missing}");
    }
    let matrix = matrix(args)?;
    let base = read_base(&matrix, Path::new(PRESET))?;
    let comparison = Comparison::new(matrix, &base)?;
    Logging::start("info")?;
    let interrupt = Interrupt::listen()?;
    if args.fresh && args.folder.exists() {
        fs::remove_dir_all(&args.folder)
            .with_context(|| format!("could not remove {}", args.folder.display()))?;
    }
    print(ABOUT)?;
    let started = Instant::now();
    let exit_code = all_cells(&comparison, false, &interrupt)?;
    if exit_code == ExitCode::SUCCESS && !interrupt.is_requested() {
        print(&after(&args.folder, started.elapsed().as_secs_f64()))?;
    }
    Ok(exit_code)
}

/// The preset with the options of the command line.
fn matrix(args: &DemoArgs) -> anyhow::Result<Matrix> {
    let preset = presets::find(PRESET).context("the preset of the demonstration")?;
    let mut matrix =
        Matrix::from_settings(&Settings::parse(format!("{PRESET}.toml"), preset.text)?)?;
    let name = args.folder.file_name().and_then(|name| name.to_str());
    name.with_context(|| {
        format!("--folder is {}; expected a path that ends with a name", args.folder.display())
    })?
    .clone_into(&mut matrix.name);
    args.folder.parent().unwrap_or(Path::new("")).clone_into(&mut matrix.folder);
    let in_folder = || format!("--folder is {}", args.folder.display());
    let mut matrix = matrix.checked().with_context(in_folder)?;
    matrix.workers =
        available_parallelism().map_or(1, |cores| cores.get().min(MOST_WORKERS)) as u32;
    matrix.evaluate.samples = args.num_samples;
    matrix.evaluate.shift_samples = args.num_samples.saturating_mul(2);
    let teacher = args.teacher.display().to_string();
    matrix.set.insert("teacher.path".to_owned(), teacher.into());
    for text in &args.overrides {
        let (key, value) = parse_assignment(text)?;
        matrix.set.insert(key.join("."), value);
    }
    Ok(matrix.checked()?)
}

/// As many as there are students.
const MOST_WORKERS: usize = 6;

const ABOUT: &str = "
A Fashion-MNIST teacher of ten classes is distilled to 4 steps by progressive distillation, six times: with images of
all classes and with images of trousers alone, on noised data, on the teacher's trajectories, and on the mixture of DDIL.

";

fn after(folder: &Path, seconds: f64) -> String {
    let run = folder.join("cells/trousers_DDIL_seed0");
    let run = crate::shell::quoted(&run);
    format!(
        "
`to teacher` is the Fréchet distance to the guided teacher's samples in 50 steps, which the students imitate, over all ten
classes. `all-classes` is the control: the data contain every class that is sampled. With `trousers` nine classes are
missing, and trajectories of the teacher and of the student are their only states.

in {seconds:.0} s; one seed

Next:
  ddil sample {run} --num-samples 100
  ddil init compare-demo             # the comparison as a file
  ddil init fashion-mnist-pd-ddil    # a config of one student
"
    )
}
