//! Extractors of features, by name or file.

use std::path::{Path, PathBuf};

use ddil_data::FashionMnist;
use ddil_files::Invalid;
use ddil_metrics::{
    FashionClassifier, FeatureExtractor, ImageInput, RawPixels, Statistics, TorchScriptExtractor,
    TorchScriptOptions,
};
use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::network_folder::FolderExtractor;

/// The file name of the Inception network of 2015 as published for `StyleGAN`.
const INCEPTION: &str = "inception-2015-12-05.pt";

/// The name of the classifier of Fashion-MNIST.
const CLASSIFIER: &str = "fashion_classifier";

/// The names of [`input_of`].
const INPUTS: &str = "`clean-fid`, `pytorch-fid`, `torch-fidelity`, `imagenet`, `clip`, or JSON such as \
                      {\"resize\":\"bilinear-64x64\",\"range\":\"unit\"}";

/// An extractor of features by its name or file, as in a config or on a command line.
///
/// # Example
///
/// ```
/// use ddil_evaluate::ExtractorChoice;
/// use tch::Device;
///
/// let extractor = ExtractorChoice::new("raw_pixels").open(Some([1, 4, 4]), Device::Cpu)?;
/// assert_eq!(extractor.dim(), 16);
/// // Samples of 16x16 are brought to the classifier's 32x32.
/// let classifier = ExtractorChoice::new("fashion_classifier").at_size(Some([16, 16]));
/// let classifier = classifier.open(Some([1, 16, 16]), Device::Cpu)?;
/// assert_eq!(classifier.input().resize.to_string(), "bicubic-antialias-32x32");
/// assert!(ExtractorChoice::new("no such file").open(None, Device::Cpu).is_err());
/// # Ok::<(), ddil_evaluate::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExtractorChoice {
    /// `fashion_classifier`, `raw_pixels`, or the path of a TorchScript file or of a transformers folder
    /// ([`FolderExtractor`]).
    pub name: String,
    /// How images are converted for a TorchScript file, a folder or the classifier; see [`open`](Self::open).
    pub input: Option<String>,
    /// Whether `true` is passed to a TorchScript file as a second argument.
    pub return_features: bool,
}

