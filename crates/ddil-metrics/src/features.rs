//! Feature extractors of images.

use std::path::{Path, PathBuf};

use ddil_files::{Invalid, hex};
use ddil_libtorch::{ArgumentError, ensure_script_archive};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{CModule, Device, IValue, Kind, Tensor};

use crate::error::{Error, Result, ensure_numbers, first_line, torch};
use crate::image_input::{ImageInput, Resize, ensure_images};

/// Number of images per forward pass.
const IMAGES_AT_ONCE: i64 = 256;

/// Computes the features of images that metrics compare.
///
/// [`input`](Self::input) converts images, one by one if their sizes differ, and [`extract`](Self::extract) computes
/// features of a batch of converted images.
pub trait FeatureExtractor {
    /// The conversion of images that [`extract`](Self::extract) requires.
    fn input(&self) -> &ImageInput;

    /// Features of converted images, one row per image, without gradients.
    ///
    /// # Shapes and units
    ///
    /// - `prepared`: `[n, channels, height, width]`, as [`ImageInput::prepare`] returns them
    /// - returns: `[n, dim]`, on the extractor's device
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if the extractor does not accept images of this
    /// shape.
    fn extract(&self, prepared: &Tensor) -> Result<Tensor>;

    /// Name of the extractor and hash of its weights; metrics of different extractors are not comparable.
    fn id(&self) -> &str;

    /// What features depend on beside [`id`](Self::id) and [`input`](Self::input); empty, the default, for nothing.
    ///
    /// Features that are stored are used only by an extractor with the same variant.
    #[expect(
        clippy::unnecessary_literal_bound,
        reason = "an implementation may return its own text"
    )]
    fn variant(&self) -> &str {
        ""
    }

    /// Number of features per image.
    fn dim(&self) -> i64;

    /// The classes that the network distinguishes; none for a network without a classifier.
    fn class_predictor(&self) -> Option<&dyn ClassPredictor> {
        None
    }

    /// Features of images, one row per image, without gradients.
    ///
    /// # Shapes and units
    ///
    /// - `images`: `[n, channels or 1, height, width]`, `Uint8` from 0 to 255, or floats from -1 to 1
    /// - returns: `[n, dim]`, on the extractor's device
    ///
    /// # Errors
    ///
    /// Those of [`ImageInput::prepare`] and [`extract`](Self::extract).
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        ensure_images("FeatureExtractor::features", images, self.input().channels)?;
        in_batches(images, |batch| self.extract(&self.input().prepare(batch)?))
    }
}

/// Names the class of an image from its features.
pub trait ClassPredictor {
    /// Names of the classes, by label.
    fn class_names(&self) -> Vec<&str>;

    /// The most probable class of each image.
    ///
    /// # Shapes and units
    ///
    /// - `features`: `[n, dim]`, as [`FeatureExtractor::extract`] returns them
    /// - returns: `[n]`, `Int64`, labels of [`class_names`](Self::class_names)
    ///
    /// # Errors
    ///
    /// [`Error::Argument`](crate::Error::Argument) for features of another shape, or whose elements are not real numbers;
    /// [`Error::Torch`](crate::Error::Torch) for other errors of libtorch.
    fn predict(&self, features: &Tensor) -> Result<Tensor>;
}

/// Rounds images to the 256 levels of a PNG, so that generated images are measured as stored.
///
/// Values are rounded to the nearest level, so images with 256 levels are unchanged. Values beyond `[-1, 1]` are
/// clamped.
///
/// # Shapes and units
///
/// - `images`: any shape, values in `[-1, 1]`
/// - returns: the same shape and kind
///
/// # Errors
///
/// [`Error::Argument`] for a sparse or complex tensor.
///
/// # Example
///
/// ```
/// let images = tch::Tensor::from_slice(&[-1.5_f32, 0.001, 1.0]);
/// let stored = ddil_metrics::quantize(&images)?;
/// assert_eq!(stored.double_value(&[0]), -1.0);
/// assert_eq!(stored, ddil_metrics::quantize(&stored)?);
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
pub fn quantize(images: &Tensor) -> Result<Tensor> {
    ensure_numbers("quantize", "images", images)?;
    let levels = ((images.detach() + 1.0) * 127.5).clamp(0.0, 255.0).round();
    Ok(levels / 127.5 - 1.0)
}

