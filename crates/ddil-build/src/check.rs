//! Whether torch-sys will find a libtorch that it can use. Shared by the build script and the tests of this crate.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The only libtorch that tch 0.26 can be built against.
const VERSION: &str = "2.13.0";

const OPTIONS: &str = "\
Choose one:
- LIBTORCH=/absolute/path/to/libtorch, the folder that contains lib/ and include/
- LIBTORCH_USE_PYTORCH=1, while a Python environment with torch 2.13.0 is active (pip install torch==2.13.0)
- the feature `download-libtorch` of the ddil crate that you depend on
- in a checkout of ddil: `make setup`";

/// The features of this crate.
#[derive(Default)]
pub(crate) struct Features {
    pub(crate) doc_only: bool,
    pub(crate) download: bool,
}

type Variable<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Checks the places where torch-sys looks, in its order. The error states what was found and what to do.
pub(crate) fn libtorch(features: &Features, variable: Variable) -> Result<(), String> {
    if features.doc_only {
        return Ok(());
    }
    if variable("LIBTORCH_USE_PYTORCH").is_some() {
        return python(variable);
    }
    if let Some(folder) = variable("LIBTORCH") {
        return folder_of_user(Path::new(&folder), variable);
    }
    if features.download || Path::new("/usr/lib/libtorch.so").exists() {
        return Ok(());
    }
    Err(format!(
        "no libtorch {VERSION}: neither LIBTORCH nor LIBTORCH_USE_PYTORCH is set. {OPTIONS}"
    ))
}

/// Runs the interpreter that torch-sys will run. torch-sys compares versions itself.
fn python(variable: Variable) -> Result<(), String> {
    let interpreter = if variable("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    let program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)";
    match Command::new(interpreter).args(["-c", program]).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(format!(
            "LIBTORCH_USE_PYTORCH is set, but `{interpreter}` has no torch. Activate the environment that has it, or \
             run `{interpreter} -m pip install torch=={VERSION}`."
        )),
        Err(error) => Err(format!(
            "LIBTORCH_USE_PYTORCH is set, but `{interpreter}` could not be run: {error}. {OPTIONS}"
        )),
    }
}

fn folder_of_user(folder: &Path, variable: Variable) -> Result<(), String> {
    let shown = folder.display();
    if folder.is_relative() {
        return Err(format!(
            "LIBTORCH is `{shown}`, which is relative: every package would resolve it differently. Set an absolute path."
        ));
    }
    let beside = |name| variable(name).map_or(folder.to_owned(), PathBuf::from);
    let header = beside("LIBTORCH_INCLUDE").join("include/ATen/ATen.h");
    let library = beside("LIBTORCH_LIB").join("lib/libtorch_cpu.so");
    if !header.exists() {
        return Err(format!(
            "LIBTORCH is `{shown}`, but there is no {}. {OPTIONS}",
            header.display()
        ));
    }
    let shared = cfg!(target_os = "linux") && variable("LIBTORCH_STATIC").is_none();
    if shared && !library.exists() {
        return Err(format!(
            "LIBTORCH is `{shown}`, but there is no {}. {OPTIONS}",
            library.display()
        ));
    }
    ensure_version(folder, variable)
}

fn ensure_version(folder: &Path, variable: Variable) -> Result<(), String> {
    let Ok(version) = std::fs::read_to_string(folder.join("build-version")) else { return Ok(()) };
    let version = version.trim();
    let number = version.split('+').next().unwrap_or(version);
    if number == VERSION || variable("LIBTORCH_BYPASS_VERSION_CHECK").is_some() {
        return Ok(());
    }
    Err(format!(
        "LIBTORCH is `{}`, which contains libtorch {version}, but tch 0.26 requires {VERSION}. {OPTIONS}",
        folder.display()
    ))
}