impl ExtractorChoice {
    /// The extractor of that name or file, with its own input if it has one.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), input: None, return_features: false }
    }

    /// With another conversion of images, by name or as JSON.
    #[must_use]
    pub fn with_input(self, input: Option<String>) -> Self {
        Self { input, ..self }
    }

    /// For images of Fashion-MNIST scaled to that size: the classifier brings them back to 32x32, samples and reference
    /// alike, by antialiased bicubic interpolation. Other extractors, and an input that is set, are unchanged.
    ///
    /// The classifier's accuracy on the test images is 87.0 % at 16x16; it is 92.0 % on those of 32x32
    /// (`cargo test --workspace --test metrics the_stated_accuracy -- --ignored`).
    #[must_use]
    pub fn at_size(self, size: Option<[i64; 2]>) -> Self {
        const SIDE: i64 = FashionMnist::SIDE;
        let is_scaled = size.is_some_and(|size| size != [SIDE; 2]);
        if !is_scaled || self.name != CLASSIFIER || self.input.is_some() {
            return self;
        }
        let input = format!("{{\"channels\":1,\"resize\":\"bicubic-antialias-{SIDE}x{SIDE}\"}}");
        self.with_input(Some(input))
    }

    /// Whether `true` is passed to a TorchScript file as a second argument.
    #[must_use]
    pub fn with_return_features(self, return_features: bool) -> Self {
        Self { return_features, ..self }
    }

    /// Opens the extractor, for images of `shape`: channels, height, width; none if they differ in size.
    ///
    /// The published `inception-2015-12-05.pt` has the input of clean-fid unless another is chosen; other TorchScript files
    /// require one. A folder has its own. The classifier takes images of 32x32 as they are.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) with the setting `extractor` or `extractor_input` for a name that is
    /// neither known nor a file, or an input that does not fit; errors of the network; an error if the extractor does
    /// not accept images of that shape.
    pub fn open(
        &self,
        shape: Option<[i64; 3]>,
        device: Device,
    ) -> Result<Box<dyn FeatureExtractor>> {
        let extractor: Box<dyn FeatureExtractor> = match (self.name.as_str(), shape) {
            (CLASSIFIER, _) => Box::new(self.classifier(device)?),
            ("raw_pixels", Some(shape)) => {
                let pixels = RawPixels::new(shape);
                let most = Statistics::MAX_DIM;
                if pixels.dim() > most as i64 {
                    let value = format!("raw_pixels, {} values per image", pixels.dim());
                    let expected = format!(
                        "images of at most {most} values; use a TorchScript file, which resizes them"
                    );
                    return Err(Invalid::new("extractor", value, expected).into());
                }
                Box::new(pixels)
            }
            ("raw_pixels", None) => {
                let expected = "images of one size; use a TorchScript file, which resizes them";
                return Err(Invalid::new("extractor", "raw_pixels", expected).into());
            }
            (name, _) if Path::new(name).is_file() => Box::new(self.torch_script(device)?),
            (name, _) if Path::new(name).is_dir() => {
                let input = self.input.as_deref().map(input_of).transpose()?;
                Box::new(FolderExtractor::from_folder(name, input, device)?)
            }
            (name, _) => {
                let expected = "`fashion_classifier`, `raw_pixels`, a TorchScript file such as \
                                inception-2015-12-05.pt, or a transformers folder of CLIP or DINOv2";
                return Err(Invalid::new("extractor", name, expected).into());
            }
        };
        // Before anything is drawn or read: whether such images are accepted at all.
        if let Some([channels, height, width]) = shape {
            let black = (tch::Kind::Float, Device::Cpu);
            let black = Tensor::f_zeros([1, channels, height, width], black);
            let _ = extractor.features(&black.map_err(Error::torch("ExtractorChoice::open"))?)?;
        }
        Ok(extractor)
    }

    fn classifier(&self, device: Device) -> Result<FashionClassifier> {
        let classifier = FashionClassifier::pretrained(device)?;
        let Some(text) = &self.input else { return Ok(classifier) };
        classifier.with_input(input_of(text)?).map_err(|error| match error {
            ddil_metrics::Error::Invalid(invalid) => invalid.under("extractor_input").into(),
            error => error.into(),
        })
    }

    fn torch_script(&self, device: Device) -> Result<TorchScriptExtractor> {
        let path = PathBuf::from(&self.name);
        let is_inception = path.file_name().is_some_and(|name| name == INCEPTION);
        let mut options = if is_inception {
            TorchScriptOptions::inception_2015()
        } else {
            TorchScriptOptions::default()
        };
        match &self.input {
            Some(text) => options.input = input_of(text)?,
            None if is_inception => {}
            None => {
                let expected = format!("how images are converted for {}: {INPUTS}", self.name);
                return Err(Invalid::new("extractor_input", "not set", expected).into());
            }
        }
        options.return_features |= self.return_features;
        Ok(TorchScriptExtractor::from_file(path, options, device)?)
    }
}

/// The conversion of images by its name, or as JSON.
fn input_of(text: &str) -> Result<ImageInput> {
    Ok(match text {
        "clean-fid" => ImageInput::clean_fid(),
        "pytorch-fid" => ImageInput::pytorch_fid(),
        "torch-fidelity" => ImageInput::torch_fidelity(),
        "imagenet" => ImageInput::imagenet(),
        "clip" => ImageInput::clip(224),
        other => ddil_files::parse_json(other.as_bytes()).map_err(|error| {
            Invalid::new("extractor_input", other, format!("{INPUTS} ({error})"))
        })?,
    })
}
