//! Folders of latents and prompts, encoded by the components of a text-to-image model.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use ddil_core::{Conditioning, Draws};
use ddil_models::weights;
use rand::Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// The format version that is written and read.
pub const FORMAT_VERSION: u32 = 1;

/// Size limit of `dataset.json`; typically it has half a KiB.
const MAX_INFO_BYTES: u64 = 1 << 20;

/// Length of `time_ids`: original size, crop offset and target size.
const NUM_TIME_IDS: i64 = 6;

/// Relative tolerance for equal scaling factors, which are decimals in config files.
const SCALING_TOLERANCE: f64 = 1e-9;

/// The file with the [`EncodedInfo`]. It is written last: a folder that contains it is complete.
pub const INFO: &str = "dataset.json";
/// The file with the latents: `mean` and `std`, or `latents`, each `[samples, channels, height, width]`.
pub const LATENTS: &str = "latents.safetensors";
/// The file with the encoded prompts: `encoder_hidden_states` `[prompts, tokens, width]` and, for some models,
/// `text_embeds` `[prompts, width]`.
pub const PROMPTS: &str = "prompts.safetensors";
/// The file with `prompts` `[samples, phrasings]`, row numbers of the encoded prompts, and, for some models, `time_ids`
/// `[samples, 6]`.
pub const SAMPLES: &str = "samples.safetensors";
/// The file with the texts of the prompts, by row.
pub const TEXTS: &str = "prompts.json";

/// The content of `dataset.json`, which describes a folder of encoded data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncodedInfo {
    /// Format version; 1.
    pub format_version: u32,
    /// Height and width of the images in pixels.
    pub image_size: [i64; 2],
    /// The scaling applied to the autoencoder's latents before they were stored.
    pub scaling: LatentScaling,
    /// Number of samples.
    pub num_samples: i64,
    /// Number of prompts.
    pub num_prompts: i64,
    /// Row of the encoded empty prompt, the unconditional input of guidance; `None` if it is not included, which
    /// excludes guidance of a teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_prompt: Option<i64>,
    /// For a cache: the key of the data it was computed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Truncated prompts; `None` if every prompt is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncated: Option<TruncatedPrompts>,
}

/// Prompts that were longer than the context of the text encoders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TruncatedPrompts {
    /// The number of truncated prompts.
    pub count: u64,
    /// The first of them.
    pub prompt: String,
    /// The part that was cut off.
    pub cut_off: String,
}

/// The version of the file; its other keys are ignored.
#[derive(Deserialize)]
struct Versioned {
    format_version: u32,
}

/// The scaling from an autoencoder's latents to a diffusion model's latents, with the keys of `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentScaling {
    /// `scaling_factor`.
    pub factor: f64,
    /// `shift_factor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift: Option<f64>,
    /// `latents_mean`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean: Option<Vec<f64>>,
    /// `latents_std`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub std: Option<Vec<f64>>,
}

/// The shapes and scaling that a teacher requires of encoded data.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedShape {
    /// Channels of an image.
    pub image_channels: i64,
    /// Channels of a latent.
    pub channels: i64,
    /// Pixels per latent in each direction.
    pub pixels_per_latent: i64,
    /// Scaling of its latents.
    pub scaling: LatentScaling,
    /// Width of `encoder_hidden_states`.
    pub text_width: i64,
    /// Width of `text_embeds`; `None` for a teacher that takes neither these nor `time_ids`.
    pub pooled_width: Option<i64>,
}

