//! How images match their prompts, and how much the images of one prompt differ.

use ddil_data::Prompt;
use ddil_files::Invalid;
use ddil_metrics::{
    FeatureExtractor, ImageInput, TorchScriptDistance, mean_cosine_distance, mean_pairwise_distance,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::caption_score::CaptionScorer;
use crate::error::{Error, Result};
use crate::feature_rows::FeatureRows;

/// A mean over prompts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeanOverPrompts {
    /// The mean of the values of all prompts.
    pub mean: f64,
    /// Its standard error: their standard deviation over the root of their number; none for a single prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standard_error: Option<f64>,
}

impl MeanOverPrompts {
    fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let standard_error = (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
        Some(Self { mean, standard_error })
    }
}

/// The CLIP score of images and their prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClipScores {
    /// The network: `clip-` and the SHA-256 of its weights.
    pub network: String,
    /// How images were converted for it.
    pub input: ImageInput,
    /// Mean cosine of the embeddings of an image and of its prompt.
    pub cosine: MeanOverPrompts,
    /// `max(100 * cosine, 0)`, the CLIP score of torchmetrics.
    pub torchmetrics: f64,
    /// The number of prompts that were longer than the text encoder's input and truncated.
    #[serde(default)]
    pub truncated_prompts: u32,
}

/// Mean distances between the images of one prompt, averaged over prompts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PromptDiversity {
    /// Euclidean distance of the extractor's features.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub euclidean: Option<MeanOverPrompts>,
    /// 1 - cosine of the embeddings of the CLIP score's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_cosine_distance: Option<MeanOverPrompts>,
    /// The distance of a network that compares two images, LPIPS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lpips: Option<MeanOverPrompts>,
    /// The name and SHA-256 of that network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lpips_network: Option<String>,
}

/// The metrics of images of prompts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptScores {
    /// If there is CLIP.
    pub clip_score: Option<ClipScores>,
    /// If there are several images per prompt and something to compare them.
    pub diversity: Option<PromptDiversity>,
}

/// The networks that measure images of prompts.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct PromptNetworks<'a> {
    /// For features.
    pub extractor: Option<&'a dyn FeatureExtractor>,
    /// For the CLIP score.
    pub clip: Option<&'a CaptionScorer>,
    /// For LPIPS.
    pub lpips: Option<&'a TorchScriptDistance>,
}

impl<'a> PromptNetworks<'a> {
    /// Those that are given.
    pub fn new(
        extractor: Option<&'a dyn FeatureExtractor>,
        clip: Option<&'a CaptionScorer>,
        lpips: Option<&'a TorchScriptDistance>,
    ) -> Self {
        Self { extractor, clip, lpips }
    }

    /// Numbers of features, and of the embeddings of CLIP.
    fn widths(self) -> [i64; 2] {
        [self.extractor.map_or(0, FeatureExtractor::dim), self.clip.map_or(0, CaptionScorer::dim)]
    }

    /// Numbers per image: features, embeddings, and the [`OTHERS`].
    pub(crate) fn dim(self) -> i64 {
        self.widths().iter().sum::<i64>() + OTHERS
    }

    /// What identifies the networks and their inputs.
    pub(crate) fn identity(self) -> Value {
        let extractor = self.extractor.map(|own| json!([own.id(), own.input(), own.variant()]));
        let clip = self.clip.map(|own| json!([own.id(), own.input()]));
        let lpips = self.lpips.map(TorchScriptDistance::id);
        json!({ "extractor": extractor, "clip": clip, "lpips": lpips })
    }
}

/// Numbers of an image beside features and embeddings: its cosine, whether its prompt was truncated, the LPIPS of its
/// prompt.
const OTHERS: i64 = 3;

/// Measures images prompt by prompt: [`add`](Self::add) takes the images of some prompts, [`finish`](Self::finish)
/// returns the means. It keeps numbers and no images, in [`FeatureRows`], so that another process can continue.
pub struct PromptMeter<'a> {
    networks: PromptNetworks<'a>,
    rows: FeatureRows,
    per_prompt: usize,
}

