//! Image generation with a builder.

use std::path::Path;

use ddil_files::Invalid;
use ddil_models::Placement;
use ddil_schedulers::SolverConfig;
use tch::{Device, Tensor};

use crate::guidance::Guidance;
use crate::pipeline::{Pipeline, TextToImageComponents};
use crate::prompting::{
    PromptRequest, decode, sample_latents, with_published_solver, with_published_timesteps,
};
use crate::sampling::{SamplePlan, class_conditioning, generate, initial_noise};
use crate::{Precision, Result};

/// A text-to-image model in memory: U-Net, tokenizers, text encoders and autoencoder.
///
/// # Example
///
/// ```
/// use ddil_models::Placement;
/// use ddil_pipelines::TextToImage;
///
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-text-to-image");
/// let model = TextToImage::open(path, Placement::default())?;
/// let images = model.prompt("a sneaker").steps(2).images()?;
/// assert_eq!(images.size()[0], 1);
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
#[derive(Debug)]
pub struct TextToImage {
    pipeline: Pipeline,
    components: TextToImageComponents,
}

impl TextToImage {
    /// Reads a diffusers model folder (Stable Diffusion 1, 2 and XL, latent consistency) or the export of a run, in
    /// single precision.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModel`](crate::Error::NotAModel) if the folder contains no model,
    /// [`Error::Invalid`](crate::Error::Invalid) if it is not a text-to-image model; otherwise the error of the file
    /// that could not be read.
    pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        Self::open_in(path, placement, Precision::default())
    }

    /// As [`open`](Self::open), with network calls in `precision`.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_in(
        path: impl AsRef<Path>,
        placement: Placement,
        precision: Precision,
    ) -> Result<Self> {
        let path = path.as_ref();
        let class = Pipeline::class_at(path)?;
        if !class.is_text_to_image() {
            let expected = "a text-to-image pipeline; `ClassToImage` opens pixel-space models";
            return Err(Invalid::new(path.display().to_string(), class.as_str(), expected).into());
        }
        Pipeline::open(path, placement, precision)?.try_into()
    }

    /// The pipeline: network, scheduler and card.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Tokenizers, text encoders and autoencoder.
    pub fn components(&self) -> &TextToImageComponents {
        &self.components
    }

    /// A request for one image of one prompt.
    pub fn prompt(&self, prompt: impl Into<String>) -> PromptImages<'_> {
        self.prompts([prompt])
    }

    /// A request for one image per prompt.
    pub fn prompts<P: Into<String>>(
        &self,
        prompts: impl IntoIterator<Item = P>,
    ) -> PromptImages<'_> {
        let request = PromptRequest {
            prompts: prompts.into_iter().map(Into::into).collect(),
            negative_prompt: None,
            size: [None; 2],
            per_prompt: 1,
        };
        PromptImages { model: self, request, options: Options::default() }
    }
}

impl TryFrom<Pipeline> for TextToImage {
    type Error = crate::Error;

    /// Reads the components of an open pipeline.
    fn try_from(pipeline: Pipeline) -> Result<Self> {
        let components = pipeline.parts.text_to_image(pipeline.network.placement())?;
        Ok(Self { pipeline, components })
    }
}

/// Sampling settings that override the defaults of the model.
#[derive(Clone, Debug, Default)]
struct Options {
    steps: Option<u32>,
    guidance_scale: Option<f64>,
    batch_size: Option<u32>,
    solver: Option<SolverConfig>,
    seed: u64,
}

impl Options {
    fn plan(&self, pipeline: &Pipeline) -> Result<SamplePlan> {
        let plan = SamplePlan::of(pipeline, self.steps);
        let plan = SamplePlan {
            guidance_scale: self.guidance_scale.unwrap_or(plan.guidance_scale),
            batch_size: self.batch_size.unwrap_or(plan.batch_size).max(1),
            seed: self.seed,
            solver: self.solver.clone(),
            ..plan
        };
        with_published_solver(pipeline, plan)
    }
}

/// Methods of both requests.
macro_rules! option_methods {
    () => {
        /// Number of steps; the default is 50 for a teacher, and the number it was trained for for a student.
        pub fn steps(mut self, steps: u32) -> Self {
            self.options.steps = Some(steps);
            self
        }

        /// Scale of classifier-free guidance; 1 is no guidance. The default depends on the model.
        pub fn guidance_scale(mut self, scale: f64) -> Self {
            self.options.guidance_scale = Some(scale);
            self
        }

        /// Seed of the noise; default 0. The same seed gives the same images.
        pub fn seed(mut self, seed: u64) -> Self {
            self.options.seed = seed;
            self
        }

        /// A multistep solver, for a teacher. The default is the solver in the model's scheduler file, or else DDIM.
        pub fn solver(mut self, solver: SolverConfig) -> Self {
            self.options.solver = Some(solver);
            self
        }

        /// Samples per call of the network: affects memory and speed, and the images only by rounding.
        pub fn batch_size(mut self, batch_size: u32) -> Self {
            self.options.batch_size = Some(batch_size);
            self
        }
    };
}

/// A request for images from prompts; see [`TextToImage::prompt`].
#[derive(Clone, Debug)]
#[must_use = "nothing is generated before `images` is called"]
pub struct PromptImages<'a> {
    model: &'a TextToImage,
    request: PromptRequest,
    options: Options,
}

