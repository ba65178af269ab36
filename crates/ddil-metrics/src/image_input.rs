//! The conversion of images to a network's input.

use std::{fmt, str::FromStr};

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use serde::{Deserialize, Serialize};
use tch::{Kind, TchError, Tensor};

use crate::error::{Error, Result, ensure_numbers, torch};

type Output = std::result::Result<Tensor, TchError>;

/// The range of a network's input pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PixelRange {
    /// From -1 to 1, as all images in this crate.
    #[default]
    SignedUnit,
    /// From 0 to 1.
    Unit,
    /// From 0 to 255, as floats.
    Byte,
}

/// How images are resized for a network. Values stay within the range of pixels.
///
/// The text form, for settings and reports, is in the variants' documentation. Metrics of one network with two ways to
/// resize are not comparable ([Parmar et al. 2022](https://arxiv.org/abs/2104.11222)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum Resize {
    /// `none`: images must have one size.
    #[default]
    None,
    /// `bicubic-antialias-HxW`: bicubic with antialiasing, as PIL on floats; used by clean-fid.
    Bicubic([i64; 2]),
    /// `bilinear-HxW`: bilinear without antialiasing, pixel centres aligned; used by pytorch-fid.
    Bilinear([i64; 2]),
    /// `bilinear-tf1-HxW`: bilinear without antialiasing, as `TensorFlow` 1, where output pixel `i` is at input position
    /// `i * input / output`; used by the original FID code, torch-fidelity, and inside `inception-2015-12-05.pt`.
    BilinearTf1([i64; 2]),
    /// `bicubic-antialias-R-crop-C`: the shorter side becomes `R` pixels, bicubic with antialiasing, then the central
    /// `C`x`C` pixels; used by CLIP (`R = C`) and `DINOv2`.
    BicubicCrop {
        /// Length of the shorter side.
        side: i64,
        /// Side of the central square, `side` or less.
        crop: i64,
    },
}

impl Resize {
    /// The size of resized images, height and width; `None` if they keep their size.
    pub fn size(self) -> Option<[i64; 2]> {
        match self {
            Self::None => None,
            Self::Bicubic(size) | Self::Bilinear(size) | Self::BilinearTf1(size) => Some(size),
            Self::BicubicCrop { crop, .. } => Some([crop, crop]),
        }
    }

    fn ensure_valid(self) -> Result<()> {
        let sides = match self {
            Self::None => return Ok(()),
            Self::Bicubic(size) | Self::Bilinear(size) | Self::BilinearTf1(size) => size,
            Self::BicubicCrop { side, crop } => [side, crop],
        };
        let fits = sides.iter().all(|side| (1..=MAX_SIDE).contains(side));
        let crops = !matches!(self, Self::BicubicCrop { side, crop } if crop > side);
        if fits && crops {
            return Ok(());
        }
        let expected = format!("sides of 1 to {MAX_SIDE} pixels, and a crop within the image");
        Err(Invalid::new("resize", self.to_string(), expected).into())
    }

    /// Resizes float images whose values are from `low` to `high`; the result is rounded to whole numbers if `rounded`.
    fn apply(self, images: &Tensor, range: [f64; 2], rounded: bool) -> Output {
        let round = |images: Tensor| if rounded { nearest(&images) } else { Ok(images) };
        match self {
            Self::None => round(images.shallow_clone()),
            Self::Bicubic(size) if rounded => bicubic_in_turn(images, size, range, true),
            Self::Bicubic(size) => bicubic(images, size)?.f_clamp(range[0], range[1]),
            Self::Bilinear(size) => round(images.f_upsample_bilinear2d(size, false, None, None)?),
            Self::BilinearTf1([height, width]) => {
                let rows = bilinear_tf1(images, 2, height)?;
                round(bilinear_tf1(&rows, 3, width)?)
            }
            Self::BicubicCrop { side, crop } => {
                let [height, width] = [images.size()[2], images.size()[3]];
                let size = if height <= width {
                    [side, (side * width / height).max(side)]
                } else {
                    [(side * height / width).max(side), side]
                };
                bicubic_in_turn(images, size, range, rounded)?
                    .f_narrow(2, (size[0] - crop) / 2, crop)?
                    .f_narrow(3, (size[1] - crop) / 2, crop)
            }
        }
    }
}

/// The largest side that is accepted: images of more pixels exhaust memory.
const MAX_SIDE: i64 = 1 << 14;

