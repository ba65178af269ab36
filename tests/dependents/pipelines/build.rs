//! Programs of this package find libtorch.

fn main() {
    ddil_build::link();
}
