//! Networks of features in transformers folders: CLIP and `DINOv2`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ddil_files::{Invalid, hex, read_json};
use ddil_metrics::{FeatureExtractor, ImageInput};
use ddil_models::weights::WeightFiles;
use ddil_models::{
    ClipModel, ClipVisionClass, ClipVisionModel, Dinov2Model, Placement, UnknownKeys,
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::preprocessor;

/// The settings of a network, in its folder.
const CONFIG: &str = "config.json";

/// The kinds of networks that a transformers folder may contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NetworkClass {
    /// Both towers of CLIP.
    Clip,
    /// CLIP's vision tower alone.
    ClipVision,
    /// `DINOv2`.
    Dinov2,
}

impl NetworkClass {
    /// The class of the network in a folder, by `model_type` in its `config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the setting `field` for a folder without a known network; errors of the file.
    pub(crate) fn in_folder(folder: &Path, field: &str) -> Result<Self> {
        let known = "a transformers folder of CLIP or DINOv2: config.json with model_type `clip`, `clip_vision_model` \
                     or `dinov2`, and model.safetensors";
        let path = folder.join(CONFIG);
        if !path.is_file() {
            let found = format!("{}, a folder without config.json", folder.display());
            return Err(Invalid::new(field, found, known).into());
        }
        let config: Value = read_json(&path)?;
        match config.get("model_type").and_then(Value::as_str) {
            Some("clip") => Ok(Self::Clip),
            Some("clip_vision_model") => Ok(Self::ClipVision),
            Some("dinov2") => Ok(Self::Dinov2),
            other => {
                let found = other.map_or("without model_type".to_owned(), |name| {
                    format!("with model_type `{name}`")
                });
                let found = format!("{}, {found}", path.display());
                Err(Invalid::new(field, found, known).into())
            }
        }
    }
}

#[derive(Debug)]
enum Network {
    Clip(Box<ClipModel>),
    ClipVision(ClipVisionModel),
    Dinov2(Dinov2Model),
}

/// CLIP's vision tower or `DINOv2` from a transformers folder, as an extractor of features.
///
/// Images are converted as `preprocessor_config.json` of the folder describes, or else as published for the network:
/// see [`input`](FeatureExtractor::input). Pixels are rounded to 8 bits after resizing, as by transformers.
///
/// | `model_type` | features | the id begins with |
/// | --- | --- | --- |
/// | `clip` | projected image embeddings, not normalised | `clip-embeddings` |
/// | `clip_vision_model` | the same; without a projection, the class token after the final norm | `clip-embeddings`, `clip-pooled` |
/// | `dinov2` | the class token after the final norm | `dinov2-class-token` |
///
/// The id ends with the SHA-256 of the weights' file, of all shards if there are several.
///
/// # Example
///
/// ```
/// use ddil_evaluate::FolderExtractor;
/// use ddil_metrics::FeatureExtractor;
/// use tch::{Device, Tensor, kind};
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/models/dinov2");
/// let network = FolderExtractor::from_folder(folder, None, Device::Cpu)?;
/// let images = Tensor::zeros([2, 3, 40, 50], kind::FLOAT_CPU);
/// assert_eq!(network.features(&images)?.size(), [2, network.dim()]);
/// # Ok::<(), ddil_evaluate::Error>(())
/// ```
#[derive(Debug)]
pub struct FolderExtractor {
    network: Network,
    input: ImageInput,
    dim: i64,
    id: String,
    device: Device,
}

impl FolderExtractor {
    /// Loads the network of a folder, in single precision; `input` replaces the folder's own conversion of images.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the setting `extractor` for a folder that contains no such network, and `extractor_input`
    /// for an input that the network does not take; errors of the files.
    pub fn from_folder(
        folder: impl AsRef<Path>,
        input: Option<ImageInput>,
        device: Device,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        let place = Placement { device, ..Placement::default() };
        let keys = UnknownKeys::Refuse;
        let network = match NetworkClass::in_folder(folder, "extractor")? {
            NetworkClass::Clip => {
                Network::Clip(Box::new(ClipModel::from_folder(folder, place, keys)?))
            }
            NetworkClass::ClipVision => {
                Network::ClipVision(ClipVisionModel::from_folder(folder, place, keys)?)
            }
            NetworkClass::Dinov2 => Network::Dinov2(Dinov2Model::from_folder(folder, place, keys)?),
        };
        let input = network.images().input(folder, input)?;
        let (name, dim) = network.features();
        let id = format!("{name}-{}", sha256_of_weights(folder)?);
        Ok(Self { network, input, dim, id, device })
    }
}

/// The images that a network takes.
struct Images {
    channels: i64,
    /// The side of square images; none if the size is free.
    side: Option<i64>,
    /// The least side.
    least: i64,
}

