use std::path::Path;

use ddil_files::Invalid;
use tch::{Kind, Tensor};

use crate::folder::read_picture;
use crate::layout::Layout;
use crate::{Error, Result};

/// A picture brought to a size: its shorter side scaled, the rest cut off evenly.
#[derive(Debug)]
pub struct Cropped {
    /// `[channels, height, width]`, `Float`, values from -1 to 1; a grey picture in colour is three times the same.
    pub pixels: Tensor,
    /// Height and width of the file.
    pub original: [i64; 2],
    /// Rows and columns cut off at top and left, once scaled.
    pub cut_off: [i64; 2],
}

/// No image of this project is larger in either direction.
const MAX_SIDE: i64 = 65_536;

/// A strip of one pixel's height would be scaled to more memory than there is before all but its middle is cut off.
const MOST_SCALED: i64 = 64;

/// Reads a PNG or a JPEG and brings it to a size, as training scripts for text-to-image models do: scaled until it covers the
/// size, by antialiased linear interpolation, then cropped in the middle. `channels` are 3, or 1 for grey ones.
///
/// # Errors
///
/// [`Error::Invalid`] for a size of nothing; [`Error::Read`], [`Error::Png`] and [`Error::Jpeg`]; [`Error::Picture`] for one with transparency, for one in colour
/// where grey ones are wanted, and for one of which less than a 64th would be left; [`Error::Torch`] if memory runs out.
pub fn read_cropped(path: &Path, channels: i64, [height, width]: [i64; 2]) -> Result<Cropped> {
    if [height, width].iter().any(|side| !(1..=MAX_SIDE).contains(side)) {
        let expected = format!("in 1..={MAX_SIDE}");
        return Err(Invalid::new("height, width", format!("{height}, {width}"), expected).into());
    }
    if !matches!(channels, 1 | 3) {
        return Err(Invalid::new("channels", channels, "1 or 3").into());
    }
    let (layout, bytes) = read_picture(path)?;
    let Layout { channels: own_channels, height: own_height, width: own_width } = layout;
    let own_channels = own_channels as i64;
    if own_channels != 1 && own_channels != channels {
        let (found, expected) = (layout.to_string(), format!("grey: {channels} channels"));
        return Err(Error::Picture { path: path.to_owned(), found, expected });
    }
    let original = [i64::from(own_height), i64::from(own_width)];
    let scaled = covering(original, [height, width]);
    if scaled[0] > MOST_SCALED * height || scaled[1] > MOST_SCALED * width {
        let found = layout.to_string();
        let expected =
            format!("a picture nearer in shape to {width}x{height}, not a {MOST_SCALED}th of it");
        return Err(Error::Picture { path: path.to_owned(), found, expected });
    }
    let cut_off = [(scaled[0] - height) / 2, (scaled[1] - width) / 2];
    let run = || -> std::result::Result<Tensor, tch::TchError> {
        let size = [original[0], original[1], own_channels];
        let pixels = Tensor::f_from_data_size(&bytes, &size, Kind::Uint8)?
            .f_permute([2, 0, 1])?
            .f_to_kind(Kind::Float)?
            .f_unsqueeze(0)?;
        let scaled = if scaled == original {
            pixels
        } else {
            pixels.f_internal_upsample_bilinear2d_aa(scaled, false, None, None)?
        };
        scaled
            .f_narrow(2, cut_off[0], height)?
            .f_narrow(3, cut_off[1], width)?
            .f_div_scalar(127.5)?
            .f_sub_scalar(1.0)?
            .f_expand([1, channels, height, width], false)?
            .f_squeeze_dim(0)?
            .f_contiguous()
    };
    let pixels = run().map_err(Error::torch("read_cropped"))?;
    Ok(Cropped { pixels, original, cut_off })
}

/// The size of a picture once it is scaled to cover another, one side of it exactly.
fn covering([own_height, own_width]: [i64; 2], [height, width]: [i64; 2]) -> [i64; 2] {
    // Of the two factors the larger one: height / own_height against width / own_width.
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
    fn what_covers_is_no_larger_than_it_must_be() {
        assert_eq!(covering([20, 30], [10, 10]), [10, 15]);
        assert_eq!(covering([30, 20], [10, 10]), [15, 10]);
        assert_eq!(covering([10, 10], [10, 10]), [10, 10]);
        assert_eq!(covering([5, 9], [10, 10]), [10, 18]);
        assert_eq!(covering([100, 7], [64, 64]), [914, 64]);
        assert_eq!(covering([40, 40], [10, 30]), [30, 30]);
    }

    fn written(
        name: &str,
        colour: png::ColorType,
        [height, width]: [u32; 2],
        bytes: &[u8],
    ) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("ddil-{}-{name}.png", std::process::id()));
        let file = std::fs::File::create(&path).expect("it is writable");
        let mut encoder = png::Encoder::new(file, width, height);
        encoder.set_color(colour);
        let mut writer = encoder.write_header().expect("the header is valid");
        writer.write_image_data(bytes).expect("there are as many pixels");
        path
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).expect("numbers")
    }

    #[test]
    fn the_middle_is_kept_and_grey_is_a_colour() -> Result<()> {
        // Two rows of four: the outer columns are cut off.
        let path =
            written("grey", png::ColorType::Grayscale, [2, 4], &[9, 0, 255, 9, 9, 51, 204, 9]);
        let middle = [-1.0, 1.0, -0.6, 0.6];
        let grey = read_cropped(&path, 1, [2, 2])?;
        assert_eq!((grey.original, grey.cut_off), ([2, 4], [0, 1]));
        let near = |found: &[f32], expected: &[f32]| {
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6)
        };
        assert!(near(&values(&grey.pixels), &middle));
        let colour = read_cropped(&path, 3, [2, 2])?;
        assert_eq!(colour.pixels.size(), [3, 2, 2]);
        assert!(near(&values(&colour.pixels), &middle.repeat(3)));
        std::fs::remove_file(path).expect("it is there");
        Ok(())
    }

    #[test]
    fn what_is_scaled_keeps_its_mean_and_colours_are_not_taken_for_grey() -> Result<()> {
        let bytes: Vec<u8> = (0..3 * 16).map(|i| if i / 3 % 2 == 0 { 0 } else { 200 }).collect();
        let path = written("rgb", png::ColorType::Rgb, [4, 4], &bytes);
        // Without antialiasing stripes of one pixel would come out as one of the two.
        let small = read_cropped(&path, 3, [2, 2])?.pixels;
        let inner = small.mean(Kind::Float).double_value(&[]);
        assert!((inner - (100.0 / 127.5 - 1.0)).abs() < 1e-5, "{inner}");
        let refused = read_cropped(&path, 1, [2, 2]).expect_err("it has colours").to_string();
        assert!(refused.contains("RGB, 4x4 pixels") && refused.contains("grey"), "{refused}");
        std::fs::remove_file(path).expect("it is there");
        Ok(())
    }
}
