//! What several modules need.

use std::path::PathBuf;

use tch::Tensor;

pub(crate) type TestResult = Result<(), Box<dyn std::error::Error>>;

/// Every recorded network for pixels.
pub(crate) const GOLDEN: [&str; 6] = [
    "unet_unconditional",
    "unet_class_labels",
    "unet_fourier_scale_shift",
    "unet_timestep_classes",
    "unet_identity_classes",
    "unet_guidance",
];

/// Every recorded network that is told a text.
pub(crate) const CONDITION_GOLDEN: [&str; 7] = [
    "unet_condition_sd15",
    "unet_condition_sd21",
    "unet_condition_sdxl",
    "unet_condition_ssd1b",
    "unet_condition_lcm",
    "unet_condition_text",
    "unet_condition_classes",
];

/// A folder that `tools/record_unet.py` wrote.
pub(crate) fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/models").join(name)
}

/// Largest difference, relative to the largest expected value.
pub(crate) fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let difference = (found - expected).abs().max().double_value(&[]);
    difference / expected.abs().max().double_value(&[])
}