impl Network {
    /// The name of the features, and their number.
    fn features(&self) -> (&'static str, i64) {
        let projects = |tower: &ClipVisionModel| {
            tower.config().architectures == [ClipVisionClass::VisionModelWithProjection]
        };
        let (name, dim) = match self {
            Self::Clip(both) => ("clip-embeddings", both.vision().config().projection_dim),
            Self::ClipVision(tower) if projects(tower) => {
                ("clip-embeddings", tower.config().projection_dim)
            }
            Self::ClipVision(tower) => ("clip-pooled", tower.config().hidden_size),
            Self::Dinov2(network) => ("dinov2-class-token", network.config().hidden_size),
        };
        (name, dim.into())
    }

    fn images(&self) -> Images {
        let of_clip = |tower: &ClipVisionModel| {
            let config = tower.config();
            let side = i64::from(config.image_size);
            Images { channels: config.num_channels.into(), side: Some(side), least: side }
        };
        match self {
            Self::Clip(both) => of_clip(both.vision()),
            Self::ClipVision(tower) => of_clip(tower),
            Self::Dinov2(network) => {
                let config = network.config();
                let (channels, least) = (config.num_channels.into(), config.patch_size.into());
                Images { channels, side: None, least }
            }
        }
    }

    fn forward(&self, pixels: &Tensor) -> ddil_models::Result<Tensor> {
        // Projected embeddings, or the class token of a tower without a projection.
        let embeddings = |tower: &ClipVisionModel| {
            let output = tower.forward(pixels)?;
            Ok(output.image_embeds.unwrap_or(output.pooled))
        };
        match self {
            Self::Dinov2(network) => Ok(network.forward(pixels)?.pooled),
            Self::Clip(both) => embeddings(both.vision()),
            Self::ClipVision(tower) => embeddings(tower),
        }
    }
}

impl Images {
    /// The given conversion, that of the folder, or the published one; checked to fit.
    fn input(&self, folder: &Path, given: Option<ImageInput>) -> Result<ImageInput> {
        let own =
            || match (preprocessor::input_in(folder, self.channels, "extractor_input")?, self.side)
            {
                (Some(own), _) => Ok(own),
                (None, Some(side)) => Ok(ImageInput::clip(side)),
                (None, None) => {
                    let mut input = ImageInput::imagenet();
                    input.rounded = true;
                    Ok::<_, Error>(input)
                }
            };
        let input = given.map_or_else(own, Ok)?;
        input.ensure_valid()?;
        if input.channels != self.channels {
            let expected = format!("{}, as in {}", self.channels, folder.join(CONFIG).display());
            let found = format!("{} channels", input.channels);
            return Err(Invalid::new("extractor_input", found, expected).into());
        }
        let fits = input.resize.size().is_some_and(|size| match self.side {
            Some(side) => size == [side; 2],
            None => size.iter().all(|side| *side >= self.least),
        });
        if fits {
            return Ok(input);
        }
        let expected = match self.side {
            Some(side) => format!("one to {side}x{side} pixels, which the network requires"),
            None => format!(
                "one to a fixed size of at least {least}x{least} pixels",
                least = self.least
            ),
        };
        let found = format!("resize `{}`", input.resize);
        Err(Invalid::new("extractor_input", found, expected).into())
    }
}

impl FeatureExtractor for FolderExtractor {
    fn input(&self) -> &ImageInput {
        &self.input
    }

    fn extract(&self, prepared: &Tensor) -> ddil_metrics::Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let pixels = prepared.f_to_device(self.device).map_err(|error| {
            let message = error.to_string().lines().next().unwrap_or_default().to_owned();
            ddil_metrics::Error::Torch { op: "FolderExtractor::extract", message }
        })?;
        self.network.forward(&pixels).map_err(|source| ddil_metrics::Error::Network {
            id: self.id.clone(),
            source: source.into(),
        })
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn dim(&self) -> i64 {
        self.dim
    }
}

/// The SHA-256 of the file of a folder's weights, or of all shards one after the other.
pub(crate) fn sha256_of_weights(folder: &Path) -> Result<String> {
    let path = WeightFiles::of_transformers(folder)?;
    let mut shards: Vec<PathBuf> = Vec::new();
    if path.extension().is_some_and(|extension| extension == "json") {
        let index: Value = read_json(&path)?;
        let names = index.get("weight_map").and_then(Value::as_object);
        let names: BTreeSet<&str> =
            names.into_iter().flatten().filter_map(|(_, name)| name.as_str()).collect();
        shards.extend(names.into_iter().map(|name| folder.join(name)));
    } else {
        shards.push(path);
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for shard in shards {
        let mut file = File::open(&shard).map_err(ddil_files::Error::io("open", &shard))?;
        loop {
            let read = file.read(&mut buffer).map_err(ddil_files::Error::io("read", &shard))?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
        }
    }
    Ok(hex(&hash.finalize()))
}