fn bicubic(images: &Tensor, size: [i64; 2]) -> Output {
    images.f_internal_upsample_bicubic2d_aa(size, false, None, None)
}

/// As PIL: along the width first, clipped and optionally rounded after each direction.
fn bicubic_in_turn(
    images: &Tensor,
    [height, width]: [i64; 2],
    [low, high]: [f64; 2],
    rounded: bool,
) -> Output {
    let in_range = |images: Tensor| {
        let images = images.f_clamp(low, high)?;
        if rounded { nearest(&images) } else { Ok(images) }
    };
    let wide = in_range(bicubic(images, [images.size()[2], width])?)?;
    in_range(bicubic(&wide, [height, width])?)
}

/// Rounds to whole numbers, halves upwards as PIL does.
fn nearest(images: &Tensor) -> Output {
    images.f_add_scalar(0.5)?.f_floor()
}

/// Linear interpolation along a dimension, with output pixel `i` at input position `i * input / output`.
fn bilinear_tf1(images: &Tensor, dim: i64, to: i64) -> Output {
    let from = images.size()[dim as usize];
    let scale = from as f32 / to as f32;
    let positions: Vec<f32> = (0..to).map(|i| i as f32 * scale).collect();
    let low: Vec<i64> = positions.iter().map(|position| position.floor() as i64).collect();
    let high: Vec<i64> = low.iter().map(|&index| (index + 1).min(from - 1)).collect();
    let weight: Vec<f32> = positions.iter().map(|position| position - position.floor()).collect();
    let there = images.device();
    let pick = |indices: &[i64]| -> Output {
        images.f_index_select(dim, &Tensor::f_from_slice(indices)?.f_to_device(there)?)
    };
    let mut shape = [1, 1, 1, 1];
    shape[dim as usize] = to;
    let weight = Tensor::f_from_slice(&weight)?.f_to_device(there)?.f_view(shape)?;
    pick(&low)?.f_lerp_tensor(&pick(&high)?, &weight.f_to_kind(images.kind())?)
}

impl fmt::Display for Resize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => write!(f, "none"),
            Self::Bicubic([height, width]) => write!(f, "bicubic-antialias-{height}x{width}"),
            Self::Bilinear([height, width]) => write!(f, "bilinear-{height}x{width}"),
            Self::BilinearTf1([height, width]) => write!(f, "bilinear-tf1-{height}x{width}"),
            Self::BicubicCrop { side, crop } => write!(f, "bicubic-antialias-{side}-crop-{crop}"),
        }
    }
}

impl FromStr for Resize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let expected = "`none`, `bicubic-antialias-HxW`, `bilinear-HxW`, `bilinear-tf1-HxW` or \
                        `bicubic-antialias-R-crop-C` with numbers of pixels";
        let invalid = || Error::from(Invalid::new("resize", text, expected));
        let pair = |text: &str, between: &str| -> Option<[i64; 2]> {
            let (first, second) = text.split_once(between)?;
            Some([first.parse().ok()?, second.parse().ok()?])
        };
        let size = |text: &str| pair(text, "x").ok_or_else(invalid);
        let resize = if text == "none" {
            Self::None
        } else if let Some(rest) = text.strip_prefix("bicubic-antialias-") {
            match pair(rest, "-crop-") {
                Some([side, crop]) => Self::BicubicCrop { side, crop },
                None => Self::Bicubic(size(rest)?),
            }
        } else if let Some(rest) = text.strip_prefix("bilinear-tf1-") {
            Self::BilinearTf1(size(rest)?)
        } else if let Some(rest) = text.strip_prefix("bilinear-") {
            Self::Bilinear(size(rest)?)
        } else {
            return Err(invalid());
        };
        resize.ensure_valid()?;
        Ok(resize)
    }
}

impl TryFrom<String> for Resize {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Resize> for String {
    fn from(resize: Resize) -> Self {
        resize.to_string()
    }
}

/// Mean and standard deviation of each channel, which are subtracted and divided by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalization {
    /// The mean of each channel, in the units of [`ImageInput::range`].
    pub mean: Vec<f64>,
    /// The standard deviation of each channel, in the same units.
    pub std: Vec<f64>,
}

