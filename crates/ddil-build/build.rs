//! Fails early, with what to do, where torch-sys would fail late. This script depends on nothing, so it is among the
//! first jobs of every build.

#[path = "src/check.rs"]
mod check;

/// The environment variables that decide.
const VARIABLES: [&str; 7] = [
    "LIBTORCH",
    "LIBTORCH_USE_PYTORCH",
    "LIBTORCH_INCLUDE",
    "LIBTORCH_LIB",
    "LIBTORCH_STATIC",
    "LIBTORCH_BYPASS_VERSION_CHECK",
    "VIRTUAL_ENV",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/check.rs");
    for name in VARIABLES {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let features = check::Features {
        doc_only: cfg!(feature = "doc-only"),
        download: cfg!(feature = "download-libtorch"),
    };
    if let Err(problem) = check::libtorch(&features, &|name| std::env::var_os(name)) {
        for line in problem.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}
