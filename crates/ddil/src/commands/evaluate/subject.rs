//! What is measured.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use ddil_data::ImageFiles;
use ddil_pipelines::{Pipeline, SamplePlan};
use tch::Tensor;

use crate::cli::EvaluateArgs;
use crate::commands::model_source::ModelSource;
use crate::commands::{open_model, set_threads};
use crate::sample_file;

/// A model that is measured.
pub(super) struct Model {
    pub(super) source: ModelSource,
    pub(super) pipeline: Pipeline,
    /// How it is sampled, by default.
    pub(super) plan: SamplePlan,
}

/// What is measured.
pub(super) enum Subject {
    /// The data itself.
    Data,
    /// A model.
    Model(Box<Model>),
    /// Samples in files, `[n, channels, height, width]` in `[-1, 1]`.
    Samples(Tensor),
    /// A folder of images.
    Files(ImageFiles),
}

impl Subject {
    pub(super) fn open(args: &EvaluateArgs) -> anyhow::Result<Self> {
        let path = args.subject.as_path();
        let source = if path == Path::new("data") { None } else { ModelSource::find(path)? };
        ensure!(
            path == Path::new("data") || source.is_some() || path.is_dir(),
            "{} is not a folder; expected a model folder, a run folder, a checkpoint of a run, a folder of images, or `data`",
            path.display()
        );
        if let Some(source) = source {
            let (pipeline, plan) = open_model(&source, &args.sampling)?;
            let has_prompts = args.prompting.prompts.is_some();
            match (pipeline.parts.class().is_text_to_image(), has_prompts) {
                (true, false) => bail!(
                    "{} is a text-to-image model; give it prompts with --prompts FILE",
                    path.display()
                ),
                (false, true) => bail!("--prompts: {} takes no prompts", path.display()),
                _ => {}
            }
            return Ok(Self::Model(Box::new(Model { source, pipeline, plan })));
        }
        set_threads(args.sampling.threads)?;
        if path == Path::new("data") {
            ensure!(
                args.prompting.prompts.is_none(),
                "--prompts is for a text-to-image model or a folder of images, and not for `data`"
            );
            Ok(Self::Data)
        } else if sample_file::list(path).is_empty() {
            let files = ImageFiles::in_folder(path).with_context(|| {
                format!("{} is neither a model folder nor a folder of images", path.display())
            })?;
            Ok(Self::Files(files))
        } else {
            Ok(Self::Samples(sample_file::read_folder(path)?))
        }
    }

    /// Channels, height and width of all images; of a folder those of the first image, if `of_first`.
    pub(super) fn image_shape(&self, of_first: bool) -> anyhow::Result<Option<[i64; 3]>> {
        let of = |images: &Tensor| {
            let size = images.size();
            Some([size[1], size[2], size[3]])
        };
        Ok(match self {
            // Their shape is that of a latent.
            Self::Model(model) if model.pipeline.parts.class().is_text_to_image() => None,
            Self::Model(model) => Some(model.pipeline.card.image_shape),
            Self::Samples(images) => of(images),
            Self::Files(files) if of_first => of(&files.image(0)?),
            Self::Data | Self::Files(_) => None,
        })
    }
}