/// The conversion of images to a network's input: size, interpolation, range of pixels, normalization.
///
/// Two ways to prepare images for one network give different features, so that this is part of every
/// [`Report`](crate::Report).
///
/// # Example
///
/// ```
/// use ddil_metrics::ImageInput;
/// use tch::{Kind, Tensor, Device};
///
/// // Two images of different sizes, as bytes.
/// let wide = Tensor::full([1, 3, 20, 40], 255, (Kind::Uint8, Device::Cpu));
/// let grey = Tensor::full([1, 1, 30, 10], 0, (Kind::Uint8, Device::Cpu));
///
/// let input = ImageInput::clean_fid();
/// let batch = Tensor::cat(&[input.prepare(&wide)?, input.prepare(&grey)?], 0);
/// assert_eq!(batch.size(), [2, 3, 299, 299]);
/// assert_eq!(batch.amax([1, 2, 3], false), Tensor::from_slice(&[255.0_f32, 0.0]));
/// # Ok::<(), ddil_metrics::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ImageInput {
    /// Number of channels; default 3. Grey images are repeated to this number.
    pub channels: i64,
    /// How images are resized before that, with rounding to 8 bits: to the size at which the images of a comparison are
    /// stored, if they come in others. Default [`Resize::None`].
    #[serde(skip_serializing_if = "is_none")]
    pub first: Resize,
    /// How images are resized; default [`Resize::None`].
    pub resize: Resize,
    /// Whether resized images are rounded to 8 bits, bicubic ones after each direction: as PIL and torchvision resize
    /// 8-bit images, and thus in published numbers of CLIP and `DINOv2`. Default false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rounded: bool,
    /// The range of pixels; default [`PixelRange::SignedUnit`].
    pub range: PixelRange,
    /// Normalization of the channels after that; default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalization: Option<Normalization>,
}

impl Default for ImageInput {
    fn default() -> Self {
        Self {
            channels: 3,
            first: Resize::default(),
            resize: Resize::default(),
            rounded: false,
            range: PixelRange::default(),
            normalization: None,
        }
    }
}

impl ImageInput {
    /// Images of `channels` channels as they are, from -1 to 1.
    pub fn unchanged(channels: i64) -> Self {
        Self { channels, ..Self::default() }
    }

    /// As clean-fid prepares images for `inception-2015-12-05.pt`: PIL's bicubic interpolation to 299x299 pixels on
    /// floats, 0 to 255 ([Parmar et al. 2022](https://arxiv.org/abs/2104.11222)).
    pub fn clean_fid() -> Self {
        Self { resize: Resize::Bicubic([299, 299]), range: PixelRange::Byte, ..Self::default() }
    }

    /// As pytorch-fid prepares images for its Inception network: bilinear to 299x299 pixels without antialiasing, -1
    /// to 1.
    pub fn pytorch_fid() -> Self {
        Self { resize: Resize::Bilinear([299, 299]), ..Self::default() }
    }

    /// As the original FID code and torch-fidelity prepare images: bilinear to 299x299 pixels as in `TensorFlow` 1,
    /// 0 to 255; for `inception-2015-12-05.pt`.
    pub fn torch_fidelity() -> Self {
        Self { resize: Resize::BilinearTf1([299, 299]), range: PixelRange::Byte, ..Self::default() }
    }

    /// As `DINOv2` and most networks of `ImageNet` expect images: the shorter side to 256 pixels, the central 224x224,
    /// and `ImageNet`'s mean and standard deviation.
    pub fn imagenet() -> Self {
        Self {
            resize: Resize::BicubicCrop { side: 256, crop: 224 },
            range: PixelRange::Unit,
            normalization: Some(Normalization {
                mean: vec![0.485, 0.456, 0.406],
                std: vec![0.229, 0.224, 0.225],
            }),
            ..Self::default()
        }
    }

