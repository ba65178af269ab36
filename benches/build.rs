//! Links the programs of this package to libtorch.

fn main() {
    ddil_build::link();
}
