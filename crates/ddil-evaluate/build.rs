//! Programs of this package find libtorch, and its dependents learn where it is.

fn main() {
    ddil_build::link();
}
