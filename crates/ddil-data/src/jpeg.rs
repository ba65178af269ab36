//! JPEG files.

mod decoder;

use std::path::Path;

use ddil_files::read_bounded;
use exif::{In, Reader, Tag};
use mozjpeg::decompress::DecompressStarted;
use mozjpeg::{ColorSpace, Marker};

use crate::layout::Layout;
use crate::{Error, Result};

/// Upper bound on the pixels per byte of a JPEG: a block of 8x8 values takes at least one bit. If the header states
/// more, the decoder would invent the missing pixels.
const MAX_PIXELS_PER_BYTE: usize = 8 * 8 * 8;

/// The pixels of a grey or colour JPEG, oriented by its Exif data.
///
/// The decoder is libjpeg-turbo's, with the settings of Pillow: the same pixels, bit by bit.
pub(crate) fn read(path: &Path) -> Result<(Layout, Vec<u8>)> {
    let bytes = read_bounded(path, u64::MAX)
        .map_err(|source| Error::Read { path: path.to_owned(), source })?;
    decoder::caught(|| decode(path, &bytes)).unwrap_or_else(|message| Err(jpeg(path, message)))
}

/// The error of a file that the decoder refuses.
fn jpeg(path: &Path, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Jpeg { path: path.to_owned(), source: error.into() }
}

/// As [`read`]; errors within the decoder unwind.
fn decode(path: &Path, bytes: &[u8]) -> Result<(Layout, Vec<u8>)> {
    let failed = |error: std::io::Error| jpeg(path, error);
    let decoder =
        decoder::strict().with_markers(&[Marker::APP(1)]).from_mem(bytes).map_err(failed)?;
    ensure_possible(path, decoder.size(), bytes.len())?;
    let exif = decoder.markers().find_map(|marker| marker.data.strip_prefix(b"Exif\0\0"));
    let orientation = exif.map_or(UPRIGHT, orientation);
    let (channels, pixels, [height, width]) = match decoder.color_space() {
        ColorSpace::JCS_GRAYSCALE => {
            let mut rows = decoder.grayscale().map_err(failed)?;
            let pixels = rows.read_scanlines::<u8>().map_err(failed)?;
            (1, pixels, finished(rows).map_err(failed)?)
        }
        ColorSpace::JCS_YCbCr | ColorSpace::JCS_RGB => {
            let mut rows = decoder.rgb().map_err(failed)?;
            let pixels = rows.read_scanlines::<[u8; 3]>().map_err(failed)?.into_flattened();
            (3, pixels, finished(rows).map_err(failed)?)
        }
        other => {
            let found = match other {
                ColorSpace::JCS_CMYK => "CMYK".to_owned(),
                ColorSpace::JCS_YCCK => "YCCK".to_owned(),
                _ => "of an unknown colour space".to_owned(),
            };
            let expected = "grey or RGB".to_owned();
            return Err(Error::Image { path: path.to_owned(), found, expected });
        }
    };
    Ok(oriented(Layout { channels, height, width }, pixels, orientation))
}

/// Ends the decoding, which reads up to the end of the file; height and width.
fn finished(rows: DecompressStarted<&[u8]>) -> std::io::Result<[u32; 2]> {
    let size = [rows.height() as u32, rows.width() as u32];
    rows.finish()?;
    Ok(size)
}

fn ensure_possible(path: &Path, (width, height): (usize, usize), num_bytes: usize) -> Result<()> {
    let max_pixels = num_bytes.saturating_mul(MAX_PIXELS_PER_BYTE);
    if width.saturating_mul(height) <= max_pixels {
        return Ok(());
    }
    let found = format!("{width}x{height} pixels");
    let expected = format!("at most {max_pixels} pixels, the maximum for {num_bytes} bytes");
    Err(Error::Image { path: path.to_owned(), found, expected })
}

/// The orientation of an image that needs no rotation.
const UPRIGHT: u32 = 1;

/// The orientation of an image, 1 to 8 (tag 0x0112 of Exif 2.32). Unreadable Exif data are ignored, as in Pillow.
fn orientation(exif: &[u8]) -> u32 {
    let read = Reader::new().read_raw(exif.to_vec()).ok();
    let field = read.as_ref().and_then(|exif| exif.get_field(Tag::Orientation, In::PRIMARY));
    field.and_then(|field| field.value.get_uint(0)).unwrap_or(UPRIGHT)
}

/// The image rotated and mirrored to upright.
fn oriented(layout: Layout, pixels: Vec<u8>, orientation: u32) -> (Layout, Vec<u8>) {
    if !(2..=8).contains(&orientation) {
        return (layout, pixels);
    }
    let (channels, last_row, last_column) =
        (layout.channels, layout.height as usize - 1, layout.width as usize - 1);
    let swaps_sides = orientation >= 5;
    let [height, width] =
        if swaps_sides { [layout.width, layout.height] } else { [layout.height, layout.width] };
    let mut upright = Vec::with_capacity(pixels.len());
    for row in 0..height as usize {
        for column in 0..width as usize {
            let (from_row, from_column) = match orientation {
                2 => (row, last_column - column),
                3 => (last_row - row, last_column - column),
                4 => (last_row - row, column),
                5 => (column, row),
                6 => (last_row - column, row),
                7 => (last_row - column, last_column - row),
                _ => (column, last_column - row),
            };
            let start = (from_row * layout.width as usize + from_column) * channels;
            upright.extend_from_slice(&pixels[start..start + channels]);
        }
    }
    (Layout { channels, height, width }, upright)
}
