//! Shared parts of the benchmarks: the training loop of `ddil distill`, and process statistics.

pub mod free;
pub mod process;
pub mod training;

/// Registers a font for criterion's plots.
///
/// Another package of the workspace selects the font reader of plotters that does not use system fonts; without a
/// registered one, criterion panics after its first measurement.
///
/// # Panics
///
/// If the font is damaged.
pub fn register_fonts() {
    use plotters::style::{FontStyle, register_font};
    let registered = register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
    assert!(registered.is_ok(), "the font is damaged");
}
