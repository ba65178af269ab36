use std::path::Path;

use tch::{Kind, Tensor};

use super::folder::{Layout, read_picture};
use super::{Error, Result};

/// A picture brought to a size: its shorter side scaled, the rest cut off evenly.
#[derive(Debug)]
pub struct Cropped {
    /// `[3, height, width]`, `Float`, values from -1 to 1; a grey picture is three times the same.
    pub pixels: Tensor,
    /// Height and width of the file.
    pub original: [i64; 2],
    /// Rows and columns cut off at top and left, once scaled.
    pub cut_off: [i64; 2],
}

/// Reads a PNG and brings it to a size, as training scripts for text-to-image models do: scaled until it covers the
/// size, by antialiased linear interpolation, then cropped in the middle.
///
/// # Errors
///
/// [`Error::Read`] and [`Error::Png`]; [`Error::Picture`] for one with transparency; [`Error::Torch`] if memory runs out.
pub fn read_cropped(path: &Path, [height, width]: [i64; 2]) -> Result<Cropped> {
    let (Layout { channels, height: own_height, width: own_width }, bytes) = read_picture(path)?;
    let original = [i64::from(own_height), i64::from(own_width)];
    let scaled = covering(original, [height, width]);
    let cut_off = [(scaled[0] - height) / 2, (scaled[1] - width) / 2];
    let run = || -> std::result::Result<Tensor, tch::TchError> {
        let size = [original[0], original[1], channels as i64];
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
            .f_expand([1, 3, height, width], false)?
            .f_squeeze_dim(0)?
            .f_contiguous()
    };
    let pixels = run().map_err(|source| Error::Torch { op: "read_cropped", source })?;
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
}
