//! One call for the build script of a program that uses ddil.
//!
//! Cargo does not pass the run path of a library on to the programs that link it. Without it they end at once with
//! `libtorch_cpu.so: cannot open shared object file`. A build script adds it:
//!
//! ```toml
//! [dependencies]
//! ddil-schedulers = "0.1"
//!
//! [build-dependencies]
//! ddil-build = "0.1"
//! ```
//!
//! ```no_run
//! // `main` of build.rs
//! ddil_build::link();
//! ```
//!
//! Every package with a program, test, benchmark or example requires this. It has to depend on at least one crate of
//! ddil (or on torch-sys) itself, not only through another package: cargo tells the folder of libtorch to direct
//! dependents alone.
//!
//! # Without libtorch
//!
//! Every crate of ddil depends on this one, and the build script of this one stops the build early where torch-sys would
//! not find libtorch. Its error lists the ways to provide one. Crates that depend on tch and not on ddil do not get this
//! check.
//!
//! # Features
//!
//! The crates of ddil pass them on; do not set them here.
//!
//! | feature | effect |
//! | --- | --- |
//! | `download-libtorch` | accepts that there is no libtorch: torch-sys downloads the CPU build of it |
//! | `doc-only` | builds documentation without libtorch; nothing can be linked |

#![forbid(unsafe_code)]

#[cfg(test)]
mod check;
#[cfg(test)]
mod tests;

use std::path::Path;

/// Adds libtorch's folder to the run path of everything that the package links, and keeps the CUDA library if there is one.
///
/// To be called in a build script. In a package with the manifest key `links` it also passes the folder on to direct
/// dependents, as `lib`, which is what this function reads there.
///
/// In a build with the feature `doc-only` it does nothing.
///
/// # Panics
///
/// If the package does not depend on ddil or torch-sys directly: cargo fails the build and prints the message.
pub fn link() {
    println!("cargo::rerun-if-changed=build.rs");
    if cfg!(feature = "doc-only") {
        return;
    }
    for line in instructions(std::env::vars(), std::env::var_os("CARGO_MANIFEST_LINKS").is_some()) {
        println!("{line}");
    }
}

fn instructions(variables: impl Iterator<Item = (String, String)>, links: bool) -> Vec<String> {
    let folder = variables
        .filter(|(name, _)| is_libtorch_folder(name))
        .map(|(_, folder)| folder)
        .next()
        .expect(
            "no dependency of this package provides the folder of libtorch: `ddil_build::link()` requires that the package \
             depends on a crate of ddil (or on torch-sys) itself, under [dependencies]",
        );
    let mut lines = vec![format!("cargo::rustc-link-arg=-Wl,-rpath,{folder}")];
    if Path::new(&folder).join("libtorch_cuda.so").exists() {
        // Nothing in Rust refers to the CUDA library by name: without this the linker drops it, and a CUDA build of
        // libtorch would silently run on the CPU.
        for argument in ["-Wl,--push-state,--no-as-needed", "-ltorch_cuda", "-Wl,--pop-state"] {
            lines.push(format!("cargo::rustc-link-arg={argument}"));
        }
    }
    if links {
        lines.push(format!("cargo::metadata=lib={folder}"));
    }
    lines
}

/// Variables that cargo sets from the metadata of torch-sys, and of crates that call [`link`].
fn is_libtorch_folder(name: &str) -> bool {
    name == "DEP_TCH_LIBTORCH_LIB" || (name.starts_with("DEP_DDIL_") && name.ends_with("_LIB"))
}
