//! The data of a config before they are encoded.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::{Path, PathBuf};

use ddil_data::{
    CaptionedImage, Captions, EncodedDataset, EncodedShape, FashionMnist, ImageDataset,
    ImageFolder, LatentScaling, Prompt, TruncatedPrompts, cache_folder, read_captions,
    read_prompts,
};
use ddil_files::{Invalid, listed};
use ddil_metrics::FASHION_CLASSES;
use ddil_models::{AdditionEmbedType, ModelConfig, Placement, UNet2DConditionConfig};
use ddil_pipelines::{Pipeline, PipelineParts};
use tch::{Device, Kind, Tensor};

use super::encode::{Encoding, key};
use super::part::{chosen, part_of};
use super::{Samples, TrainingData};
use crate::config::{DataKind, DataSection, PromptsSection};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::teacher_classes::TeacherClasses;

/// Data that have been checked against a teacher but not yet encoded.
#[derive(Debug)]
pub(crate) struct DataSource {
    found: Found,
    /// Channels, height and width of the network's samples.
    shape: [i64; 3],
}

#[derive(Debug)]
enum Found {
    Images(ImageDataset),
    /// With the indices of the samples that are used, if not all.
    Encoded(EncodedDataset, Option<Vec<i64>>),
    Raw(Encoding),
}

impl DataSource {
    /// Pixels with labels, for a network that learns them.
    ///
    /// # Errors
    ///
    /// An error for missing or damaged data, with the place; [`Error::Invalid`] for text data.
    pub(crate) fn of_pixels(section: &DataSection) -> Result<Self> {
        Ok(Self::of_images(UsedImages::choose(section)?.read(section)?))
    }

    fn of_images(images: ImageDataset) -> Self {
        let shape = images.image_shape();
        Self { found: Found::Images(images), shape }
    }

    /// The data of a config, for a teacher. Images and texts are checked; [`open`](Self::open) encodes them.
    ///
    /// # Errors
    ///
    /// An error for data that are missing, damaged or do not fit the teacher, with the place; [`Error::Invalid`] for
    /// pixels if the teacher works on latents, and vice versa.
    pub(crate) fn find(section: &DataSection, teacher: &Pipeline) -> Result<Self> {
        let class = teacher.parts.class();
        if !class.is_text_to_image() {
            let used = UsedImages::choose(section)?;
            let given = given_classes(section, used.class_names())?;
            let images = used.read(section)?;
            return Ok(Self::of_images(labelled_for(images, given.as_ref(), teacher)?));
        }
        if !section.kind.is_text() {
            let expected =
                format!("captions, latents or prompts: the teacher is a {}", class.as_str());
            return invalid("data.kind", section.kind.as_str(), expected);
        }
        let shape = encoded_shape(teacher)?;
        let Some(path) = &section.path else {
            return invalid("data.path", "not set", "a folder, or a file of prompts");
        };
        if section.kind == DataKind::Latents {
            return Self::of_latents(section, path, &shape);
        }
        Self::raw(section, path, shape, teacher)
    }

    fn of_latents(section: &DataSection, path: &Path, shape: &EncodedShape) -> Result<Self> {
        let data = EncodedDataset::open(path, Some(shape))?;
        let Some(shape) = data.latent_shape() else {
            let expected =
                "a folder with latents.safetensors; for prompts alone, set data.kind = \"prompts\"";
            return invalid("data.path", path.display().to_string(), expected);
        };
        let chosen = chosen(data.len(), section)?;
        Ok(Self { found: Found::Encoded(data, chosen), shape })
    }

