use std::path::Path;

use ddil_files::Invalid;
use tch::{Kind, Tensor};

use crate::files::read_image;
use crate::layout::Layout;
use crate::{Error, Result};

/// A scaled and centre-cropped image; see [`read_cropped`].
#[derive(Debug)]
pub struct CroppedImage {
    /// `[channels, height, width]`, `Float`, values from -1 to 1. A grey image read with 3 channels is repeated.
    pub pixels: Tensor,
    /// Height and width of the file.
    pub original_size: [i64; 2],
    /// Rows cropped at the top and columns cropped on the left, after scaling.
    pub crop_offset: [i64; 2],
}

/// Maximum height and width.
const MAX_SIDE: i64 = 65_536;

/// Maximum ratio of a side of the scaled image to the cropped side: a strip one pixel high would be scaled to more
/// memory than is available.
const MAX_SCALED_RATIO: i64 = 64;

/// Reads a PNG or JPEG file, scales it to cover `height` and `width`, and crops the centre.
///
/// Scaling is antialiased bilinear interpolation, as in training scripts for text-to-image models. `channels` is 3, or
/// 1 for grey images.
///
/// # Errors
///
/// [`Error::Invalid`] for an invalid size; [`Error::Read`], [`Error::Png`] and [`Error::Jpeg`]; [`Error::Image`] for an
/// image with transparency, a colour image with `channels` 1, and an image of which less than a 64th would remain;
/// [`Error::Torch`] if memory runs out.
///
/// # Example
///
/// ```
/// use ddil_data::read_cropped;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("wide.png");
/// let mut png = png::Encoder::new(std::fs::File::create(&path)?, 8, 4);
/// png.set_color(png::ColorType::Grayscale);
/// png.write_header()?.write_image_data(&[255; 32])?;
///
/// let image = read_cropped(&path, 3, [2, 2])?;
/// assert_eq!(image.pixels.size(), [3, 2, 2]);
/// // Scaled to 2x4, then one column cropped on each side.
/// assert_eq!((image.original_size, image.crop_offset), ([4, 8], [0, 1]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_cropped(path: &Path, channels: i64, [height, width]: [i64; 2]) -> Result<CroppedImage> {
    ensure_size([height, width])?;
    if !matches!(channels, 1 | 3) {
        return Err(Invalid::new("channels", channels, "1 or 3").into());
    }
    let (layout, bytes) = read_image(path)?;
    let own_channels = layout.channels as i64;
    if own_channels != 1 && own_channels != channels {
        let (found, expected) = (layout.to_string(), format!("grey: {channels} channels"));
        return Err(Error::Image { path: path.to_owned(), found, expected });
    }
    let Levels { levels, crop_offset } = scale(path, layout, &bytes, [height, width])?;
    let signed_unit = || {
        levels
            .f_div_scalar(127.5)?
            .f_sub_scalar(1.0)?
            .f_expand([channels, height, width], false)?
            .f_contiguous()
    };
    Ok(CroppedImage {
        pixels: signed_unit().map_err(Error::torch("read_cropped"))?,
        original_size: [layout.height.into(), layout.width.into()],
        crop_offset,
    })
}

/// As [`read_cropped`], in levels: `[1 or 3, height, width]`, `Uint8`.
pub(crate) fn read_cropped_levels(path: &Path, size: [i64; 2]) -> Result<Tensor> {
    let (layout, bytes) = read_image(path)?;
    let Levels { levels, .. } = scale(path, layout, &bytes, size)?;
    rounded(&levels).map_err(Error::torch("read_cropped"))
}

pub(crate) fn ensure_size([height, width]: [i64; 2]) -> Result<()> {
    if [height, width].iter().any(|side| !(1..=MAX_SIDE).contains(side)) {
        let expected = format!("in 1..={MAX_SIDE}");
        return Err(Invalid::new("height, width", format!("{height}, {width}"), expected).into());
    }
    Ok(())
}

/// The centre of a scaled image.
struct Levels {
    /// `[channels, height, width]`, `Float`, 0 to 255.
    levels: Tensor,
    /// See [`CroppedImage::crop_offset`].
    crop_offset: [i64; 2],
}

fn scale(path: &Path, layout: Layout, bytes: &[u8], size: [i64; 2]) -> Result<Levels> {
    let own = [i64::from(layout.height), i64::from(layout.width)];
    let Some(cover) = Cover::new(own, size) else {
        let (found, expected) = (layout.to_string(), Cover::expected(size));
        return Err(Error::Image { path: path.to_owned(), found, expected });
    };
    let run = || -> std::result::Result<Tensor, tch::TchError> {
        let size = [own[0], own[1], layout.channels as i64];
        let pixels = Tensor::f_from_data_size(bytes, &size, Kind::Uint8)?
            .f_permute([2, 0, 1])?
            .f_unsqueeze(0)?;
        cover.levels(&pixels)?.f_squeeze_dim(0)
    };
    let levels = run().map_err(Error::torch("read_cropped"))?;
    Ok(Levels { levels, crop_offset: cover.crop_offset })
}

/// How images of one size are scaled to cover another, and which part remains.
pub(crate) struct Cover {
    own: [i64; 2],
    scaled: [i64; 2],
    crop_offset: [i64; 2],
    size: [i64; 2],
}

