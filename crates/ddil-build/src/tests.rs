use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use crate::check::{Features, libtorch};
use crate::instructions;

/// What the check says in an environment of these variables alone.
fn checked(features: &Features, variables: &[(&str, &str)]) -> Result<(), String> {
    libtorch(features, &|name| {
        variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
    })
}

/// A folder that looks like a libtorch, removed at the end.
struct Libtorch(PathBuf);

impl Libtorch {
    fn new(name: &str, version: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("ddil-build-{}-{name}", std::process::id()));
        for (file, text) in
            [("include/ATen/ATen.h", ""), ("lib/libtorch_cpu.so", ""), ("build-version", version)]
        {
            let path = folder.join(file);
            fs::create_dir_all(path.parent().expect("it is in the folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        Self(folder)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("the name is ASCII")
    }
}

impl Drop for Libtorch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn assert_refused(outcome: Result<(), String>, phrases: &[&str]) {
    let problem = outcome.expect_err("there is no usable libtorch");
    for phrase in phrases {
        assert!(problem.contains(phrase), "{phrase:?} is not in {problem:?}");
    }
}

#[test]
fn nothing_set_lists_the_options() {
    if std::path::Path::new("/usr/lib/libtorch.so").exists() {
        return;
    }
    let outcome = checked(&Features::default(), &[]);
    assert_refused(
        outcome,
        &["LIBTORCH=", "LIBTORCH_USE_PYTORCH=1", "download-libtorch", "make setup"],
    );
}

#[test]
fn features_need_no_libtorch() {
    assert_eq!(checked(&Features { doc_only: true, download: false }, &[]), Ok(()));
    assert_eq!(checked(&Features { doc_only: false, download: true }, &[]), Ok(()));
}

#[test]
fn a_folder_of_the_user_is_examined() {
    let good = Libtorch::new("good", "2.13.0+cpu\n");
    let none = Features::default();
    assert_eq!(checked(&none, &[("LIBTORCH", good.path())]), Ok(()));
    assert_refused(checked(&none, &[("LIBTORCH", "libtorch")]), &["`libtorch`", "relative"]);
    let missing = [("LIBTORCH", "/nonexistent")];
    assert_refused(checked(&none, &missing), &["/nonexistent/include/ATen/ATen.h", "make setup"]);
    // A folder that is set is not replaced by a download: torch-sys takes it.
    let download = Features { doc_only: false, download: true };
    assert_refused(checked(&download, &missing), &["/nonexistent"]);
}

#[test]
fn another_version_is_refused_unless_the_check_is_off() {
    let old = Libtorch::new("old", "2.12.1+cu130\n");
    let none = Features::default();
    assert_refused(checked(&none, &[("LIBTORCH", old.path())]), &["2.12.1+cu130", "2.13.0"]);
    let bypassed = [("LIBTORCH", old.path()), ("LIBTORCH_BYPASS_VERSION_CHECK", "1")];
    assert_eq!(checked(&none, &bypassed), Ok(()));
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_without_the_library_is_refused() {
    let bare = Libtorch::new("bare", "2.13.0");
    fs::remove_file(bare.0.join("lib/libtorch_cpu.so")).expect("it is there");
    let set = [("LIBTORCH", bare.path())];
    assert_refused(checked(&Features::default(), &set), &["lib/libtorch_cpu.so"]);
    let elsewhere = Libtorch::new("elsewhere", "2.13.0");
    let set = [("LIBTORCH", bare.path()), ("LIBTORCH_LIB", elsewhere.path())];
    assert_eq!(checked(&Features::default(), &set), Ok(()));
}

fn directives(variables: &[(&str, &str)], links: bool) -> Vec<String> {
    let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
    instructions(variables, links)
}

#[test]
fn the_folder_becomes_a_run_path() {
    let expected = ["cargo::rustc-link-arg=-Wl,-rpath,/x/lib".to_owned()];
    for name in ["DEP_TCH_LIBTORCH_LIB", "DEP_DDIL_LIBTORCH_LIB", "DEP_DDIL_SCHEDULERS_LIB"] {
        assert_eq!(directives(&[("PATH", "/bin"), (name, "/x/lib")], false), expected);
    }
    let passed_on = directives(&[("DEP_TCH_LIBTORCH_LIB", "/x/lib")], true);
    assert_eq!(passed_on[1], "cargo::metadata=lib=/x/lib");
}

#[test]
fn cuda_is_kept_where_it_is() {
    let libtorch = Libtorch::new("cuda", "2.13.0+cu130");
    let lib = libtorch.0.join("lib");
    fs::write(lib.join("libtorch_cuda.so"), "").expect("a file");
    let lines = directives(&[("DEP_TCH_LIBTORCH_LIB", lib.to_str().expect("ASCII"))], false);
    assert!(lines.contains(&"cargo::rustc-link-arg=-ltorch_cuda".to_owned()), "{lines:?}");
}

#[test]
#[should_panic(expected = "under [dependencies]")]
fn a_package_without_a_dependency_on_ddil_is_refused() {
    directives(&[("PATH", "/bin")], false);
}
