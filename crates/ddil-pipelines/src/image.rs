//! Tensors to 8-bit images: single images, grids, PNG files.

mod labels;

use std::{
    fs,
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use ddil_files::write_atomic;
use ddil_libtorch::ensure_dense;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// The expected tensor, for error messages.
const EXPECTED: &str =
    "expected a floating-point tensor [n, c, h, w] with c 1 or 3 and no empty dimension";

/// The keyword of the text about an image, one of those that the PNG standard registers.
const DESCRIPTION: &str = "Description";

/// An 8-bit image, grey or RGB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    width: u32,
    height: u32,
    channels: usize,
    pixels: Vec<u8>,
}

/// Layout of images in a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Images per row.
    pub columns: NonZeroU32,
    /// Enlargement: each pixel becomes a square with this side.
    pub scale: NonZeroU32,
    /// Pixels between and around images, not enlarged.
    pub gutter: u32,
    /// Grey value of the gutters; 255 is white.
    pub background: u8,
}

impl Layout {
    /// `columns` images per row, not enlarged, with white gutters two pixels wide.
    pub fn columns(columns: NonZeroU32) -> Self {
        Self { columns, scale: NonZeroU32::MIN, gutter: 2, background: 255 }
    }
}

impl Image {
    /// Arranges images in a grid, row by row.
    ///
    /// A value `x` becomes `(x + 1) * 127.5`, clamped to `[0, 255]` and rounded to the nearest integer, ties to even.
    ///
    /// # Shapes and units
    ///
    /// - `images`: `[n, c, h, w]`, floating-point, any device, -1 is black and 1 is white; `c` is 1 (grey) or 3 (RGB)
    ///
    /// # Errors
    ///
    /// [`Error::Image`] for another shape or kind, or if a value is NaN.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_pipelines::{Layout, Image};
    /// use std::num::NonZeroU32;
    /// use tch::{Tensor, kind};
    ///
    /// let columns = NonZeroU32::new(4).ok_or("not zero")?;
    /// let images = Tensor::zeros([8, 1, 32, 32], kind::FLOAT_CPU);
    /// let grid = Image::grid(&images, Layout::columns(columns))?;
    /// assert_eq!((grid.width(), grid.height()), (4 * 34 + 2, 2 * 34 + 2));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn grid(images: &Tensor, layout: Layout) -> Result<Self> {
        let images = Self::each(images)?;
        let Some(first) = images.first() else { return Err(invalid("no images".into())) };
        let (columns, scale) = (layout.columns.get().min(images.len() as u32), layout.scale.get());
        let rows = (images.len() as u32).div_ceil(columns);
        let cell = |pixels: u32| pixels * scale + layout.gutter;
        let (cell_width, cell_height) = (cell(first.width), cell(first.height));
        let mut grid = Self::filled(
            columns * cell_width + layout.gutter,
            rows * cell_height + layout.gutter,
            first.channels,
            layout.background,
        );
        for (index, image) in (0..).zip(&images) {
            let left = layout.gutter + index % columns * cell_width;
            let top = layout.gutter + index / columns * cell_height;
            grid.paste(image, left, top, scale);
        }
        Ok(grid)
    }

    /// Converts each image separately; the range of values is that of [`grid`](Self::grid).
    ///
    /// # Errors
    ///
    /// As [`grid`](Self::grid).
    pub fn each(images: &Tensor) -> Result<Vec<Self>> {
        ensure_dense("Image::each", "images", images)?;
        let size = images.size();
        let &[_, channels @ (1 | 3), height, width] = size.as_slice() else {
            return Err(invalid(format!("a tensor of shape {size:?}")));
        };
        if height * width == 0 {
            return Err(invalid(format!("a tensor of shape {size:?}")));
        }
        let pixels = to_bytes(images)?;
        let image = |pixels: &[u8]| Self {
            width: width as u32,
            height: height as u32,
            channels: channels as usize,
            pixels: pixels.to_vec(),
        };
        Ok(pixels.chunks((channels * height * width) as usize).map(image).collect())
    }

    fn filled(width: u32, height: u32, channels: usize, value: u8) -> Self {
        let pixels = vec![value; width as usize * height as usize * channels];
        Self { width, height, channels, pixels }
    }

    fn paste(&mut self, image: &Self, left: u32, top: u32, scale: u32) {
        for y in 0..image.height * scale {
            for x in 0..image.width * scale {
                let from = image.offset(x / scale, y / scale);
                let to = self.offset(left + x, top + y);
                let pixel = &image.pixels[from..from + image.channels];
                self.pixels[to..to + image.channels].copy_from_slice(pixel);
            }
        }
    }

    fn offset(&self, x: u32, y: u32) -> usize {
        (y as usize * self.width as usize + x as usize) * self.channels
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// 1 for grey, 3 for RGB.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The pixels, `[height, width, channels]` in row-major order.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The content of a PNG file.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] if the encoder fails, for example for a side of more than 2³¹ pixels.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        self.encoded(None)
    }

    fn encoded(&self, description: Option<&str>) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        let mut encoder = png::Encoder::new(&mut content, self.width, self.height);
        encoder.set_color(if self.channels == 1 {
            png::ColorType::Grayscale
        } else {
            png::ColorType::Rgb
        });
        encoder.set_depth(png::BitDepth::Eight);
        let text = description
            .map_or(Ok(()), |text| encoder.add_itxt_chunk(DESCRIPTION.to_owned(), text.to_owned()));
        text.and_then(|()| encoder.write_header())
            .and_then(|mut writer| {
                writer.write_image_data(&self.pixels)?;
                writer.finish()
            })
            .map_err(|error| invalid(format!("{}x{}: {error}", self.width, self.height)))?;
        Ok(content)
    }

    /// Writes a PNG file atomically; replaces an existing file.
    ///
    /// # Errors
    ///
    /// [`Error::Files`] if the file cannot be written, [`Error::Image`] as for [`to_png`](Self::to_png).
    pub fn save(&self, path: &Path) -> Result<()> {
        Ok(write_atomic(path, &self.to_png()?)?)
    }

    /// As [`save`](Self::save), with a text about the image in the file (keyword `Description` of the PNG standard).
    ///
    /// # Errors
    ///
    /// As [`save`](Self::save).
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_pipelines::{Image, layout};
    /// use tch::{Tensor, kind};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("grid.png");
    /// let grid = Image::grid(&Tensor::zeros([2, 1, 4, 4], kind::FLOAT_CPU), layout(2))?;
    /// grid.save_described(&path, "50 steps, guidance 3")?;
    /// let text = Image::description_of(&std::fs::read(&path)?);
    /// assert_eq!(text.as_deref(), Some("50 steps, guidance 3"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_described(&self, path: &Path, description: &str) -> Result<()> {
        Ok(write_atomic(path, &self.encoded(Some(description))?)?)
    }

    /// The text in a PNG file that [`save_described`](Self::save_described) wrote; `None` for any other content.
    pub fn description_of(png: &[u8]) -> Option<String> {
        let reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().ok()?;
        let mut texts = reader.info().utf8_text.iter();
        let text = texts.find(|text| text.keyword == DESCRIPTION)?;
        text.get_text().ok()
    }
}