    fn raw(
        section: &DataSection,
        path: &Path,
        shape: EncodedShape,
        teacher: &Pipeline,
    ) -> Result<Self> {
        let factor = shape.pixels_per_latent;
        let [_, own_height, own_width] = teacher.card.image_shape;
        let own = [own_height, own_width].map(|side| side * factor);
        let size = section.size().unwrap_or(own);
        if size.iter().any(|side| *side < 1 || side % factor != 0) {
            let (value, expected) = match section.resolution {
                Some(side) => (side.to_string(), format!("a multiple of {factor}")),
                None => (
                    "not set".to_owned(),
                    "a size: the config of the teacher's U-Net has none".to_owned(),
                ),
            };
            return invalid("data.resolution", value, expected);
        }
        let (mut samples, images) = if section.kind == DataKind::Captions {
            (read_captions(path)?, Some(path.to_owned()))
        } else {
            (prompts_of(path, Captions::All)?, None)
        };
        if let Some(chosen) = chosen(samples.len() as i64, section)? {
            let all = samples;
            samples = chosen.iter().map(|index| all[*index as usize].clone()).collect();
        }
        let [height, width] = size.map(|side| side / factor);
        let of_latents = [shape.channels, height, width];
        let place = (section.cache.as_deref(), "data.cache");
        let encoding = encoding(samples, images, size, shape, place, teacher)?;
        Ok(Self { found: Found::Raw(encoding), shape: of_latents })
    }

    /// The prompts of a file, for a text-to-image teacher and images of the size of the data. They are checked here,
    /// and encoded when they are opened.
    ///
    /// # Errors
    ///
    /// An error for a file that is missing or damaged, with the place; [`Error::Invalid`] for data without text.
    pub(crate) fn prompt_file(
        &self,
        section: &PromptsSection,
        data: &DataSection,
        teacher: &Pipeline,
    ) -> Result<PromptFile> {
        let Some(path) = &section.path else {
            return invalid("prompts.path", "not set", "a file of prompts");
        };
        let size = match &self.found {
            Found::Images(_) => {
                let expected = "data or classes: the teacher takes no text";
                return invalid("prompts.source", section.source.as_str(), expected);
            }
            Found::Encoded(data, _) => data.info().image_size,
            Found::Raw(encoding) => encoding.size,
        };
        let samples = prompts_of(path, section.captions.unwrap_or_default())?;
        let beside = data.cache.as_deref().map(|cache| {
            let name = cache.file_name().unwrap_or_default().to_string_lossy();
            cache.with_file_name(format!("{name}-prompts"))
        });
        let cache = section.cache.as_deref().or(beside.as_deref());
        let place = (cache, "prompts.cache");
        encoding(samples, None, size, encoded_shape(teacher)?, place, teacher).map(PromptFile)
    }

    /// Number of samples.
    pub(crate) fn len(&self) -> i64 {
        match &self.found {
            Found::Images(images) => images.len(),
            Found::Encoded(data, chosen) => {
                chosen.as_ref().map_or(data.len(), |chosen| chosen.len() as i64)
            }
            Found::Raw(encoding) => encoding.samples.len() as i64,
        }
    }

    /// Channels, height and width of the network's samples.
    pub(crate) fn image_shape(&self) -> [i64; 3] {
        self.shape
    }

    /// Whether the samples are latents of images or prompts.
    pub(crate) fn is_encoded(&self) -> bool {
        !matches!(self.found, Found::Images(_))
    }

    /// Labels of the samples; none without labels.
    pub(crate) fn labels(&self) -> Option<&Tensor> {
        match &self.found {
            Found::Images(images) => images.labels(),
            Found::Encoded(..) | Found::Raw(_) => None,
        }
    }

    /// Whether the data define the conditioning of the empty prompt.
    pub(crate) fn has_empty_prompt(&self) -> bool {
        match &self.found {
            Found::Images(_) => false,
            Found::Encoded(data, _) => data.info().empty_prompt.is_some(),
            Found::Raw(_) => true,
        }
    }

    /// Whether there are samples, and not only prompts.
    pub(crate) fn has_samples(&self) -> bool {
        !matches!(&self.found, Found::Raw(Encoding { images: None, .. }))
    }