/// The pixels themselves, flattened.
///
/// No network, and thus no bias of one, but small shifts are large changes. Suitable for vectors and tiny images.
///
/// # Example
///
/// ```
/// use ddil_metrics::{FeatureExtractor, RawPixels};
/// let pixels = RawPixels::new([1, 2, 3]);
/// let images = tch::Tensor::zeros([5, 1, 2, 3], tch::kind::FLOAT_CPU);
/// assert_eq!(pixels.features(&images)?.size(), [5, 6]);
/// assert_eq!(pixels.id(), "raw-pixels-1x2x3");
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RawPixels {
    shape: [i64; 3],
    input: ImageInput,
    id: String,
}

impl RawPixels {
    /// For images of this shape: channels, height, width.
    pub fn new(shape: [i64; 3]) -> Self {
        let [channels, height, width] = shape;
        let id = format!("raw-pixels-{channels}x{height}x{width}");
        Self { shape, input: ImageInput::unchanged(channels), id }
    }
}

impl FeatureExtractor for RawPixels {
    fn input(&self) -> &ImageInput {
        &self.input
    }

    fn extract(&self, prepared: &Tensor) -> Result<Tensor> {
        ensure_numbers("RawPixels::extract", "prepared", prepared)?;
        let shape = prepared.size();
        if shape.len() != 4 || shape[1..] != self.shape {
            let [channels, height, width] = self.shape;
            return Err(Error::Argument(ArgumentError::Shape {
                op: "RawPixels::extract",
                name: "prepared",
                shape,
                expected: format!("[n, {channels}, {height}, {width}]"),
            }));
        }
        Ok(prepared.detach().flatten(1, -1))
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn dim(&self) -> i64 {
        self.shape.iter().fold(1, |product: i64, side| product.saturating_mul(*side))
    }
}

/// Input and output of a `TorchScript` network.
///
/// # Example
///
/// ```
/// use ddil_metrics::{ImageInput, TorchScriptOptions};
///
/// // Inception as clean-fid uses it, or as torch-fidelity does.
/// let clean = TorchScriptOptions::inception_2015();
/// let mut tf1 = TorchScriptOptions::inception_2015();
/// tf1.input = ImageInput::torch_fidelity();
/// assert_eq!(clean.input.resize.to_string(), "bicubic-antialias-299x299");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TorchScriptOptions {
    /// Number of features per image; default: as many as the network returns for an image. Required unless
    /// `input.resize` determines the size of images.
    pub dim: Option<i64>,
    /// The conversion of images.
    pub input: ImageInput,
    /// Whether `true` is passed as a second argument, with which the Inception network of 2015, as converted for
    /// `StyleGAN`, returns features instead of class scores.
    pub return_features: bool,
}

impl TorchScriptOptions {
    /// For the Inception network of 2015 as converted for `StyleGAN` (`inception-2015-12-05.pt`): 2048 features of
    /// images prepared as by [`ImageInput::clean_fid`].
    pub fn inception_2015() -> Self {
        Self { dim: Some(2048), input: ImageInput::clean_fid(), return_features: true }
    }
}

/// A network from a `TorchScript` file.
#[derive(Debug)]
pub struct TorchScriptExtractor {
    module: CModule,
    options: TorchScriptOptions,
    dim: i64,
    device: Device,
    id: String,
}

impl TorchScriptExtractor {
    /// Loads a network, in evaluation mode. Its id is the file's name and SHA-256.
    ///
    /// # Errors
    ///
    /// [`Error::ReadFile`] if the file cannot be read; [`Error::LoadNetwork`] if it is not a `TorchScript` network or
    /// is rejected by [`ensure_script_archive`](ddil_libtorch::ensure_script_archive), as one whose headers exceed its
    /// contents; [`Error::Invalid`] for invalid options; [`Error::NotATensor`] if the network does not return features.
    pub fn from_file(
        path: impl AsRef<Path>,
        options: TorchScriptOptions,
        device: Device,
    ) -> Result<Self> {
        options.input.ensure_valid()?;
        ensure_dim(&options)?;
        let (module, id) = load_script(path.as_ref(), device)?;
        let mut extractor = Self { module, dim: options.dim.unwrap_or(0), options, device, id };
        if extractor.options.dim.is_none() {
            extractor.dim = extractor.found_dim()?;
        }
        Ok(extractor)
    }

