//! Shared helpers.

mod trainer;

pub mod captions;
pub mod replay;
pub mod text_to_image;
pub mod vocabulary;

pub use ddil_core::Report;
pub use trainer::{Trainer, Training};

/// The result of an example, whose error is printed with its causes.
pub type Result<T> = std::result::Result<T, Report>;

/// Mean and its standard error.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}
