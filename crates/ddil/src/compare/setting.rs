//! What all work of a comparison shares: where it is, how it measures, and the teacher's samples that students are
//! compared with.

use std::ffi::OsString;
use std::path::PathBuf;

use ddil_files::settings::inline_toml;
use ddil_losses::TeacherGuidance;
use ddil_schedulers::Thresholding;
use ddil_trainer::Result;
use ddil_trainer::config::{DataSection, Precision};
use serde::{Deserialize, Serialize};

use super::folder::ComparisonFolder;
use super::matrix::{EvaluateConfig, sha256};

/// Samples of a teacher that are drawn in one go.
pub(super) const PART: u32 = 500;

/// What all work of a comparison has in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Where results go.
    pub folder: ComparisonFolder,
    /// How things are measured.
    pub evaluate: EvaluateConfig,
    /// The data.
    pub data: DataSection,
    /// Threads of a process.
    pub threads: u32,
}

/// Samples of a teacher, by everything that they follow from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TeacherSamples {
    /// The model folder.
    pub path: PathBuf,
    /// Checksum of what is in it.
    pub sha256: String,
    /// Guidance; 1 is none.
    pub guidance_scale: f64,
    /// DDIM steps, evenly spaced.
    pub steps: u32,
    /// What is done with clean data beyond their range.
    pub thresholding: Thresholding,
    /// How many samples.
    pub samples: u32,
    /// How many start from the seed's noise in all, these being the first.
    pub total: u32,
    /// What noise follows from.
    pub seed: u64,
    /// Where the network computes.
    pub device: String,
    /// In what precision.
    pub precision: Precision,
}

impl TeacherSamples {
    /// The scale at which students of a config are taught; of a range of them the middle, at which they are sampled.
    pub fn taught_scale(guidance: TeacherGuidance) -> f64 {
        match guidance {
            TeacherGuidance::Cfg { scale } => scale,
            TeacherGuidance::CfgRange { min, max } | TeacherGuidance::Embedded { min, max } => {
                1.0 + f64::midpoint(min, max)
            }
            TeacherGuidance::BakedIn => 1.0,
        }
    }

    /// A short checksum; the same for the same samples.
    pub fn key(&self) -> String {
        // Only maps with keys that are no strings cannot be written, and there are none.
        let json = serde_json::to_vec(self).unwrap_or_default();
        sha256(&json)[..16].to_owned()
    }

    /// First samples of the parts that they are drawn in.
    pub fn parts(&self) -> impl Iterator<Item = u32> + use<> {
        (0..self.samples).step_by(PART as usize)
    }

    pub(super) fn end_of(&self, start: u32) -> u32 {
        start.saturating_add(PART).min(self.samples)
    }

    pub(super) fn part(&self, folder: &ComparisonFolder, start: u32) -> PathBuf {
        folder.teacher(&self.key()).join(format!("from_{start:06}.safetensors"))
    }

    /// Where the row of these samples lies, compared with those of `taught`.
    pub(super) fn row(&self, folder: &ComparisonFolder, taught: &Self) -> PathBuf {
        folder.teacher(&self.key()).join(format!("row_{}.json", taught.key()))
    }
}

impl TeacherSamples {
    /// The command line of `ddil sample` that draws the part from `start` on.
    pub(super) fn draw(&self, setting: &Setting, start: u32) -> Result<Vec<OsString>> {
        let Self { guidance_scale, steps, total, seed, device, .. } = self;
        let count = self.end_of(start).saturating_sub(start);
        let thresholding = inline_toml(&self.thresholding)?;
        let options = [
            format!("--num-samples={count}"),
            format!("--first={start}"),
            format!("--of={total}"),
            format!("--steps={steps}"),
            format!("--guidance-scale={guidance_scale}"),
            format!("--thresholding={thresholding}"),
            format!("--batch-size={}", setting.evaluate.batch_size),
            format!("--seed={seed}"),
            format!("--device={device}"),
            format!("--precision={}", precision(self.precision)),
            format!("--threads={}", setting.threads),
        ];
        let mut arguments: Vec<OsString> = vec!["sample".into(), self.path.clone().into()];
        arguments.extend(options.map(OsString::from));
        arguments.extend(["--output".into(), self.part(&setting.folder, start).into()]);
        Ok(arguments)
    }
}

/// A precision as the command line has it.
pub(super) fn precision(precision: Precision) -> &'static str {
    match precision {
        Precision::Float32 => "float32",
        Precision::Bfloat16 => "bfloat16",
    }
}

impl Setting {
    /// What a measurement depends on beside the model, as a checksum.
    pub fn measured_as(&self, taught: Option<&TeacherSamples>) -> String {
        let taught = taught.map(TeacherSamples::key);
        let parts = (&self.evaluate, self.data.kind, &self.data.path, taught);
        sha256(&serde_json::to_vec(&parts).unwrap_or_default())
    }
}