/// Latents and prompts encoded by the components of a text-to-image model, in a folder; `docs/TEXT_DATA.md` describes
/// the format.
///
/// The large tensors are memory-mapped: [`open`](Self::open) reads the headers, [`batch`](Self::batch) the rows of the
/// batch.
///
/// # Example
///
/// ```
/// use std::collections::BTreeMap;
///
/// use ddil_core::{RandomStreams, Stream};
/// use ddil_data::{EncodedDataset, encoded};
/// use ddil_models::weights;
/// use tch::{Device, Tensor, kind};
///
/// // Two samples with one prompt each; prompt 0 is the empty prompt.
/// let folder = tempfile::tempdir()?;
/// let save = |file: &str, name: &str, tensor: Tensor| {
///     weights::save(&[(name.to_owned(), tensor)], folder.path().join(file), &BTreeMap::new())
/// };
/// save(encoded::LATENTS, "latents", Tensor::zeros([2, 4, 8, 8], kind::FLOAT_CPU))?;
/// save(encoded::PROMPTS, "encoder_hidden_states", Tensor::zeros([3, 5, 16], kind::FLOAT_CPU))?;
/// save(encoded::SAMPLES, "prompts", Tensor::from_slice2(&[[1_i64], [2]]))?;
/// std::fs::write(folder.path().join(encoded::TEXTS), r#"["", "a cat", "a dog"]"#)?;
/// let info = r#"{"format_version": 1, "image_size": [64, 64], "scaling": {"factor": 0.18215},
///     "num_samples": 2, "num_prompts": 3, "empty_prompt": 0}"#;
/// std::fs::write(folder.path().join(encoded::INFO), info)?;
///
/// let data = EncodedDataset::open(folder.path(), None)?;
/// let mut draws = RandomStreams::new(0, 0).draws(0, Stream::Data, Device::Cpu)?;
/// let batch = data.batch(&[1], [4, 8, 8], &mut draws, Device::Cpu)?;
/// assert_eq!(batch.x0.size(), [1, 4, 8, 8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct EncodedDataset {
    path: PathBuf,
    info: EncodedInfo,
    latents: Option<Latents>,
    prompts: Conditioning,
    time_ids: Option<Tensor>,
    /// Prompt rows of each sample; at least one each.
    prompts_of_samples: Vec<Vec<i64>>,
    texts: Vec<String>,
}

#[derive(Debug)]
enum Latents {
    /// The autoencoder's distribution for each image; latents are drawn from it at each use.
    Distribution { mean: Tensor, std: Tensor },
    /// The latents themselves.
    Fixed(Tensor),
}

/// A batch of an [`EncodedDataset`].
#[derive(Debug)]
pub struct EncodedBatch {
    /// Scaled latents, `[batch, channels, height, width]`, `Float`; zeros if the data set contains no latents.
    pub x0: Tensor,
    /// One prompt per sample, with `time_ids` if the data set contains them.
    pub conditioning: Conditioning,
}

impl EncodedInfo {
    /// Reads `dataset.json` in a folder.
    ///
    /// # Errors
    ///
    /// [`Error::Read`]; [`Error::Encoded`] for invalid content or another version.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(INFO);
        let text = ddil_files::read_bounded(&path, MAX_INFO_BYTES);
        let text = text.map_err(|source| Error::Read { path, source })?;
        let invalid = |problem: String| Error::Encoded {
            path: folder.to_owned(),
            problems: vec![format!("{INFO}: {problem}")],
        };
        // The version first: for a newer file, the version is reported and not its unknown keys.
        let versioned: Versioned =
            ddil_files::parse_json(&text).map_err(|e| invalid(e.to_string()))?;
        if versioned.format_version != FORMAT_VERSION {
            let found = versioned.format_version;
            return Err(invalid(format!(
                "`format_version` is {found}, but this version of ddil reads {FORMAT_VERSION}"
            )));
        }
        ddil_files::parse_json(&text).map_err(|error| invalid(error.to_string()))
    }
}

