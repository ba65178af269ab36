//! Feature extractors of images.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::ensure_script_archive;
use sha2::{Digest, Sha256};
use tch::{CModule, Device, IValue, Kind, Tensor};

use crate::error::{Error, Result, ensure_numbers, first_line, torch};

/// Number of images per forward pass.
const IMAGES_AT_ONCE: i64 = 256;

/// Computes the features of images that metrics compare.
pub trait FeatureExtractor {
    /// Features of images, one row per image, without gradients.
    ///
    /// # Shapes and units
    ///
    /// - `images`: `[n, channels, height, width]`, values in `[-1, 1]`
    /// - returns: `[n, dim]`, on the extractor's device
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) if the extractor does not accept images of this
    /// shape.
    fn features(&self, images: &Tensor) -> Result<Tensor>;

    /// Name of the extractor and hash of its weights; metrics of different extractors are not comparable.
    fn id(&self) -> &str;

    /// Number of features per image.
    fn dim(&self) -> i64;

    /// How images are resized for the network, for reports; "none" if they are not.
    fn resize_mode(&self) -> String {
        Resize::None.to_string()
    }
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
    id: String,
}

impl RawPixels {
    /// For images of this shape: channels, height, width.
    pub fn new(shape: [i64; 3]) -> Self {
        let [channels, height, width] = shape;
        Self { shape, id: format!("raw-pixels-{channels}x{height}x{width}") }
    }
}

impl FeatureExtractor for RawPixels {
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        ensure_numbers("RawPixels::features", "images", images)?;
        let shape = images.size();
        if shape.len() != 4 || shape[1..] != self.shape {
            let [channels, height, width] = self.shape;
            return Err(Error::Argument(ArgumentError::Shape {
                op: "RawPixels::features",
                name: "images",
                shape,
                expected: format!("[n, {channels}, {height}, {width}]"),
            }));
        }
        Ok(images.detach().flatten(1, -1))
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn dim(&self) -> i64 {
        self.shape.iter().fold(1, |product: i64, side| product.saturating_mul(*side))
    }
}

/// The range of a network's input pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelRange {
    /// From -1 to 1, as all images in this crate.
    SignedUnit,
    /// From 0 to 1.
    Unit,
    /// From 0 to 255, as floats.
    Byte,
}

impl PixelRange {
    /// Maps images in `[-1, 1]` to this range.
    fn scale(self, images: &Tensor) -> Tensor {
        match self {
            Self::SignedUnit => images.shallow_clone(),
            Self::Unit => (images + 1.0) * 0.5,
            Self::Byte => (images + 1.0) * 127.5,
        }
    }
}

/// How images are resized for a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resize {
    /// No resizing: images must have the right size.
    None,
    /// Bicubic with antialiasing to height and width, then clamped to `[-1, 1]`: close to PIL.
    Bicubic([i64; 2]),
    /// Bilinear without antialiasing to height and width.
    Bilinear([i64; 2]),
}

impl Resize {
    fn apply(self, images: &Tensor) -> std::result::Result<Tensor, tch::TchError> {
        match self {
            Self::None => Ok(images.shallow_clone()),
            Self::Bicubic(size) => {
                images.f_internal_upsample_bicubic2d_aa(size, false, None, None)?.f_clamp(-1.0, 1.0)
            }
            Self::Bilinear(size) => images.f_upsample_bilinear2d(size, false, None, None),
        }
    }
}

impl fmt::Display for Resize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => write!(f, "none"),
            Self::Bicubic([height, width]) => write!(f, "bicubic-antialias-{height}x{width}"),
            Self::Bilinear([height, width]) => write!(f, "bilinear-{height}x{width}"),
        }
    }
}

/// Input and output of a `TorchScript` network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TorchScriptOptions {
    /// Number of features per image.
    pub dim: i64,
    /// Range of its input pixels.
    pub range: PixelRange,
    /// How images are resized.
    pub resize: Resize,
    /// Number of input channels; grey images are repeated to this number.
    pub channels: i64,
    /// Whether `true` is passed as a second argument, with which the Inception network of 2015, as converted for
    /// `StyleGAN`, returns features instead of class scores.
    pub return_features: bool,
}

impl TorchScriptOptions {
    /// For the Inception network of 2015 as converted for `StyleGAN` (`inception-2015-12-05.pt`): 2048 features.
    pub fn inception_2015() -> Self {
        Self {
            dim: 2048,
            range: PixelRange::Byte,
            resize: Resize::Bicubic([299, 299]),
            channels: 3,
            return_features: true,
        }
    }
}

/// A network from a `TorchScript` file.
#[derive(Debug)]
pub struct TorchScriptExtractor {
    module: CModule,
    options: TorchScriptOptions,
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
    /// contents; [`Error::Invalid`] unless `dim` and `channels` are 1 or more.
    pub fn open(
        path: impl AsRef<Path>,
        options: TorchScriptOptions,
        device: Device,
    ) -> Result<Self> {
        for (name, value) in [("dim", options.dim), ("channels", options.channels)] {
            if value < 1 {
                let value = value.to_string();
                return Err(Error::Invalid(Invalid::new(name, value, "1 or more")));
            }
        }
        let path = path.as_ref();
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
        Ok(Self { module, options, device, id: format!("{stem}-{}", sha256(&bytes)) })
    }

    fn prepare(&self, images: &Tensor) -> std::result::Result<Tensor, tch::TchError> {
        let images = images.f_to_device(self.device)?.f_to_kind(Kind::Float)?;
        let images = self.options.resize.apply(&images)?;
        let images = self.options.range.scale(&images);
        let channels = self.options.channels;
        if images.size()[1] == channels {
            Ok(images)
        } else {
            images.f_expand([-1, channels, -1, -1], false)
        }
    }

    fn batch_features(&self, images: &Tensor) -> Result<Tensor> {
        let op = torch("TorchScriptExtractor::features");
        let mut arguments = vec![IValue::Tensor(self.prepare(images).map_err(&op)?)];
        if self.options.return_features {
            arguments.push(IValue::Bool(true));
        }
        let output = self.module.forward_is(&arguments).map_err(&op)?;
        let wrong = |found| Error::NotATensor { id: self.id.clone(), found, dim: self.options.dim };
        match output {
            IValue::Tensor(features) if features.size() == [images.size()[0], self.options.dim] => {
                Ok(features)
            }
            IValue::Tensor(features) => Err(wrong(format!("a tensor {:?}", features.size()))),
            _ => Err(wrong("no tensor".to_owned())),
        }
    }
}

impl FeatureExtractor for TorchScriptExtractor {
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        let channels = self.options.channels;
        ensure_images("TorchScriptExtractor::features", images, &[1, channels])?;
        in_batches(images, |batch| self.batch_features(batch))
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn dim(&self) -> i64 {
        self.options.dim
    }

    fn resize_mode(&self) -> String {
        self.options.resize.to_string()
    }
}

/// Checks that `images` is `[n >= 1, one of channels, height, width]`.
fn ensure_images(op: &'static str, images: &Tensor, channels: &[i64]) -> Result<()> {
    ensure_numbers(op, "images", images)?;
    let shape = images.size();
    if shape.len() == 4 && shape[0] > 0 && channels.contains(&shape[1]) {
        return Ok(());
    }
    let expected = format!("[1 or more, one of {channels:?}, height, width]");
    Err(Error::Argument(ArgumentError::Shape { op, name: "images", shape, expected }))
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
    use std::fmt::Write;
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
