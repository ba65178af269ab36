//! Compiles the C++ shim against the libtorch that torch-sys was built against.

use std::env;
use std::path::PathBuf;

const SOURCES: [&str; 13] = [
    "autocast",
    "elementwise",
    "error",
    "generator",
    "group_norm",
    "group_norm_cpu",
    "group_norm_kernels",
    "kernels",
    "list",
    "normal",
    "normal_kernels",
    "recompute",
    "runtime",
];

fn main() {
    ddil_build::link();
    println!("cargo::rerun-if-changed=cpp");
    for name in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI", "DDIL_SANITIZE"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    // Absent in a documentation-only build, which links nothing.
    let Some(lib) = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from) else { return };
    compile(&include_folder(&lib.join("..")));
}

/// Headers lie beside the libraries unless the user says otherwise, as torch-sys has it.
fn include_folder(libtorch: &std::path::Path) -> PathBuf {
    env::var_os("LIBTORCH_INCLUDE").map_or(libtorch.to_owned(), PathBuf::from).join("include")
}

fn compile(include: &std::path::Path) {
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").pic(true).warnings(true).extra_warnings(true);
    // Warnings are for our own lines.
    for folder in [include.to_owned(), include.join("torch/csrc/api/include")] {
        build.flag("-isystem").flag(folder);
    }
    build.define("_GLIBCXX_USE_CXX11_ABI", abi.as_str());
    // One result on every processor: a fused multiply-add rounds once where two instructions round twice.
    build.flag_if_supported("-ffp-contract=off");
    // A square root that has to set errno is a call, which no loop with it survives.
    build.flag_if_supported("-fno-math-errno");
    // A debug build of the program should not run the loops of the shim unvectorised.
    build.opt_level(3).debug(false);
    sanitize(&mut build);
    build.files(SOURCES.map(|name| format!("cpp/{name}.cpp"))).compile("ddil_shim");
}

/// With `DDIL_SANITIZE=address` every access of the shim to memory is checked, see `make sanitize`.
fn sanitize(build: &mut cc::Build) {
    let Some(sanitizer) = env::var("DDIL_SANITIZE").ok().filter(|name| !name.is_empty()) else {
        return;
    };
    build.flag(format!("-fsanitize={sanitizer}")).flag("-fno-omit-frame-pointer").debug(true);
    // The loops that the loader chooses between are chosen before the sanitizer is there.
    build.define("DDIL_ONE_CLONE", None);
    if sanitizer == "address" {
        println!("cargo::rustc-link-lib=dylib=asan");
    }
}
