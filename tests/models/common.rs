//! What several modules need.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ddil_core::Conditioning;
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

/// Every recorded text-conditioned network.
pub(crate) const CONDITION_GOLDEN: [&str; 7] = [
    "unet_condition_sd15",
    "unet_condition_sd21",
    "unet_condition_sdxl",
    "unet_condition_ssd1b",
    "unet_condition_lcm",
    "unet_condition_text",
    "unet_condition_classes",
];

/// A folder that `tools/record/record_unet.py` wrote.
pub(crate) fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/models").join(name)
}

/// The conditioning of a network in its recorded output.
pub(crate) fn conditioning(recorded: &BTreeMap<String, Tensor>) -> Conditioning {
    let part = |name: &'static str| Some((name, recorded.get(name)?.shallow_clone()));
    Conditioning::STANDARD.into_iter().filter_map(part).collect()
}

/// Largest difference, relative to the largest expected value.
pub(crate) fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let difference = (found - expected).abs().max().double_value(&[]);
    difference / expected.abs().max().double_value(&[])
}

/// Runs `measure` in a separate process, in which no other test takes memory; `name` is that of the calling test.
#[cfg(target_os = "linux")]
pub(crate) fn alone(name: &str, measure: impl FnOnce() -> TestResult) -> TestResult {
    const ALONE: &str = "DDIL_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return measure();
    }
    let mut command = std::process::Command::new(std::env::current_exe()?);
    // Threads that wait for a busy core would make this slow, and allocate memory.
    command.args([name, "--exact", "--nocapture"]).env(ALONE, "1").env("OMP_NUM_THREADS", "1");
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    assert!(text.contains("1 passed") || !output.status.success(), "{name} is no test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The most memory this process has had, in bytes.
#[cfg(target_os = "linux")]
pub(crate) fn peak_memory() -> Result<usize, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<usize>()? * 1024)
}
