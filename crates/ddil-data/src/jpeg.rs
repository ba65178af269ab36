//! JPEG files.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use ddil_files::{open_regular_file, read_bounded};
use ddil_libtorch::{Jpeg, JpegError, decode_jpeg};
use exif::{In, Tag};

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

/// Whether the header of a JPEG states three components; not if it cannot be read.
pub(crate) fn is_colour(path: &Path) -> bool {
    let Ok(file) = open_regular_file(path) else { return false };
    num_components(&mut BufReader::new(file)).is_ok_and(|found| found == Some(3))
}

/// The number of components in the frame header, which is found as libjpeg finds it: bytes before a marker are skipped, and
/// segments by their length. `None` if there is none before the pixels.
fn num_components(file: &mut impl BufRead) -> io::Result<Option<u8>> {
    if read_bytes(file)? != [0xff, 0xd8] {
        return Ok(None);
    }
    loop {
        match next_marker(file)? {
            // B.2.2 of ITU-T T.81: length, precision, height, width, number of components.
            0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                let [.., number] = read_bytes::<8>(file)?;
                return Ok(Some(number));
            }
            // Start of an image, end of an image, start of a scan.
            0xd8..=0xda => return Ok(None),
            // Markers without a length.
            0x01 | 0xd0..=0xd7 => {}
            _ => {
                // The length includes its own two bytes.
                let len = u64::from(u16::from_be_bytes(read_bytes(file)?)).saturating_sub(2);
                io::copy(&mut file.take(len), &mut io::sink())?;
            }
        }
    }
}

/// The second byte of the next marker. 0xff may occur several times before it; with 0 it is a byte of data.
fn next_marker(file: &mut impl BufRead) -> io::Result<u8> {
    loop {
        file.skip_until(0xff)?;
        let mut marker = 0xff;
        while marker == 0xff {
            [marker] = read_bytes(file)?;
        }
        if marker != 0 {
            return Ok(marker);
        }
    }
}

fn read_bytes<const N: usize>(file: &mut impl BufRead) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
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
    let read = exif::Reader::new().read_raw(exif.to_vec()).ok();
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

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: [u8; 10] = [0xff, 0xc0, 0, 17, 8, 0, 1, 0, 1, 3];

    fn number(parts: &[&[u8]]) -> Option<u8> {
        let bytes = [&[0xff, 0xd8], &parts.concat()[..]].concat();
        // A buffer of one byte, so that every read reaches its end.
        num_components(&mut BufReader::with_capacity(1, &bytes[..])).ok().flatten()
    }

    #[test]
    fn the_frame_is_found_behind_segments_and_other_bytes() {
        // Its content is like a frame of one component.
        let comment = [0xff, 0xfe, 0, 12, 0xff, 0xc0, 0, 11, 8, 0, 1, 0, 1, 1];
        let tables = [0xff, 0xc4, 0, 3, 9];
        for before in [
            &[][..],
            &comment,
            &tables,
            &[comment, comment].concat(),
            // Bytes that belong to no segment, with data that begin like a marker.
            &[0, 7, 0xc0, 0xff, 0],
            &[&tables[..], &[1, 2, 3]].concat(),
            // Fill bytes.
            &[0xff, 0xff],
            // Markers without a length, and a length that is too small.
            &[0xff, 0x01, 0xff, 0xd0],
            &[0xff, 0xe0, 0, 1],
        ] {
            assert_eq!(number(&[before, &FRAME]), Some(3), "{before:x?}");
        }
    }

    #[test]
    fn a_file_without_a_frame_has_no_components() {
        for end in [0xd8, 0xd9, 0xda] {
            assert_eq!(number(&[&[0xff, end, 0, 2], &FRAME]), None, "{end:x}");
        }
        assert_eq!(number(&[&FRAME[..9]]), None);
        assert_eq!(number(&[&[0xff, 0xe0, 0, 30], &FRAME]), None);
        assert_eq!(number(&[]), None);
        assert!(num_components(&mut &FRAME[..]).is_ok_and(|found| found.is_none()));
    }
}