impl PromptImages<'_> {
    option_methods!();

    /// The negative prompt of guidance; the default is the model's empty prompt.
    pub fn negative_prompt(mut self, prompt: impl Into<String>) -> Self {
        self.request.negative_prompt = Some(prompt.into());
        self
    }

    /// Height and width in pixels; the default is the size that the model was trained on.
    pub fn size(mut self, height: u32, width: u32) -> Self {
        self.request.size = [Some(height), Some(width)];
        self
    }

    /// Images per prompt; default 1.
    pub fn images_per_prompt(mut self, n: u32) -> Self {
        self.request.per_prompt = n;
        self
    }

    /// Generates the images. A prompt longer than the context of the text encoder is truncated, with a warning in the
    /// log.
    ///
    /// # Shapes and units
    ///
    /// - returns: `[prompts * images_per_prompt, channels, height, width]`, `Float`, about `[-1, 1]`, on the CPU; the
    ///   images of a prompt are consecutive
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for a size, number of steps or guidance that the model does not
    /// support.
    pub fn images(self) -> Result<Tensor> {
        let TextToImage { pipeline, components } = self.model;
        let plan = with_published_timesteps(pipeline, self.options.plan(pipeline)?)?;
        let request = self.request.encode(pipeline, components, &plan)?;
        for (prompt, cut_off) in &request.truncated {
            tracing::warn!(
                "the text encoder truncates the prompt {prompt:?}: {cut_off:?} is ignored"
            );
        }
        let latents = sample_latents(pipeline, &plan, &request, &|| ())?;
        decode(components, &latents, plan.batch_size)
    }
}

/// A pixel-space model in memory, class-conditional or unconditional.
///
/// # Example
///
/// ```
/// use ddil_models::Placement;
/// use ddil_pipelines::ClassToImage;
///
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/fashion-mnist-teacher");
/// let model = ClassToImage::open(path, Placement::default())?;
/// let images = model.samples(2).class("Sneaker").steps(2).images()?;
/// assert_eq!(images.size(), [2, 1, 32, 32]);
/// # Ok::<(), ddil_pipelines::Error>(())
/// ```
#[derive(Debug)]
pub struct ClassToImage {
    pipeline: Pipeline,
}

impl ClassToImage {
    /// Reads a diffusers model folder (`DDIMPipeline`, `DDPMPipeline`) or the export of a run, in single precision.
    ///
    /// # Errors
    ///
    /// As [`TextToImage::open`], with [`Error::Invalid`](crate::Error::Invalid) for a text-to-image model.
    pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        Self::open_in(path, placement, Precision::default())
    }

    /// As [`open`](Self::open), with network calls in `precision`.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_in(
        path: impl AsRef<Path>,
        placement: Placement,
        precision: Precision,
    ) -> Result<Self> {
        let path = path.as_ref();
        let class = Pipeline::class_at(path)?;
        if class.is_text_to_image() {
            let expected = "a pixel-space pipeline; `TextToImage` opens text-to-image models";
            return Err(Invalid::new(path.display().to_string(), class.as_str(), expected).into());
        }
        Ok(Self { pipeline: Pipeline::open(path, placement, precision)? })
    }

    /// The pipeline: network, scheduler and card.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Names of the classes, by label; empty for an unconditional model.
    pub fn class_names(&self) -> &[String] {
        &self.pipeline.card.class_names
    }

    /// A request for `n` images; the default cycles through the classes.
    pub fn samples(&self, n: u32) -> ClassImages<'_> {
        ClassImages { model: self, n, class: None, options: Options::default() }
    }
}

/// A request for images of classes; see [`ClassToImage::samples`].
#[derive(Clone, Debug)]
#[must_use = "nothing is generated before `images` is called"]
pub struct ClassImages<'a> {
    model: &'a ClassToImage,
    n: u32,
    class: Option<String>,
    options: Options,
}

impl ClassImages<'_> {
    option_methods!();

    /// Generates only this class, given by its name or its label; the default cycles through all classes.
    pub fn class(mut self, class: impl Into<String>) -> Self {
        self.class = Some(class.into());
        self
    }

    fn label(&self) -> Result<Option<i64>> {
        let Some(class) = &self.class else { return Ok(None) };
        let names = self.model.class_names();
        let by_label = || class.parse().ok().filter(|label: &usize| *label < names.len());
        match names.iter().position(|name| name == class).or_else(by_label) {
            Some(label) => Ok(Some(label as i64)),
            None if names.is_empty() => {
                Err(Invalid::new("class", class, "left out: the model has no classes").into())
            }
            None => {
                let known = names.join(", ");
                let expected = format!("one of {known}, or a label below {}", names.len());
                Err(Invalid::new("class", class, expected).into())
            }
        }
    }

    /// Generates the images.
    ///
    /// # Shapes and units
    ///
    /// - returns: `[n, channels, height, width]`, `Float`, about `[-1, 1]`, on the CPU
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for zero images, for an unknown class, and for a number of steps or
    /// guidance that the model does not support.
    pub fn images(self) -> Result<Tensor> {
        if self.n == 0 {
            return Err(Invalid::new("samples", 0, "at least 1").into());
        }
        let pipeline = &self.model.pipeline;
        let plan = self.options.plan(pipeline)?;
        let device = pipeline.network.placement().device;
        let noise = initial_noise(plan.seed, self.n, pipeline.card.image_shape, device)?;
        let conditioning = class_conditioning(&pipeline.card, self.n, self.label()?, device);
        let guidance = Guidance::of_classes(&pipeline.card);
        let images = generate(&pipeline.network, &plan, &guidance, &noise, &conditioning)?;
        images.f_to_device(Device::Cpu).map_err(crate::Error::torch("ClassImages::images"))
    }
}