impl<'a> PromptMeter<'a> {
    /// A meter of `per_prompt` images of each prompt that continues after the rows of an earlier one.
    pub fn new(networks: PromptNetworks<'a>, per_prompt: u32, rows: FeatureRows) -> Self {
        Self { networks, rows, per_prompt: per_prompt.max(1) as usize }
    }

    /// The number of prompts that are measured.
    pub fn num_prompts(&self) -> u64 {
        self.rows.len() / self.per_prompt as u64
    }

    /// Whether another process can continue after this one.
    pub fn is_kept(&self) -> bool {
        self.rows.are_kept()
    }

    /// Writes what was measured to disk, from where another process continues.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the disk is full.
    pub fn save(&mut self) -> Result<()> {
        self.rows.save()
    }

    /// Adds the images of some prompts, those of a prompt one after the other.
    ///
    /// # Shapes and units
    ///
    /// - `images`: each `[1, 1 or 3, height, width]`, `Uint8` from 0 to 255, or floats from -1 to 1
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for another number of images, and for images of different sizes that are to be compared by
    /// LPIPS; errors of the networks.
    pub fn add(&mut self, prompts: &[Prompt], images: &[Tensor]) -> Result<()> {
        if prompts.is_empty() || images.len() != prompts.len() * self.per_prompt {
            let found = format!("{} images of {} prompts", images.len(), prompts.len());
            let expected = format!("{} of each prompt", self.per_prompt);
            return Err(Invalid::new("images", found, expected).into());
        }
        for image in images {
            ddil_libtorch::ensure_dense("PromptMeter::add", "images", image)?;
        }
        let _no_grad = tch::no_grad_guard();
        let mut columns = Vec::new();
        if let Some(extractor) = self.networks.extractor {
            columns.push(extractor.extract(&prepared(images, extractor.input())?)?);
        }
        let mut cosines = vec![[0.0; 2]; images.len()];
        if let Some(clip) = self.networks.clip {
            columns.push(self.cosines(clip, prompts, images, &mut cosines)?);
        }
        let distances = self.distances(images)?;
        let others: Vec<f64> = cosines
            .iter()
            .enumerate()
            .flat_map(|(i, [cosine, truncated])| {
                [*cosine, *truncated, distances[i / self.per_prompt]]
            })
            .collect();
        columns.push(Tensor::from_slice(&others).view([-1, OTHERS]));
        let columns: Vec<Tensor> = columns
            .iter()
            .map(|column| column.to_device(Device::Cpu).to_kind(Kind::Float))
            .collect();
        let rows = Tensor::f_cat(&columns, 1).map_err(Error::torch("PromptMeter::add"))?;
        self.rows.push(&rows)
    }

    /// Embeddings of images; the cosine of each with its prompt, and 1 if that was truncated, are written to `found`.
    fn cosines(
        &self,
        clip: &CaptionScorer,
        prompts: &[Prompt],
        images: &[Tensor],
        found: &mut [[f64; 2]],
    ) -> Result<Tensor> {
        let of_images = clip.image_embeds(&prepared(images, clip.input())?)?;
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
        let captions = clip.text_embeds(&texts)?;
        let cosines = of_images.f_view([prompts.len() as i64, self.per_prompt as i64, -1]);
        let cosines = cosines.and_then(|images| {
            let products = images.f_mul(&captions.embeds.f_unsqueeze(1)?)?;
            let cosines = products.f_sum_dim_intlist([-1_i64].as_slice(), false, Kind::Double)?;
            Vec::<f64>::try_from(cosines.f_reshape([-1])?)
        });
        let cosines = cosines.map_err(Error::torch("PromptMeter::add"))?;
        for (i, (found, cosine)) in found.iter_mut().zip(cosines).enumerate() {
            *found = [cosine, f64::from(u8::from(captions.truncated[i / self.per_prompt]))];
        }
        Ok(of_images)
    }

