//! How images match their prompts, and how much the images of one prompt differ.

use ddil_data::Prompt;
use ddil_files::Invalid;
use ddil_metrics::{
    FeatureExtractor, ImageInput, TorchScriptDistance, mean_cosine_distance, mean_pairwise_distance,
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::caption_score::CaptionScorer;
use crate::error::{Error, Result};

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

/// Measures images prompt by prompt: [`add`](Self::add) takes the images of some prompts, [`finish`](Self::finish)
/// returns the means. It keeps features and numbers, and no images.
#[derive(Default)]
pub struct PromptMeter<'a> {
    extractor: Option<&'a dyn FeatureExtractor>,
    clip: Option<&'a CaptionScorer>,
    lpips: Option<&'a TorchScriptDistance>,
    features: Vec<Tensor>,
    cosines: Vec<f64>,
    truncated: u32,
    distances: Distances,
}

/// One value per prompt.
#[derive(Default)]
struct Distances {
    euclidean: Vec<f64>,
    clip: Vec<f64>,
    lpips: Vec<f64>,
}

impl<'a> PromptMeter<'a> {
    /// A meter with what is given.
    pub fn new(
        extractor: Option<&'a dyn FeatureExtractor>,
        clip: Option<&'a CaptionScorer>,
        lpips: Option<&'a TorchScriptDistance>,
    ) -> Self {
        Self { extractor, clip, lpips, ..Self::default() }
    }

    /// Adds the images of some prompts, as many for each, those of a prompt one after the other.
    ///
    /// # Shapes and units
    ///
    /// - `images`: each `[1, 1 or 3, height, width]`, `Uint8` from 0 to 255, or floats from -1 to 1
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless there are as many images for each prompt, and for images of different sizes that are to
    /// be compared by LPIPS; errors of the networks.
    pub fn add(&mut self, prompts: &[Prompt], images: &[Tensor]) -> Result<()> {
        if prompts.is_empty() || images.is_empty() || !images.len().is_multiple_of(prompts.len()) {
            let found = format!("{} images of {} prompts", images.len(), prompts.len());
            return Err(Invalid::new("images", found, "as many for each prompt").into());
        }
        let k = images.len() / prompts.len();
        let _no_grad = tch::no_grad_guard();
        if let Some(extractor) = self.extractor {
            let features = extractor.extract(&prepared(images, extractor.input())?)?;
            let features = features.to_device(Device::Cpu).to_kind(Kind::Float);
            groups(&features, k, &mut self.distances.euclidean, mean_pairwise_distance)?;
            self.features.push(features);
        }
        if let Some(clip) = self.clip {
            self.add_cosines(clip, prompts, images)?;
        }
        if let Some(lpips) = self.lpips.filter(|_| k > 1) {
            for images in images.chunks(k) {
                if images.iter().any(|image| image.size()[2..] != images[0].size()[2..]) {
                    let expected = "images of one size for each prompt";
                    return Err(Invalid::new("lpips", "images of different sizes", expected).into());
                }
                let images = prepared(images, &ImageInput::unchanged(3))?;
                self.distances.lpips.push(lpips.mean_pairwise(&images)?);
            }
        }
        Ok(())
    }

    fn add_cosines(
        &mut self,
        clip: &CaptionScorer,
        prompts: &[Prompt],
        images: &[Tensor],
    ) -> Result<()> {
        let k = images.len() / prompts.len();
        let of_images = clip.image_embeds(&prepared(images, clip.input())?)?;
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
        let captions = clip.text_embeds(&texts)?;
        self.truncated += captions.truncated;
        groups(&of_images, k, &mut self.distances.clip, mean_cosine_distance)?;
        let shape = [prompts.len() as i64, k as i64, -1];
        let cosines = of_images.f_view(shape).and_then(|images| {
            let products = images.f_mul(&captions.embeds.f_unsqueeze(1)?)?;
            let cosines = products.f_sum_dim_intlist([-1_i64].as_slice(), false, Kind::Double)?;
            Vec::<f64>::try_from(cosines.f_mean_dim([1_i64].as_slice(), false, Kind::Double)?)
        });
        self.cosines.extend(cosines.map_err(Error::torch("PromptMeter::add"))?);
        Ok(())
    }

    /// The features of all images, `[n, dim]`, `Float`, on the CPU, if there is an extractor; and the means.
    ///
    /// # Errors
    ///
    /// Errors of libtorch, such as out of memory.
    pub fn finish(self) -> Result<(Option<Tensor>, PromptScores)> {
        let features = match self.features.as_slice() {
            [] => None,
            parts => Some(Tensor::f_cat(parts, 0).map_err(Error::torch("PromptMeter::finish"))?),
        };
        let clip_score = self.clip.zip(MeanOverPrompts::of(&self.cosines));
        let clip_score = clip_score.map(|(clip, cosine)| ClipScores {
            network: clip.id().to_owned(),
            input: clip.input().clone(),
            cosine,
            torchmetrics: (100.0 * cosine.mean).max(0.0),
            truncated_prompts: self.truncated,
        });
        let lpips = MeanOverPrompts::of(&self.distances.lpips);
        let diversity = PromptDiversity {
            euclidean: MeanOverPrompts::of(&self.distances.euclidean),
            clip_cosine_distance: MeanOverPrompts::of(&self.distances.clip),
            lpips_network: self.lpips.filter(|_| lpips.is_some()).map(|own| own.id().to_owned()),
            lpips,
        };
        let diversity = (diversity != PromptDiversity::default()).then_some(diversity);
        Ok((features, PromptScores { clip_score, diversity }))
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
    Tensor::f_cat(&each, 0).map_err(Error::torch(op))
}

/// Adds the mean distance of every `k` consecutive rows, if there is more than one.
fn groups(
    rows: &Tensor,
    k: usize,
    values: &mut Vec<f64>,
    distance: impl Fn(&Tensor) -> ddil_metrics::Result<f64>,
) -> Result<()> {
    if k > 1 {
        for group in rows.split(k as i64, 0) {
            values.push(distance(&group)?);
        }
    }
    Ok(())
}
