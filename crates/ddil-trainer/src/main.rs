//! The program ddil.
fn main() {}