    /// The data for training; batches are on `device`.
    ///
    /// If the data have to be encoded and no cache contains them, the text encoders and the autoencoder of
    /// `pipeline_parts` are loaded, used and released.
    ///
    /// # Errors
    ///
    /// Errors for damaged data and of the encoders; [`Error::Interrupted`]; [`Error::Invalid`] if a batch is larger
    /// than the dataset.
    pub(crate) fn open(
        self,
        section: &DataSection,
        seed: u64,
        device: Device,
        encoders: Option<(&PipelineParts, Placement)>,
        interrupt: &Interrupt,
    ) -> Result<TrainingData> {
        self.ensure_batch_size(section.batch_size)?;
        let shape = self.shape;
        let samples = match self.found {
            Found::Images(images) => Samples::Images(images),
            Found::Encoded(data, chosen) => Samples::Encoded(Box::new(data), chosen),
            Found::Raw(encoding) => {
                let Some((parts, placement)) = encoders else {
                    let expected = "fashion_mnist or image_folder: the model takes no text";
                    return invalid("data.kind", section.kind.as_str(), expected);
                };
                let data = encoding.open(|| Ok(parts.text_to_image(placement)?), interrupt)?;
                Samples::Encoded(Box::new(data), None)
            }
        };
        if let Samples::Encoded(data, _) = &samples {
            warn_of_truncation(data);
        }
        TrainingData::new(samples, shape, section, seed, device)
    }

    /// Checks that a batch can be drawn.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if a batch is larger than the dataset.
    pub(crate) fn ensure_batch_size(&self, batch: u32) -> Result<()> {
        let len = self.len();
        if i64::from(batch) <= len {
            return Ok(());
        }
        let expected = format!("at most {len}, the number of samples");
        invalid("data.batch_size", batch.to_string(), expected)
    }
}

/// A file of prompts that has been checked but not yet encoded.
#[derive(Debug)]
pub(crate) struct PromptFile(Encoding);

impl PromptFile {
    /// The encoded prompts, from a cache if there is one.
    ///
    /// # Errors
    ///
    /// As [`DataSource::open`].
    pub(crate) fn open(
        &self,
        (parts, placement): (&PipelineParts, Placement),
        interrupt: &Interrupt,
    ) -> Result<EncodedDataset> {
        let data = self.0.open(|| Ok(parts.text_to_image(placement)?), interrupt)?;
        warn_of_truncation(&data);
        Ok(data)
    }
}