impl Cover {
    /// None if less than a 64th of the images would remain.
    pub(crate) fn new(own: [i64; 2], size: [i64; 2]) -> Option<Self> {
        let scaled = covering_size(own, size);
        let remains = |i: usize| scaled[i] <= MAX_SCALED_RATIO * size[i];
        let crop_offset = [(scaled[0] - size[0]) / 2, (scaled[1] - size[1]) / 2];
        (remains(0) && remains(1)).then_some(Self { own, scaled, crop_offset, size })
    }

    /// The pixels of an image before or after scaling, whichever are more.
    pub(crate) fn num_pixels(&self) -> i64 {
        let of = |[height, width]: [i64; 2]| height * width;
        of(self.own).max(of(self.scaled))
    }

    /// What the images must be for [`new`](Self::new).
    pub(crate) fn expected([height, width]: [i64; 2]) -> String {
        format!(
            "an aspect ratio closer to {width}x{height}: less than a {MAX_SCALED_RATIO}th of it would remain"
        )
    }

    /// `[n, channels, height, width]`, `Uint8`, to `Float` levels from 0 to 255 of the other size, not rounded.
    fn levels(&self, pixels: &Tensor) -> std::result::Result<Tensor, tch::TchError> {
        let pixels = pixels.f_to_kind(Kind::Float)?;
        let scaled = if self.scaled == self.own {
            pixels
        } else {
            pixels.f_internal_upsample_bilinear2d_aa(self.scaled, false, None, None)?
        };
        scaled.f_narrow(2, self.crop_offset[0], self.size[0])?.f_narrow(
            3,
            self.crop_offset[1],
            self.size[1],
        )
    }

    /// As [`levels`](Self::levels), rounded to `Uint8`.
    pub(crate) fn rounded(&self, pixels: &Tensor) -> Result<Tensor> {
        self.levels(pixels).and_then(|levels| rounded(&levels)).map_err(Error::torch("scaled"))
    }
}

/// A mean of levels is never outside of them.
fn rounded(levels: &Tensor) -> std::result::Result<Tensor, tch::TchError> {
    levels.f_round()?.f_to_kind(Kind::Uint8)?.f_contiguous()
}

/// The size of an image scaled to cover `[height, width]` with one side exact.
fn covering_size([own_height, own_width]: [i64; 2], [height, width]: [i64; 2]) -> [i64; 2] {
    // The larger of the two factors height / own_height and width / own_width.
    if height * own_width >= width * own_height {
        [height, (own_width * height / own_height).max(width)]
    } else {
        [(own_height * width / own_width).max(height), width]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_sizes_are_minimal() {
        assert_eq!(covering_size([20, 30], [10, 10]), [10, 15]);
        assert_eq!(covering_size([30, 20], [10, 10]), [15, 10]);
        assert_eq!(covering_size([10, 10], [10, 10]), [10, 10]);
        assert_eq!(covering_size([5, 9], [10, 10]), [10, 18]);
        assert_eq!(covering_size([100, 7], [64, 64]), [914, 64]);
        assert_eq!(covering_size([40, 40], [10, 30]), [30, 30]);
    }

    fn written(
        name: &str,
        colour: png::ColorType,
        [height, width]: [u32; 2],
        bytes: &[u8],
    ) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("ddil-{}-{name}.png", std::process::id()));
        let file = std::fs::File::create(&path).expect("writable");
        let mut encoder = png::Encoder::new(file, width, height);
        encoder.set_color(colour);
        let mut writer = encoder.write_header().expect("the header is valid");
        writer.write_image_data(bytes).expect("the size matches");
        path
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).expect("numbers")
    }

    #[test]
    fn the_centre_is_kept_and_grey_is_repeated() -> Result<()> {
        // Two rows of four: the outer columns are cropped.
        let path =
            written("grey", png::ColorType::Grayscale, [2, 4], &[9, 0, 255, 9, 9, 51, 204, 9]);
        let centre = [-1.0, 1.0, -0.6, 0.6];
        let grey = read_cropped(&path, 1, [2, 2])?;
        assert_eq!((grey.original_size, grey.crop_offset), ([2, 4], [0, 1]));
        let near = |found: &[f32], expected: &[f32]| {
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6)
        };
        assert!(near(&values(&grey.pixels), &centre));
        let colour = read_cropped(&path, 3, [2, 2])?;
        assert_eq!(colour.pixels.size(), [3, 2, 2]);
        assert!(near(&values(&colour.pixels), &centre.repeat(3)));
        std::fs::remove_file(path).expect("the file exists");
        Ok(())
    }

    #[test]
    fn scaling_keeps_the_mean_and_colour_is_refused_for_one_channel() -> Result<()> {
        let bytes: Vec<u8> = (0..3 * 16).map(|i| if i / 3 % 2 == 0 { 0 } else { 200 }).collect();
        let path = written("rgb", png::ColorType::Rgb, [4, 4], &bytes);
        // Without antialiasing, stripes one pixel wide would become one of the two values.
        let small = read_cropped(&path, 3, [2, 2])?.pixels;
        let mean = small.mean(Kind::Float).double_value(&[]);
        assert!((mean - (100.0 / 127.5 - 1.0)).abs() < 1e-5, "{mean}");
        let refused = read_cropped(&path, 1, [2, 2]).expect_err("a colour image").to_string();
        assert!(refused.contains("RGB, 4x4 pixels") && refused.contains("grey"), "{refused}");
        std::fs::remove_file(path).expect("the file exists");
        Ok(())
    }
}
