//! CLIP against what transformers answered, and its refusals.

mod config;
mod score;
mod text;
mod tokenizer;
mod vision;

use std::collections::BTreeMap;

use ddil_models::weights;
use tch::Tensor;

use crate::common::golden;

/// Relative to the largest value, in `Float`.
const TOLERANCE: f64 = 1e-5;

fn expected(name: &str) -> ddil_models::Result<BTreeMap<String, Tensor>> {
    weights::read_all(golden(name).join("expected.safetensors"))
}
