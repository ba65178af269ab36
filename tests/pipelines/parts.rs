//! Models that are written elsewhere, part by part.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ddil_models::{ClipTextConfig, NetworkConfig, Placement, UnknownKeys, weights};
use ddil_pipelines::{ModelFiles, WeightForm};
use ddil_tests::{child, copy_folder, folder_of_child};
use tch::Kind;

use crate::TestResult;

/// A pipeline that `tools/record/record_pipelines.py` wrote.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/pipelines/lcm")
}

const MEGABYTE: usize = 1 << 20;
/// The larger matrices of the encoder below.
const LARGEST: usize = 6 * MEGABYTE;

/// A pipeline with a text encoder of 60 MB.
fn write_large(folder: &Path) -> TestResult {
    copy_folder(&golden(), folder)?;
    let encoder = folder.join("text_encoder");
    let config = ClipTextConfig::from_file(encoder.join("config.json"), UnknownKeys::Refuse)?;
    let config = ClipTextConfig {
        hidden_size: 512,
        intermediate_size: 3072,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        ..config
    };
    Ok(config.build(Placement::default(), 0)?.save_to_folder(&encoder)?)
}

/// The text encoder of Stable Diffusion XL takes gigabytes, and is cast directly from the mapped file.
#[test]
fn writing_needs_no_memory_for_more_than_the_largest_tensor() -> TestResult {
    const NAME: &str = "parts::writing_needs_no_memory_for_more_than_the_largest_tensor";
    if let Some(folder) = folder_of_child() {
        return write_and_measure(&folder);
    }
    let folder = tempfile::tempdir()?;
    write_large(&folder.path().join("large"))?;
    let output = child(NAME, folder.path())?.env("OMP_NUM_THREADS", "1").output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("1 passed"), "{said}");
    let written = folder.path().join("written/text_encoder/model.safetensors");
    assert!(weights::read_all(written)?.values().all(|tensor| tensor.kind() == Kind::Half));
    Ok(())
}

fn write_and_measure(folder: &Path) -> TestResult {
    let write = |from: &Path, to: &str| {
        let form = WeightForm { kind: Some(Kind::Half), ..WeightForm::default() };
        ModelFiles::of_pipeline(from, None)?.write(&folder.join(to), &form, false)
    };
    // The memory of the first use of libtorch's kernels.
    write(&golden(), "small")?;
    let before = own_memory()?;
    let is_written = AtomicBool::new(false);
    let peak = std::thread::scope(|scope| -> Result<usize, Box<dyn std::error::Error>> {
        let watch = scope.spawn(|| {
            let mut peak = 0;
            while !is_written.load(Ordering::Relaxed) {
                peak = peak.max(own_memory().unwrap_or(usize::MAX));
                std::thread::sleep(Duration::from_micros(200));
            }
            peak
        });
        let written = write(&folder.join("large"), "written");
        is_written.store(true, Ordering::Relaxed);
        let peak = watch.join().map_err(|_| "nobody watched")?;
        written?;
        Ok(peak)
    })?;
    let grown = peak.saturating_sub(before);
    // A tensor as it is cast, and its bytes.
    assert!(grown < 2 * LARGEST + 8 * MEGABYTE, "{grown} bytes more than {before}");
    Ok(())
}

/// Memory of this process that does not belong to a file, in bytes: the system can reclaim pages of a mapped file at
/// any time.
fn own_memory() -> Result<usize, Box<dyn std::error::Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<usize>()? * 1024)
}
