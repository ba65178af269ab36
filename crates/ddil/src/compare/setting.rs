//! The settings shared by all work of a comparison: folder, measurement, and the teacher samples that students are
//! compared with.

use std::ffi::OsString;
use std::path::PathBuf;

use ddil_files::settings::inline_toml;
use ddil_losses::TeacherGuidance;
use ddil_schedulers::Thresholding;
use ddil_trainer::config::{DataSection, Precision};
use serde::{Deserialize, Serialize};

use super::folder::ComparisonFolder;
use super::matrix::{EvaluateConfig, sha256};
use crate::error::Result;

/// The number of teacher samples drawn in one part.
pub(super) const PART: u32 = 500;

/// The settings shared by all work of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Setting {
    /// The folder of the results.
    pub(crate) folder: ComparisonFolder,
    /// The measurement settings.
    pub(crate) evaluate: EvaluateConfig,
    /// The data.
    pub(crate) data: DataSection,
    /// Threads per process.
    pub(crate) threads: u32,
    /// Checksum of the file of prompts, if there is one: it may be edited under the same name.
    pub(crate) prompts_sha256: Option<String>,
}

/// Teacher samples, identified by everything that determines them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TeacherSamples {
    /// The model folder.
    pub(crate) path: PathBuf,
    /// Checksum of the folder's contents.
    pub(crate) sha256: String,
    /// Guidance scale; 1 is none.
    pub(crate) guidance_scale: f64,
    /// Number of DDIM steps, evenly spaced.
    pub(crate) steps: u32,
    /// Treatment of clean data beyond the data's range.
    pub(crate) thresholding: Thresholding,
    /// The number of samples.
    pub(crate) samples: u32,
    /// The number of samples that start from the seed's noise in all; these are the first of them.
    pub(crate) total: u32,
    /// Seed of the noise.
    pub(crate) seed: u64,
    /// The device on which the network runs.
    pub(crate) device: String,
    /// The precision in which it computes.
    pub(crate) precision: Precision,
}

impl TeacherSamples {
    /// The guidance scale at which a config's students are trained; for a range, its middle, where they are sampled.
    pub(crate) fn target_scale(guidance: TeacherGuidance) -> f64 {
        match guidance {
            TeacherGuidance::Cfg { scale } => scale,
            TeacherGuidance::CfgRange { min, max } | TeacherGuidance::Embedded { min, max } => {
                1.0 + f64::midpoint(min, max)
            }
            TeacherGuidance::BakedIn => 1.0,
        }
    }

    /// A short checksum, equal for equal samples.
    pub(crate) fn key(&self) -> String {
        // Only maps with keys that are not strings fail to serialise, and there are none.
        let json = serde_json::to_vec(self).unwrap_or_default();
        sha256(&json)[..16].to_owned()
    }

    /// Index of the first sample of each part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = u32> + use<> {
        (0..self.samples).step_by(PART as usize)
    }

    pub(super) fn end_of(&self, start: u32) -> u32 {
        start.saturating_add(PART).min(self.samples)
    }

    pub(super) fn part(&self, folder: &ComparisonFolder, start: u32) -> PathBuf {
        folder.teacher(&self.key()).join(format!("from_{start:06}.safetensors"))
    }

    /// The file of the row of these samples, compared with those of `target`.
    pub(super) fn row(&self, folder: &ComparisonFolder, target: &Self) -> PathBuf {
        folder.teacher(&self.key()).join(format!("row_{}.json", target.key()))
    }
}

impl TeacherSamples {
    /// The command line of `ddil sample` that draws the part that begins at `start`.
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
            format!("--seed={seed}"),
            format!("--device={device}"),
            format!("--precision={}", precision(self.precision)),
            format!("--threads={}", setting.threads),
        ];
        let mut arguments: Vec<OsString> = vec!["sample".into(), self.path.clone().into()];
        arguments.extend(options.map(OsString::from));
        let batch_size = setting.evaluate.batch_size();
        arguments.extend(batch_size.map(|size| OsString::from(format!("--batch-size={size}"))));
        arguments.extend(["--output".into(), self.part(&setting.folder, start).into()]);
        Ok(arguments)
    }
}

impl TeacherSamples {
    /// Options of `ddil evaluate` that draw as these samples are drawn.
    pub(super) fn sampling_options(&self) -> Result<[OsString; 3]> {
        let Self { guidance_scale, steps, .. } = self;
        let thresholding = inline_toml(&self.thresholding)?;
        Ok([
            format!("--steps={steps}"),
            format!("--guidance-scale={guidance_scale}"),
            format!("--thresholding={thresholding}"),
        ]
        .map(OsString::from))
    }
}

/// A precision as written on the command line.
pub(super) fn precision(precision: Precision) -> &'static str {
    match precision {
        Precision::Float32 => "float32",
        Precision::Bfloat16 => "bfloat16",
    }
}

impl Setting {
    /// Checksum of everything except the model that a measurement depends on.
    pub(crate) fn measured_as(&self, target: Option<&TeacherSamples>) -> String {
        let target = target.map(TeacherSamples::key);
        let parts = (&self.evaluate, self.data.kind, &self.data.path, target);
        let mut bytes = serde_json::to_vec(&parts).unwrap_or_default();
        // Only if it is set, so that older results stay valid.
        if let Some(side) = self.data.resolution {
            bytes.extend(side.to_le_bytes());
        }
        bytes.extend(self.prompts_sha256.iter().flat_map(|sum| sum.bytes()));
        sha256(&bytes)
    }
}
