//! JPEG files.

use std::path::Path;

use ddil_files::read_bounded;
use ddil_libtorch::{Jpeg, JpegError, decode_jpeg};
use exif::{In, Reader, Tag};

use crate::layout::Layout;
use crate::{Error, Result};

/// Upper bound on the pixels per byte of a JPEG: a block of 8x8 values takes at least one bit. If the header states
/// more, the decoder would invent the missing pixels.
const MAX_PIXELS_PER_BYTE: usize = 8 * 8 * 8;

/// The pixels of a grey or colour JPEG, oriented by its Exif data; the same as Pillow's, bit by bit.
pub(crate) fn read(path: &Path) -> Result<(Layout, Vec<u8>)> {
    let bytes = read_bounded(path, u64::MAX)
        .map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let max_pixels = bytes.len().saturating_mul(MAX_PIXELS_PER_BYTE);
    let Jpeg { pixels, channels, height, width, exif, .. } =
        decode_jpeg(&bytes, max_pixels).map_err(|error| refused(path, error, bytes.len()))?;
    let layout = Layout { channels, height, width };
    Ok(oriented(layout, pixels, exif.as_deref().map_or(UPRIGHT, orientation)))
}

/// Whether the header of a JPEG states three components.
pub(crate) fn is_colour(path: &Path) -> bool {
    read_bounded(path, u64::MAX).is_ok_and(|bytes| num_components(&bytes) == Some(3))
}

/// The number of components in the frame header (B.2.2 of ITU-T T.81): marker, length, precision, height, width, number.
fn num_components(bytes: &[u8]) -> Option<u8> {
    let mut at = 2;
    loop {
        let marker = *bytes.get(at + 1)?;
        let is_frame = (0xc0..=0xcf).contains(&marker) && ![0xc4, 0xc8, 0xcc].contains(&marker);
        if is_frame {
            return bytes.get(at + 9).copied();
        }
        // A fill byte before a marker; otherwise the length follows, without the marker.
        at += if marker == 0xff {
            1
        } else {
            2 + usize::from(u16::from_be_bytes([*bytes.get(at + 2)?, *bytes.get(at + 3)?]))
        };
    }
}

fn refused(path: &Path, error: JpegError, num_bytes: usize) -> Error {
    let path = path.to_owned();
    match error {
        JpegError::TooManyPixels { width, height, max_pixels } => {
            let found = format!("{width}x{height} pixels");
            let expected =
                format!("at most {max_pixels} pixels, the maximum for {num_bytes} bytes");
            Error::Image { path, found, expected }
        }
        JpegError::Colours { found } => {
            Error::Image { path, found: found.to_owned(), expected: "grey or RGB".to_owned() }
        }
        error => Error::Jpeg { path, source: error.into() },
    }
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