/// Writes each image to a PNG file `000000.png`, `000001.png`, .., counted from `first`, and returns the paths.
///
/// Creates the folder if it does not exist.
///
/// # Errors
///
/// [`Error::Image`] as for [`Image::grid`], [`Error::Files`] if a file cannot be written.
pub fn save_each(images: &Tensor, folder: &Path, first: u64) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    (first..)
        .zip(Image::each(images)?)
        .map(|(number, image)| {
            let path = folder.join(format!("{number:06}.png"));
            image.save(&path)?;
            Ok(path)
        })
        .collect()
}

/// `[n, c, h, w]` in [-1, 1] to bytes `[n, h, w, c]`, the order of PNG.
fn to_bytes(images: &Tensor) -> Result<Vec<u8>> {
    if !matches!(images.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
        return Err(invalid(format!("a tensor of kind {:?}", images.kind())));
    }
    let _guard = tch::no_grad_guard();
    let convert = || {
        let images = images.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        if images.f_isnan()?.f_any()?.f_int64_value(&[])? != 0 {
            return Ok(None);
        }
        let scaled = images.f_add_scalar(1)?.f_mul_scalar(127.5)?.f_clamp(0, 255)?.f_round()?;
        let bytes = scaled.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_to_kind(Kind::Uint8)?;
        let mut pixels = vec![0; bytes.numel()];
        bytes.f_copy_data_u8(&mut pixels, bytes.numel())?;
        Ok(Some(pixels))
    };
    let pixels = convert().map_err(Error::torch("Image::each"))?;
    pixels.ok_or_else(|| invalid("images with NaN values".into()))
}

fn invalid(found: String) -> Error {
    Error::Image { found, expected: EXPECTED }
}