impl EncodedDataset {
    /// Opens a folder and, if a teacher is given, checks that the data match it.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] if `dataset.json` is missing; [`Error::Encoded`] with everything that is missing, damaged,
    /// inconsistent or does not match the teacher.
    pub fn open(folder: &Path, teacher: Option<&EncodedShape>) -> Result<Self> {
        let info = EncodedInfo::from_folder(folder)?;
        let mut problems = Vec::new();
        let mut read = |name: &str, is_required: bool| {
            let path = folder.join(name);
            if !path.exists() && !is_required {
                return BTreeMap::new();
            }
            weights::read_all(&path).unwrap_or_else(|error| {
                problems.push(format!("{name}: {}", ddil_files::with_causes(&error)));
                BTreeMap::new()
            })
        };
        let (latents, prompts, samples) =
            (read(LATENTS, false), read(PROMPTS, true), read(SAMPLES, true));
        let mut checks = Checks { info: &info, teacher, problems };
        checks.info();
        let latents = checks.latents(latents);
        let prompts = checks.prompts(prompts);
        let (prompts_of_samples, time_ids) = checks.samples(samples);
        let texts = checks.texts(folder);
        let problems = checks.problems;
        if !problems.is_empty() {
            return Err(Error::Encoded { path: folder.to_owned(), problems });
        }
        Ok(Self {
            path: folder.to_owned(),
            info,
            latents,
            prompts,
            time_ids,
            prompts_of_samples,
            texts,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The content of `dataset.json`.
    pub fn info(&self) -> &EncodedInfo {
        &self.info
    }

    /// The number of samples; at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a data set is never empty")]
    pub fn len(&self) -> i64 {
        self.prompts_of_samples.len() as i64
    }

    /// Whether the data set contains latents as well as prompts.
    pub fn has_latents(&self) -> bool {
        self.latents.is_some()
    }

    /// Channels, height and width of the latents; `None` without latents.
    pub fn latent_shape(&self) -> Option<[i64; 3]> {
        let (Latents::Distribution { mean: latents, .. } | Latents::Fixed(latents)) =
            self.latents.as_ref()?;
        let size = latents.size();
        Some([size[1], size[2], size[3]])
    }

    /// The texts of the prompts, by row.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The prompt rows of a sample.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the index is out of range.
    pub fn prompts_of(&self, sample: i64) -> Result<&[i64]> {
        let rows =
            usize::try_from(sample).ok().and_then(|sample| self.prompts_of_samples.get(sample));
        rows.map(Vec::as_slice).ok_or(Error::Index { index: sample, len: self.len() })
    }

    /// The encoded prompts at the given rows without `time_ids`; `Float`, on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for a row that is out of range.
    pub fn prompt_conditioning(&self, rows: &[i64]) -> Result<Conditioning> {
        let len = self.info.num_prompts;
        if let Some(&index) = rows.iter().find(|&&row| !(0..len).contains(&row)) {
            return Err(Error::Index { index, len });
        }
        let rows = Tensor::from_slice(rows);
        let part = |name| select(self.prompts.get(name), &rows);
        Ok(Conditioning::none()
            .with_some(
                Conditioning::ENCODER_HIDDEN_STATES,
                part(Conditioning::ENCODER_HIDDEN_STATES)?,
            )
            .with_some(Conditioning::TEXT_EMBEDS, part(Conditioning::TEXT_EMBEDS)?))
    }

    /// The encoded empty prompt, one row; `None` if the folder does not contain it.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out.
    pub fn empty_prompt(&self) -> Result<Option<Conditioning>> {
        self.info.empty_prompt.map(|row| self.prompt_conditioning(&[row])).transpose()
    }

    /// The samples at the given indices, each with one of its phrasings at random. If the data set stores a
    /// distribution, latents are drawn from it.
    ///
    /// `shape` is the latent shape of a data set without latents, for which `x0` is zero.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for an index that is out of range, [`Error::Torch`] if memory runs out.
    pub fn batch(
        &self,
        indices: &[i64],
        shape: [i64; 3],
        draws: &mut Draws,
        device: Device,
    ) -> Result<EncodedBatch> {
        let phrasing = |&index: &i64| {
            let rows = self.prompts_of(index)?;
            // One draw per sample, even with a single phrasing.
            Ok(rows[draws.rng.random_range(0..rows.len())])
        };
        let prompts: Vec<i64> = indices.iter().map(phrasing).collect::<Result<_>>()?;
        let rows = Tensor::from_slice(indices);
        let time_ids = select(self.time_ids.as_ref(), &rows)?;
        let conditioning =
            self.prompt_conditioning(&prompts)?.with_some(Conditioning::TIME_IDS, time_ids);
        let torch = |error| Error::torch("EncodedDataset::batch")(error);
        let on_device = |tensor: &Tensor| -> Result<Tensor> {
            let chosen = tensor.f_index_select(0, &rows).map_err(torch)?;
            // Converted on the device: half precision halves the transfer.
            let moved = chosen.f_to_device(device).and_then(|t| t.f_to_kind(Kind::Float));
            moved.map_err(torch)
        };
        let x0 = match &self.latents {
            Some(Latents::Distribution { mean, std }) => {
                let mean = on_device(mean)?;
                let noise = draws.generator.normal(mean.size(), Kind::Float)?;
                mean + on_device(std)? * noise
            }
            Some(Latents::Fixed(latents)) => on_device(latents)?,
            None => {
                let [channels, height, width] = shape;
                let size = [indices.len() as i64, channels, height, width];
                Tensor::f_zeros(size, (Kind::Float, device)).map_err(torch)?
            }
        };
        Ok(EncodedBatch { x0, conditioning })
    }
}

/// The given rows of a part, `Float`; `None` without the part.
fn select(part: Option<&Tensor>, rows: &Tensor) -> Result<Option<Tensor>> {
    let chosen = part.map(|part| part.f_index_select(0, rows)?.f_to_kind(Kind::Float)).transpose();
    chosen.map_err(Error::torch("EncodedDataset::prompt_conditioning"))
}

/// Checks the content of a folder against its `dataset.json` and the teacher, and collects all problems.
struct Checks<'a> {
    info: &'a EncodedInfo,
    teacher: Option<&'a EncodedShape>,
    problems: Vec<String>,
}

type Tensors = BTreeMap<String, Tensor>;

impl Checks<'_> {
    fn problem(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    fn info(&mut self) {
        let EncodedInfo { image_size, num_samples, num_prompts, .. } = *self.info;
        if num_samples < 1 || num_prompts < 1 {
            self.problem(format!(
                "{INFO}: {num_samples} samples and {num_prompts} prompts; at least one of each is required"
            ));
        }
        if let Some(row) = self.info.empty_prompt.filter(|row| !(0..num_prompts).contains(row)) {
            self.problem(format!(
                "{INFO}: `empty_prompt` is {row}, but there are {num_prompts} prompts"
            ));
        }
        let Some(teacher) = self.teacher else { return };
        let factor = teacher.pixels_per_latent;
        if image_size.iter().any(|side| *side < factor || side % factor != 0) {
            self.problem(format!(
                "{INFO}: `image_size` is {image_size:?}, but both must be multiples of {factor}, the teacher's pixels \
                 per latent"
            ));
        }
        if !self.info.scaling.is_same(&teacher.scaling) {
            self.problem(format!(
                "{INFO}: `scaling` is {}, but the teacher's is {}",
                self.info.scaling, teacher.scaling
            ));
        }
    }

    fn latents(&mut self, mut tensors: Tensors) -> Option<Latents> {
        if tensors.is_empty() {
            return None;
        }
        let latents =
            match (tensors.remove("mean"), tensors.remove("std"), tensors.remove("latents")) {
                (Some(mean), Some(std), None) if mean.size() == std.size() => {
                    Some(Latents::Distribution { mean, std })
                }
                (Some(mean), Some(std), None) => {
                    let sizes = (mean.size(), std.size());
                    self.problem(format!(
                        "{LATENTS}: `mean` is {:?} and `std` {:?}",
                        sizes.0, sizes.1
                    ));
                    None
                }
                (None, None, Some(latents)) => Some(Latents::Fixed(latents)),
                _ => {
                    self.problem(format!(
                        "{LATENTS}: must contain either `mean` and `std` or `latents`"
                    ));
                    None
                }
            };
        self.unknown(LATENTS, &tensors);
        let n = self.info.num_samples;
        let mut expected = vec![Some(n), None, None, None];
        if let Some(teacher) = self.teacher {
            let [height, width] = self.info.image_size.map(|side| side / teacher.pixels_per_latent);
            expected = [n, teacher.channels, height, width].map(Some).to_vec();
        }
        match &latents {
            Some(Latents::Distribution { mean, std }) => {
                self.shape(LATENTS, "mean", mean, &expected);
                self.shape(LATENTS, "std", std, &expected);
            }
            Some(Latents::Fixed(fixed)) => self.shape(LATENTS, "latents", fixed, &expected),
            None => {}
        }
        latents
    }

    fn prompts(&mut self, mut tensors: Tensors) -> Conditioning {
        let states = tensors.remove("encoder_hidden_states");
        let pooled = tensors.remove("text_embeds");
        self.unknown(PROMPTS, &tensors);
        let n = Some(self.info.num_prompts);
        let teacher = self.teacher;
        match &states {
            Some(states) => {
                let width = teacher.map(|teacher| teacher.text_width);
                self.shape(PROMPTS, "encoder_hidden_states", states, &[n, None, width]);
            }
            None => self.problem(format!("{PROMPTS}: no `encoder_hidden_states`")),
        }
        match (&pooled, teacher.map(|teacher| teacher.pooled_width)) {
            (Some(_), Some(None)) => self.problem(format!(
                "{PROMPTS}: contains `text_embeds`, which the teacher does not take: the data are for another model"
            )),
            (None, Some(Some(_))) => {
                self.problem(format!("{PROMPTS}: no `text_embeds`, which the teacher requires"));
            }
            (Some(pooled), width) => self.shape(PROMPTS, "text_embeds", pooled, &[n, width.flatten()]),
            (None, _) => {}
        }
        Conditioning::none()
            .with_some(Conditioning::ENCODER_HIDDEN_STATES, states)
            .with_some(Conditioning::TEXT_EMBEDS, pooled)
    }

    fn samples(&mut self, mut tensors: Tensors) -> (Vec<Vec<i64>>, Option<Tensor>) {
        let (table, time_ids) = (tensors.remove("prompts"), tensors.remove("time_ids"));
        self.unknown(SAMPLES, &tensors);
        let n = self.info.num_samples;
        if let Some(time_ids) = &time_ids {
            self.shape(SAMPLES, "time_ids", time_ids, &[Some(n), Some(NUM_TIME_IDS)]);
        }
        let is_required = self.teacher.map(|teacher| teacher.pooled_width.is_some());
        match (is_required, time_ids.is_some()) {
            (Some(true), false) => {
                self.problem(format!("{SAMPLES}: no `time_ids`, which the teacher requires"));
            }
            (Some(false), true) => {
                self.problem(format!(
                    "{SAMPLES}: contains `time_ids`, which the teacher does not take"
                ));
            }
            _ => {}
        }
        let Some(table) = table else {
            self.problem(format!("{SAMPLES}: no `prompts`"));
            return (Vec::new(), time_ids);
        };
        (self.rows(&table), time_ids)
    }

    /// The prompt rows of each sample.
    fn rows(&mut self, table: &Tensor) -> Vec<Vec<i64>> {
        let (size, kind, n) = (table.size(), table.kind(), self.info.num_samples);
        let fits = size.len() == 2 && size[0] == n && size[1] > 0;
        if !fits || !matches!(kind, Kind::Int64 | Kind::Int) {
            self.problem(format!(
                "{SAMPLES}: `prompts` is {kind:?} {size:?}, but must be Int64 or Int [{n}, phrasings]"
            ));
            return Vec::new();
        }
        let values = Vec::<i64>::try_from(table.to_kind(Kind::Int64).flatten(0, 1));
        let values = match values {
            Ok(values) => values,
            Err(error) => {
                self.problem(format!("{SAMPLES}: `prompts`: {error}"));
                return Vec::new();
            }
        };
        let known = -1..self.info.num_prompts;
        if let Some(invalid) = values.iter().find(|row| !known.contains(row)) {
            self.problem(format!(
                "{SAMPLES}: `prompts` refers to row {invalid}; rows are 0 to {}, and -1 is an unused entry",
                known.end - 1
            ));
        }
        let rows: Vec<Vec<i64>> = values
            .chunks(size[1] as usize)
            .map(|rows| rows.iter().copied().filter(|row| *row >= 0).collect())
            .collect();
        if let Some(sample) = rows.iter().position(Vec::is_empty) {
            self.problem(format!("{SAMPLES}: sample {sample} has no prompt"));
        }
        rows
    }

    fn texts(&mut self, folder: &Path) -> Vec<String> {
        let read = ddil_files::read_bounded(folder.join(TEXTS), u64::MAX)
            .map_err(|error| error.to_string());
        let texts: std::result::Result<Vec<String>, String> = read
            .and_then(|bytes| ddil_files::parse_json(&bytes).map_err(|error| error.to_string()));
        match texts {
            Ok(texts) if texts.len() as i64 == self.info.num_prompts => texts,
            Ok(texts) => {
                let n = self.info.num_prompts;
                self.problem(format!("{TEXTS}: {} texts for {n} prompts", texts.len()));
                Vec::new()
            }
            Err(problem) => {
                self.problem(format!("{TEXTS}: {problem}"));
                Vec::new()
            }
        }
    }

    /// Checks the shape of a floating-point tensor; `None` allows any length.
    fn shape(&mut self, file: &str, name: &str, tensor: &Tensor, expected: &[Option<i64>]) {
        let size = tensor.size();
        let fits = size.len() == expected.len()
            && size
                .iter()
                .zip(expected)
                .all(|(n, expected)| *n > 0 && expected.is_none_or(|e| e == *n));
        if !fits {
            let sides = expected.iter().map(|n| n.map_or("any".to_owned(), |n| n.to_string()));
            let expected = sides.collect::<Vec<_>>().join(", ");
            self.problem(format!("{file}: `{name}` is {size:?}, but must be [{expected}]"));
        }
        if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16) {
            self.problem(format!(
                "{file}: `{name}` is {:?}, but must be Float, Half or BFloat16",
                tensor.kind()
            ));
        }
    }

    fn unknown(&mut self, file: &str, left: &Tensors) {
        for name in left.keys() {
            self.problem(format!("{file}: unknown tensor `{name}`"));
        }
    }
}

impl LatentScaling {
    fn is_same(&self, other: &Self) -> bool {
        let near = |a: f64, b: f64| (a - b).abs() <= SCALING_TOLERANCE * a.abs().max(b.abs());
        let lists = |a: &Option<Vec<f64>>, b: &Option<Vec<f64>>| match (a, b) {
            (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| near(*a, *b)),
            (a, b) => a.is_none() && b.is_none(),
        };
        near(self.factor, other.factor)
            && near(self.shift.unwrap_or(0.0), other.shift.unwrap_or(0.0))
            && lists(&self.mean, &other.mean)
            && lists(&self.std, &other.std)
    }
}

impl std::fmt::Display for LatentScaling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "factor {}", self.factor)?;
        if let Some(shift) = self.shift {
            write!(f, ", shift {shift}")?;
        }
        match (&self.mean, &self.std) {
            (Some(mean), Some(std)) => write!(f, ", mean {mean:?}, std {std:?}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ddil_core::{RandomStreams, Stream};
    use tch::kind;

    use super::*;

    const SHAPE: [i64; 3] = [2, 8, 8];

    /// Two samples: the first with two phrasings and latents around 5, the second with one and latents around -5.
    fn written() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let save = |name: &str, tensors: &[(&str, Tensor)]| {
            let tensors: Vec<_> =
                tensors.iter().map(|(name, t)| ((*name).to_owned(), t.shallow_clone())).collect();
            weights::save(&tensors, folder.path().join(name), &BTreeMap::new()).expect("written");
        };
        let signs = Tensor::from_slice(&[5.0_f32, -5.0]).view([2, 1, 1, 1]);
        let mean = Tensor::ones([2, 2, 8, 8], kind::FLOAT_CPU) * signs;
        save(LATENTS, &[("std", mean.ones_like() * 0.5), ("mean", mean)]);
        let states = Tensor::arange(4, kind::FLOAT_CPU).view([4, 1, 1]);
        save(PROMPTS, &[("encoder_hidden_states", states)]);
        save(SAMPLES, &[("prompts", Tensor::from_slice2(&[[1_i64, 2], [3, -1]]))]);
        fs::write(folder.path().join(TEXTS), r#"["", "a", "b", "c"]"#).expect("written");
        let info = r#"{"format_version": 1, "image_size": [16, 16], "scaling": {"factor": 0.5},
            "num_samples": 2, "num_prompts": 4, "empty_prompt": 0}"#;
        fs::write(folder.path().join(INFO), info).expect("written");
        folder
    }

    fn batch(data: &EncodedDataset, step: u64, indices: &[i64]) -> EncodedBatch {
        let streams = RandomStreams::new(7, 0);
        let mut draws = streams.draws(step, Stream::Data, Device::Cpu).expect("there is a CPU");
        data.batch(indices, SHAPE, &mut draws, Device::Cpu).expect("the indices are there")
    }

    fn rows(batch: &EncodedBatch) -> Vec<f32> {
        let states = batch
            .conditioning
            .get(Conditioning::ENCODER_HIDDEN_STATES)
            .expect("prompts are encoded");
        Vec::try_from(states.flatten(0, -1)).expect("numbers")
    }

    #[test]
    fn latents_and_phrasings_are_drawn_at_each_step() -> Result<()> {
        let folder = written();
        let data = EncodedDataset::open(folder.path(), None)?;
        assert_eq!((data.len(), data.latent_shape()), (2, Some(SHAPE)));
        let (first, again) = (batch(&data, 3, &[1, 0]), batch(&data, 3, &[1, 0]));
        assert_eq!((&first.x0, rows(&first)), (&again.x0, rows(&again)));
        assert_ne!(first.x0, batch(&data, 4, &[1, 0]).x0);

        // The draws of many steps have the stored mean and standard deviation.
        let drawn: Vec<EncodedBatch> = (0..64).map(|step| batch(&data, step, &[1, 0])).collect();
        let x0: Vec<&Tensor> = drawn.iter().map(|batch| &batch.x0).collect();
        let x0 = Tensor::stack(&x0, 1);
        for (sample, mean) in [(0, -5.0), (1, 5.0)] {
            let values = x0.get(sample);
            let n = values.numel() as f64;
            let error = (values.mean(Kind::Double).double_value(&[]) - mean).abs();
            assert!(error < 5.0 * 0.5 / n.sqrt(), "{error}");
            assert!((values.std(true).double_value(&[]) - 0.5).abs() < 0.02);
        }
        let prompts: Vec<Vec<f32>> = drawn.iter().map(rows).collect();
        assert!(prompts.iter().all(|rows| rows[0] == 3.0 && [1.0, 2.0].contains(&rows[1])));
        let seconds = prompts.iter().filter(|rows| rows[1] == 2.0).count();
        assert!((16..=48).contains(&seconds), "{seconds} of 64");
        Ok(())
    }

    #[test]
    fn an_index_out_of_range_is_refused() -> Result<()> {
        let folder = written();
        let data = EncodedDataset::open(folder.path(), None)?;
        let mut draws =
            RandomStreams::new(0, 0).draws(0, Stream::Data, Device::Cpu).expect("there is a CPU");
        for index in [-1, 2] {
            let refused = data.batch(&[0, index], SHAPE, &mut draws, Device::Cpu);
            assert!(matches!(refused, Err(Error::Index { len: 2, .. })), "{refused:?}");
        }
        let empty = data.empty_prompt()?.expect("there is one");
        let states = empty.get(Conditioning::ENCODER_HIDDEN_STATES).expect("prompts are encoded");
        assert_eq!(states.double_value(&[0, 0, 0]), 0.0);
        Ok(())
    }
}