    /// The LPIPS of each prompt; 0 without it.
    fn distances(&self, images: &[Tensor]) -> Result<Vec<f64>> {
        let groups = images.chunks(self.per_prompt);
        let Some(lpips) = self.networks.lpips.filter(|_| self.per_prompt > 1) else {
            return Ok(vec![0.0; groups.len()]);
        };
        groups
            .map(|images| {
                if images.iter().any(|image| image.size() != images[0].size()) {
                    let expected = "images of one size for each prompt";
                    return Err(Invalid::new("lpips", "images of different sizes", expected).into());
                }
                Ok(lpips.mean_pairwise(&prepared(images, &ImageInput::unchanged(3))?)?)
            })
            .collect()
    }

    /// The features of all images, `[n, dim]`, `Float`, on the CPU, if there is an extractor; and the means.
    ///
    /// # Errors
    ///
    /// Errors of libtorch, such as out of memory.
    pub fn finish(self) -> Result<(Option<Tensor>, PromptScores)> {
        let Self { networks, rows, per_prompt } = self;
        let [dim, width] = networks.widths();
        if rows.is_empty() {
            return Ok((None, PromptScores::default()));
        }
        let rows = rows.finish()?;
        let part = |start: i64, len: i64| {
            rows.f_narrow(1, start, len).map_err(Error::torch("PromptMeter::finish"))
        };
        let (features, embeds) = (part(0, dim)?, part(dim, width)?);
        // One row per prompt.
        let others = part(dim + width, OTHERS)?.f_to_kind(Kind::Double).and_then(|others| {
            let others = others.f_reshape([-1, per_prompt as i64, OTHERS])?;
            Vec::<Vec<f64>>::try_from(others.f_mean_dim([1_i64].as_slice(), false, Kind::Double)?)
        });
        let others = others.map_err(Error::torch("PromptMeter::finish"))?;
        let column = |index: usize| others.iter().map(|row| row[index]).collect::<Vec<f64>>();
        let clip_score = networks.clip.zip(MeanOverPrompts::of(&column(0)));
        let clip_score = clip_score.map(|(clip, cosine)| ClipScores {
            network: clip.id().to_owned(),
            input: clip.input().clone(),
            cosine,
            torchmetrics: (100.0 * cosine.mean).max(0.0),
            truncated_prompts: column(1).iter().sum::<f64>() as u32,
        });
        let k = per_prompt as i64;
        let lpips = networks.lpips.filter(|_| k > 1);
        let diversity = PromptDiversity {
            euclidean: over_groups(&features, k, mean_pairwise_distance)?,
            clip_cosine_distance: over_groups(&embeds, k, mean_cosine_distance)?,
            lpips: lpips.and_then(|_| MeanOverPrompts::of(&column(2))),
            lpips_network: lpips.map(|own| own.id().to_owned()),
        };
        let diversity = (diversity != PromptDiversity::default()).then_some(diversity);
        Ok(((dim > 0).then_some(features), PromptScores { clip_score, diversity }))
    }
}

/// Images as a batch of a network's input. Images of one size are converted at once.
fn prepared(images: &[Tensor], input: &ImageInput) -> Result<Tensor> {
    let op = "PromptMeter::add";
    let is_one_shape = images.iter().all(|image| image.size() == images[0].size());
    if is_one_shape {
        let batch = Tensor::f_cat(images, 0).map_err(Error::torch(op))?;
        return Ok(input.prepare(&batch)?);
    }
    let each: Vec<Tensor> =
        images.iter().map(|image| input.prepare(image)).collect::<ddil_metrics::Result<_>>()?;
    if each.iter().any(|image| image.size() != each[0].size()) {
        let expected = "images of one size: a network of features does not resize";
        return Err(Invalid::new("images", "images of different sizes", expected).into());
    }
    Tensor::f_cat(&each, 0).map_err(Error::torch(op))
}

/// The mean distance of every `k` consecutive rows; none for single images, and without columns.
fn over_groups(
    rows: &Tensor,
    k: i64,
    distance: impl Fn(&Tensor) -> ddil_metrics::Result<f64>,
) -> Result<Option<MeanOverPrompts>> {
    if k < 2 || rows.size()[1] == 0 {
        return Ok(None);
    }
    let groups = rows.f_split(k, 0).map_err(Error::torch("PromptMeter::finish"))?;
    let values: Vec<f64> = groups.iter().map(distance).collect::<ddil_metrics::Result<_>>()?;
    Ok(MeanOverPrompts::of(&values))
}