    /// The number of features of a black image.
    fn found_dim(&self) -> Result<i64> {
        const OP: &str = "TorchScriptExtractor::from_file";
        let ImageInput { channels, resize, .. } = &self.options.input;
        let [height, width] = resize.size().unwrap_or([1, 1]);
        let options = (Kind::Float, self.device);
        let black = Tensor::f_zeros([1, *channels, height, width], options).map_err(torch(OP))?;
        let features = self.forward(&black)?;
        match *features.size() {
            [1, dim] if dim > 0 => Ok(dim),
            _ => Err(self.not_features(&format!("a tensor {:?}", features.size()))),
        }
    }

    fn forward(&self, prepared: &Tensor) -> Result<Tensor> {
        let op = torch("TorchScriptExtractor::extract");
        let _no_grad = tch::no_grad_guard();
        let prepared = prepared
            .f_to_device(self.device)
            .and_then(|images| images.f_to_kind(Kind::Float))
            .map_err(&op)?;
        let mut arguments = vec![IValue::Tensor(prepared)];
        if self.options.return_features {
            arguments.push(IValue::Bool(true));
        }
        match self.module.forward_is(&arguments).map_err(&op)? {
            IValue::Tensor(features) => Ok(features),
            _ => Err(self.not_features("no tensor")),
        }
    }

    fn not_features(&self, found: &str) -> Error {
        let dim = if self.dim > 0 { self.dim.to_string() } else { "features".to_owned() };
        Error::NotATensor { id: self.id.clone(), found: found.to_owned(), dim }
    }
}

/// Loads a `TorchScript` network in evaluation mode, and its id: the file's name and SHA-256.
pub(crate) fn load_script(path: &Path, device: Device) -> Result<(CModule, String)> {
    let refused = |message| Error::LoadNetwork { path: PathBuf::from(path), message };
    ensure_script_archive(path).map_err(|error| match error {
        ddil_libtorch::Error::File { path, source, .. } => Error::ReadFile { path, source },
        error => refused(error.to_string()),
    })?;
    let bytes = std::fs::read(path)
        .map_err(|source| Error::ReadFile { path: PathBuf::from(path), source })?;
    let load = || {
        let mut module = CModule::load_data_on_device(&mut bytes.as_slice(), device)?;
        module.f_set_eval()?;
        Ok(module)
    };
    let module = load().map_err(|source| refused(first_line(&source)))?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    Ok((module, format!("{stem}-{}", sha256(&bytes))))
}

/// Checks the number of features, which must be given if the size of images is not.
fn ensure_dim(options: &TorchScriptOptions) -> Result<()> {
    match options.dim {
        Some(dim) if dim < 1 => Err(Invalid::new("dim", dim.to_string(), "1 or more").into()),
        None if options.input.resize == Resize::None => {
            let expected = "a number of features, since `input.resize` is `none`";
            Err(Invalid::new("dim", "not set", expected).into())
        }
        _ => Ok(()),
    }
}

impl FeatureExtractor for TorchScriptExtractor {
    fn input(&self) -> &ImageInput {
        &self.options.input
    }

    fn extract(&self, prepared: &Tensor) -> Result<Tensor> {
        const OP: &str = "TorchScriptExtractor::extract";
        ensure_images(OP, prepared, self.options.input.channels)?;
        let features = self.forward(prepared)?;
        if features.size() == [prepared.size()[0], self.dim] {
            Ok(features)
        } else {
            Err(self.not_features(&format!("a tensor {:?}", features.size())))
        }
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn variant(&self) -> &str {
        if self.options.return_features { "return_features" } else { "" }
    }

    fn dim(&self) -> i64 {
        self.dim
    }
}

/// Runs `features` in batches, without gradients.
pub(crate) fn in_batches(
    images: &Tensor,
    features: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let parts: Vec<Tensor> =
        images.split(IMAGES_AT_ONCE, 0).iter().map(features).collect::<Result<_>>()?;
    Ok(Tensor::cat(&parts, 0))
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
