//! Build script of every package here that links a program, test, bench or example (`build.rs` beside it is a
//! link to this file): writes the folder of the libtorch that torch-sys was built against into what it links.

// Visible to `crates/ddil-libtorch/build.rs`, which does this and more.
pub(crate) fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Absent in a documentation-only build.
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    if std::path::Path::new(&lib).join("libtorch_cuda.so").exists() {
        // Nothing in Rust refers to the CUDA library by name: without this the linker drops it, and a CUDA
        // build of libtorch would silently run on the CPU.
        println!("cargo:rustc-link-arg=-Wl,--push-state,--no-as-needed");
        println!("cargo:rustc-link-arg=-ltorch_cuda");
        println!("cargo:rustc-link-arg=-Wl,--pop-state");
    }
}