/// What is to be encoded, and its cache: a folder that a setting names, or one of the user's.
fn encoding(
    samples: Vec<CaptionedImage>,
    images: Option<PathBuf>,
    size: [i64; 2],
    shape: EncodedShape,
    (cache, setting): (Option<&Path>, &'static str),
    teacher: &Pipeline,
) -> Result<Encoding> {
    let key = key(&samples, images.as_deref(), size, &teacher.parts)?;
    // Long enough to avoid collisions.
    let in_cache = || cache_folder().join("encoded").join(&key[..32]);
    let folder = cache.map_or_else(in_cache, Path::to_owned);
    let encoding = Encoding { samples, images, size, shape, folder, setting, key };
    encoding.ensure_cache()?;
    Ok(encoding)
}

/// All images of pixel data, with the labels of their own classes; scaled if the config has a resolution.
///
/// # Errors
///
/// An error for missing or damaged data, with the place; [`Error::Invalid`] for text data.
pub fn read_images(section: &DataSection) -> Result<ImageDataset> {
    match (section.kind, &section.path) {
        (DataKind::FashionMnist, _) => Ok(read_fashion_mnist(section)?.train),
        (DataKind::ImageFolder, Some(path)) => {
            read_folder(&ImageFolder::open(path)?, section.size())
        }
        (DataKind::ImageFolder, None) => invalid("data.path", "not set", "a folder of images"),
        (kind, _) => {
            let expected = "fashion_mnist or image_folder: the model takes no text";
            invalid("data.kind", kind.as_str(), expected)
        }
    }
}

/// The images that a config uses of a data set, with the labels of a model, as a distillation of it has them.
///
/// # Errors
///
/// [`Error::Invalid`] with the setting, and for a class that the model does not know.
pub fn images_for(
    images: &ImageDataset,
    section: &DataSection,
    model: &Pipeline,
) -> Result<ImageDataset> {
    let given = given_classes(section, images.class_names())?;
    labelled_for(part_of(images.shallow_clone(), section)?, given.as_ref(), model)
}

/// The labels, those of a model, of the images that a config uses; no image is read. None for data without labels.
///
/// # Errors
///
/// An error for missing data, with the place; as [`images_for`].
pub fn labels_for(section: &DataSection, model: &Pipeline) -> Result<Option<Vec<i64>>> {
    let (labels, names) = match (section.kind, &section.path) {
        (DataKind::FashionMnist, path) => {
            let names = FASHION_CLASSES.map(str::to_owned).to_vec();
            (FashionMnist::train_labels(path.as_deref())?, names)
        }
        (DataKind::ImageFolder, Some(path)) => {
            let files = ImageFolder::open(path)?;
            let Some(labels) = files.labels() else { return Ok(None) };
            (Tensor::from_slice(labels), files.class_names().to_vec())
        }
        _ => return Ok(None),
    };
    let op = || Error::torch("labels_for");
    // One pixel stands for each image.
    let pixels = Tensor::f_zeros([labels.size()[0], 1, 1, 1], (Kind::Uint8, Device::Cpu));
    let images = ImageDataset::with_class_names(&pixels.map_err(op())?, Some(&labels), names)?;
    let images = images_for(&images, section, model)?;
    images.labels().map(Vec::try_from).transpose().map_err(op())
}

/// The images with the labels of a model; `given` is the model's class of each class of the data, by name.
fn labelled_for(
    images: ImageDataset,
    given: Option<&BTreeMap<String, String>>,
    model: &Pipeline,
) -> Result<ImageDataset> {
    let Some(classes) = TeacherClasses::of(model) else {
        let expected = "no value: the teacher has no classes";
        return if given.is_some() { invalid("data.classes", "set", expected) } else { Ok(images) };
    };
    if images.labels().is_none() {
        return Ok(images);
    }
    let labels = classes.map(images.class_names(), given)?;
    Ok(images.relabelled(&labels, classes.all_names())?)
}

/// Fashion-MNIST at the resolution of a config, with its test images.
///
/// # Errors
///
/// An error for missing or damaged data, with the place; [`Error::Invalid`] for an invalid resolution.
pub fn read_fashion_mnist(section: &DataSection) -> Result<FashionMnist> {
    let data = FashionMnist::from_folder(section.path.as_deref())?;
    match section.size() {
        Some(size) => data.scaled(size).map_err(|error| of_resolution(error, size)),
        None => Ok(data),
    }
}

/// The part of pixel data that a config uses. Of a folder, the files are chosen before any is read.
enum UsedImages {
    /// All files, and those of the part.
    Files { all: ImageFolder, part: ImageFolder },
    /// All images.
    Images(ImageDataset),
}

impl UsedImages {
    fn choose(section: &DataSection) -> Result<Self> {
        Ok(match (section.kind, &section.path) {
            (DataKind::ImageFolder, Some(path)) => {
                let all = ImageFolder::open(path)?;
                Self::Files { part: part_of(all.clone(), section)?, all }
            }
            _ => Self::Images(read_images(section)?),
        })
    }

    /// The classes of all the data, by label.
    fn class_names(&self) -> &[String] {
        match self {
            Self::Files { all, .. } => all.class_names(),
            Self::Images(images) => images.class_names(),
        }
    }

    fn read(self, section: &DataSection) -> Result<ImageDataset> {
        match self {
            Self::Files { part, .. } => read_folder(&part, section.size()),
            Self::Images(images) => part_of(images, section),
        }
    }
}

fn read_folder(files: &ImageFolder, size: Option<[i64; 2]>) -> Result<ImageDataset> {
    let Some(size) = size else {
        return files.read().map_err(|error| match error {
            ddil_data::Error::Differs { path, found, expected } => {
                let value = format!("not set, and {} is {found}", path.display());
                let expected = format!(
                    "images that are all {expected}, or a height and width to scale them to"
                );
                Error::Invalid(Invalid::new("data.resolution", value, expected))
            }
            error => error.into(),
        });
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    files.read_scaled(size, threads).map_err(|error| of_resolution(error, size))
}

/// An error of a size as one of the setting.
fn of_resolution(error: ddil_data::Error, [side, _]: [i64; 2]) -> Error {
    match error {
        ddil_data::Error::Invalid(Invalid { expected, .. }) => {
            Error::Invalid(Invalid::new("data.resolution", side, expected))
        }
        error => error.into(),
    }
}

/// The teacher's class of each class of the data, by name, if the config gives them.
fn given_classes(
    section: &DataSection,
    own: &[String],
) -> Result<Option<BTreeMap<String, String>>> {
    let given = &section.classes;
    if given.is_empty() {
        return Ok(None);
    }
    if given.len() != own.len() {
        let expected = match own {
            [] => "no value: the data have no classes".to_owned(),
            own => format!("{} names, one for each class of the data: {}", own.len(), listed(own)),
        };
        return invalid("data.classes", format!("{} names", given.len()), expected);
    }
    Ok(Some(own.iter().cloned().zip(given.iter().cloned()).collect()))
}

/// The prompts of a file as samples without images.
fn prompts_of(path: &Path, captions: Captions) -> Result<Vec<CaptionedImage>> {
    let sample = |prompt: Prompt| {
        // No image is read; the texts alone identify the encoded prompts.
        CaptionedImage { file_name: PathBuf::new(), texts: vec![prompt.text] }
    };
    Ok(read_prompts(path, captions)?.into_iter().map(sample).collect())
}

/// Logs a warning if prompts are longer than the encoders' context.
fn warn_of_truncation(data: &EncodedDataset) {
    let info = data.info();
    let Some(TruncatedPrompts { count, prompt, cut_off }) = &info.truncated else { return };
    let total = info.num_prompts - i64::from(info.empty_prompt.is_some());
    tracing::warn!(
        "{count} of {total} prompts are longer than the text encoder's input and were cut; of {prompt:?}, {cut_off:?} \
         was cut off"
    );
}

/// The conditioning of a text-to-image teacher.
fn encoded_shape(teacher: &Pipeline) -> Result<EncodedShape> {
    let config = match teacher.network.config() {
        ModelConfig::UNet2DCondition(config) => config,
        other => {
            let expected = "UNet2DConditionModel, which a text-to-image pipeline requires";
            return invalid("teacher's unet", other.class_name(), expected);
        }
    };
    let Some(text_width) = config.cross_attention_dim.at(0).map(i64::from) else {
        return invalid("teacher's cross_attention_dim", "empty", "a width");
    };
    let vae = teacher.parts.autoencoder_config()?;
    let channels = i64::from(vae.latent_channels);
    if [config.in_channels, config.out_channels].map(i64::from) != [channels; 2] {
        let value = format!("{}, {}", config.in_channels, config.out_channels);
        let expected = format!("{channels}, the number of channels of its autoencoder's latents");
        return invalid("teacher's in_channels, out_channels", value, expected);
    }
    Ok(EncodedShape {
        image_channels: i64::from(vae.in_channels),
        channels,
        pixels_per_latent: 1 << (vae.block_out_channels.len() - 1),
        scaling: LatentScaling {
            factor: vae.scaling_factor,
            shift: vae.shift_factor,
            mean: vae.latents_mean,
            std: vae.latents_std,
        },
        text_width,
        pooled_width: pooled_width(&config),
    })
}

/// Width of `text_embeds`: the input width of the projection minus that of the size and crop embeddings.
fn pooled_width(config: &UNet2DConditionConfig) -> Option<i64> {
    if config.addition_embed_type != Some(AdditionEmbedType::TextTime) {
        return None;
    }
    let width = i64::from(config.projection_class_embeddings_input_dim?);
    Some(width - 6 * i64::from(config.addition_time_embed_dim?))
}

fn invalid<T>(field: &str, value: impl Into<String>, expected: impl Into<String>) -> Result<T> {
    let (value, expected) = (value.into(), expected.into());
    Err(Error::Invalid(Invalid::new(field, value, expected)))
}