    /// As CLIP expects images: the shorter side and then the centre to `side` pixels, rounded to 8 bits, with the mean and
    /// standard deviation of its training images.
    pub fn clip(side: i64) -> Self {
        Self {
            resize: Resize::BicubicCrop { side, crop: side },
            rounded: true,
            range: PixelRange::Unit,
            normalization: Some(Normalization {
                mean: vec![0.481_454_66, 0.457_827_5, 0.408_210_73],
                std: vec![0.268_629_54, 0.261_302_58, 0.275_777_11],
            }),
            ..Self::default()
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `channels` is 1 or more, sides are 1 or more and `normalization` has a finite mean and a
    /// positive deviation for each channel.
    pub fn ensure_valid(&self) -> Result<()> {
        self.first.ensure_valid()?;
        self.resize.ensure_valid()?;
        if self.channels < 1 {
            return Err(Invalid::new("channels", self.channels.to_string(), "1 or more").into());
        }
        let Some(Normalization { mean, std }) = &self.normalization else { return Ok(()) };
        let fits = |values: &[f64]| values.len() as i64 == self.channels;
        if !fits(mean) || mean.iter().any(|value| !value.is_finite()) {
            let expected = format!("{} finite numbers, one per channel", self.channels);
            return Err(Invalid::new("normalization.mean", format!("{mean:?}"), expected).into());
        }
        if !fits(std) || !std.iter().all(|value| value.is_finite() && *value > 0.0) {
            let expected = format!("{} positive numbers, one per channel", self.channels);
            return Err(Invalid::new("normalization.std", format!("{std:?}"), expected).into());
        }
        Ok(())
    }

    /// Converts images.
    ///
    /// # Shapes and units
    ///
    /// - `images`: `[n, channels or 1, height, width]`, `Uint8` from 0 to 255, or floats from -1 to 1
    /// - returns: `[n, channels, height, width]`, `Float` unless nothing is converted; the size is that of `resize`
    ///
    /// # Errors
    ///
    /// [`ArgumentError::Shape`](ddil_libtorch::ArgumentError::Shape) for another number of channels or an empty image;
    /// those of [`ensure_valid`](Self::ensure_valid); [`Error::Torch`].
    pub fn prepare(&self, images: &Tensor) -> Result<Tensor> {
        const OP: &str = "ImageInput::prepare";
        self.ensure_valid()?;
        ensure_images(OP, images, self.channels)?;
        let _no_grad = tch::no_grad_guard();
        self.convert(images).map_err(torch(OP))
    }

    fn convert(&self, images: &Tensor) -> Output {
        let is_bytes = images.kind() == Kind::Uint8;
        let is_rounded = self.rounded || self.first != Resize::None;
        let is_unchanged = self.resize == Resize::None && !is_bytes && !is_rounded;
        let images = if is_unchanged { images.detach() } else { images.f_to_kind(Kind::Float)? };
        let (mut images, mut from) = (images, if is_bytes { BYTES } else { [-1.0, 1.0] });
        if is_rounded && !is_bytes {
            (images, from) = (nearest(&scaled(&images, from, PixelRange::Byte)?)?, BYTES);
        }
        if self.first != Resize::None {
            images = self.first.apply(&images, BYTES, true)?;
        }
        let resized = self.resize.apply(&images, from, self.rounded)?;
        let images = scaled(&resized, from, self.range)?;
        let images = if images.size()[1] == self.channels {
            images
        } else {
            images.f_expand([-1, self.channels, -1, -1], false)?
        };
        let Some(Normalization { mean, std }) = &self.normalization else { return Ok(images) };
        let per_channel = |values: &[f64]| -> Output {
            let values = Tensor::f_from_slice(values)?.f_to_kind(images.kind())?;
            values.f_to_device(images.device())?.f_view([1, -1, 1, 1])
        };
        images.f_sub(&per_channel(mean)?)?.f_div(&per_channel(std)?)
    }
}

fn is_none(resize: &Resize) -> bool {
    *resize == Resize::None
}

/// The range of 8-bit pixels.
const BYTES: [f64; 2] = [0.0, 255.0];

/// Maps values from the range `[low, high]` to another.
fn scaled(images: &Tensor, [low, high]: [f64; 2], range: PixelRange) -> Output {
    let [to_low, to_high] = match range {
        PixelRange::SignedUnit => [-1.0, 1.0],
        PixelRange::Unit => [0.0, 1.0],
        PixelRange::Byte => BYTES,
    };
    if [low, high] == [to_low, to_high] {
        return Ok(images.shallow_clone());
    }
    images.f_sub_scalar(low)?.f_mul_scalar((to_high - to_low) / (high - low))?.f_add_scalar(to_low)
}

/// Checks that `images` is `[n >= 1, 1 or channels, height >= 1, width >= 1]`.
pub(crate) fn ensure_images(op: &'static str, images: &Tensor, channels: i64) -> Result<()> {
    ensure_numbers(op, "images", images)?;
    let shape = images.size();
    if shape.len() == 4 && !shape.contains(&0) && [1, channels].contains(&shape[1]) {
        return Ok(());
    }
    let channels = if channels == 1 { "1".to_owned() } else { format!("1 or {channels}") };
    let expected = format!("[1 or more, {channels}, height, width]");
    Err(ArgumentError::Shape { op, name: "images", shape, expected }.into())
}
