//! How a transformers folder describes its network's input.

use std::path::Path;

use ddil_files::{Invalid, read_json};
use ddil_metrics::{ImageInput, Normalization, PixelRange, Resize};
use serde_json::{Map, Value};

use crate::error::Result;

/// The files that describe it: of image processors, and of whole processors as transformers 5 writes them.
const FILES: [(&str, Option<&str>); 2] =
    [("preprocessor_config.json", None), ("processor_config.json", Some("image_processor"))];
/// PIL's number of bicubic interpolation.
const BICUBIC: i64 = 3;
/// The deviation of `rescale_factor` from 1 / 255 that is still rounding.
const ROUNDING: f64 = 1e-9;

/// The input in a transformers folder, if a file of it describes one.
///
/// # Errors
///
/// Errors of the file; [`Error::Invalid`](crate::Error::Invalid) of the setting `field` for a conversion that is not
/// offered here.
pub(crate) fn input_in(
    folder: &Path,
    channels: i64,
    field: &'static str,
) -> Result<Option<ImageInput>> {
    for (name, key) in FILES {
        let path = folder.join(name);
        if !path.is_file() {
            continue;
        }
        let file: Value = read_json(&path)?;
        let settings = key.map_or(Some(&file), |key| file.get(key)).and_then(Value::as_object);
        if let Some(settings) = settings {
            return Ok(Some(Processor { path: &path, settings, field }.input(channels)?));
        }
    }
    Ok(None)
}

/// The settings of an image processor.
struct Processor<'a> {
    path: &'a Path,
    settings: &'a Map<String, Value>,
    /// The setting that names the folder.
    field: &'static str,
}

impl Processor<'_> {
    fn input(&self, channels: i64) -> Result<ImageInput> {
        let mut input = ImageInput::unchanged(channels);
        (input.resize, input.rounded) = (self.resize()?, true);
        input.range = PixelRange::Byte;
        if self.is_on("do_rescale") {
            let factor =
                self.settings.get("rescale_factor").map_or(Some(1.0 / 255.0), Value::as_f64);
            if factor.is_none_or(|factor| (factor - 1.0 / 255.0).abs() > ROUNDING) {
                return Err(self.invalid("rescale_factor", "1 / 255"));
            }
            input.range = PixelRange::Unit;
        }
        if self.is_on("do_normalize") {
            let numbers = |key: &str| {
                let list = self.settings.get(key).and_then(Value::as_array);
                let list: Option<Vec<f64>> =
                    list.and_then(|list| list.iter().map(Value::as_f64).collect());
                list.ok_or_else(|| self.invalid(key, "a list of one number per channel"))
            };
            let (mean, std) = (numbers("image_mean")?, numbers("image_std")?);
            input.normalization = Some(Normalization { mean, std });
        }
        input.ensure_valid()?;
        Ok(input)
    }

    fn resize(&self) -> Result<Resize> {
        if !self.is_on("do_resize") {
            return Err(self.invalid("do_resize", "true: images may have any size"));
        }
        if self.settings.get("resample").is_some_and(|value| value.as_i64() != Some(BICUBIC)) {
            return Err(self.invalid("resample", "3, which is bicubic"));
        }
        let size = self.settings.get("size");
        let shorter = size.and_then(|size| size.as_i64().or(size.get("shortest_edge")?.as_i64()));
        let crop = self.is_on("do_center_crop").then(|| self.settings.get("crop_size"));
        let whole = size.and_then(sides);
        match (shorter, whole, crop) {
            (Some(side), _, Some(crop)) => match crop.and_then(sides) {
                Some([height, width]) if height == width && height <= side => {
                    Ok(Resize::BicubicCrop { side, crop: height })
                }
                _ => Err(self.invalid("crop_size", &format!("a square of at most {side} pixels"))),
            },
            (None, Some(size), None) => Ok(Resize::Bicubic(size)),
            (None, Some(size), Some(crop)) if crop.and_then(sides) == Some(size) => {
                Ok(Resize::Bicubic(size))
            }
            (Some(_), _, None) => {
                Err(self.invalid("do_center_crop", "true: all images must get one size"))
            }
            _ => Err(self.invalid("size", "`shortest_edge`, or `height` and `width`, in pixels")),
        }
    }

    /// A switch, on by default.
    fn is_on(&self, key: &str) -> bool {
        self.settings.get(key).and_then(Value::as_bool).unwrap_or(true)
    }

    fn invalid(&self, key: &str, expected: &str) -> crate::Error {
        let value = self.settings.get(key).map_or("not set".to_owned(), Value::to_string);
        let found = format!("{}, whose `{key}` is {value}", self.path.display());
        Invalid::new(self.field, found, expected).into()
    }
}

/// Height and width, from a number or from both.
fn sides(value: &Value) -> Option<[i64; 2]> {
    if let Some(side) = value.as_i64() {
        return Some([side, side]);
    }
    Some([value.get("height")?.as_i64()?, value.get("width")?.as_i64()?])
}
