//! PNG and JPEG files, by their names.

use std::{
    fs,
    io::BufReader,
    path::{Path, PathBuf},
};

use ddil_files::open_regular_file;
use png::{ColorType, Decoder, Transformations};

use crate::layout::Layout;
use crate::{Error, Result, jpeg};

/// The maximum compression ratio of Deflate. An image whose header states more pixels cannot contain them.
const MAX_DEFLATE_RATIO: u64 = 1032;

/// The entries of a folder that are not hidden, sorted by name.
pub(crate) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = |source| Error::Read { path: folder.to_owned(), source };
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(read)? {
        let entry = entry.map_err(read)?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            entries.push(entry.path());
        }
    }
    entries.sort();
    Ok(entries)
}

pub(crate) fn is_image(path: &Path) -> bool {
    (has_extension(path, "png") || is_jpeg(path)) && path.is_file()
}

fn is_jpeg(path: &Path) -> bool {
    has_extension(path, "jpg") || has_extension(path, "jpeg")
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|own| own.eq_ignore_ascii_case(extension))
}

pub(crate) fn read_image(path: &Path) -> Result<(Layout, Vec<u8>)> {
    if is_jpeg(path) { jpeg::read(path) } else { read_png(path, Transparency::Refused) }
}

/// As [`read_image`], without the transparency that a file may have.
pub(crate) fn read_opaque(path: &Path) -> Result<(Layout, Vec<u8>)> {
    if is_jpeg(path) { jpeg::read(path) } else { read_png(path, Transparency::Dropped) }
}

/// Whether a file is RGB, by its header; not if it cannot be read.
pub(crate) fn is_colour(path: &Path) -> bool {
    if is_jpeg(path) {
        return jpeg::is_colour(path);
    }
    let Ok(file) = open_regular_file(path) else { return false };
    let mut decoder = Decoder::new(BufReader::new(file));
    decoder.set_transformations(Transformations::normalize_to_color8());
    let is_rgb = |colour| matches!(colour, ColorType::Rgb | ColorType::Rgba);
    decoder.read_info().is_ok_and(|reader| is_rgb(reader.output_color_type().0))
}

/// What becomes of an alpha channel.
#[derive(Clone, Copy, PartialEq)]
enum Transparency {
    Refused,
    Dropped,
}

fn read_png(path: &Path, transparency: Transparency) -> Result<(Layout, Vec<u8>)> {
    let png = |source| Error::Png { path: path.to_owned(), source };
    let file =
        open_regular_file(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let length =
        file.metadata().map_err(|source| Error::Read { path: path.to_owned(), source })?.len();
    // The factor 8: one bit per pixel becomes one byte.
    let max_bytes = length.saturating_mul(8 * MAX_DEFLATE_RATIO);
    let mut decoder = Decoder::new(BufReader::new(file));
    decoder.set_transformations(Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(png)?;

    let (colour, _) = reader.output_color_type();
    let refused = |found: String| {
        let expected = "grey or RGB, without transparency".to_owned();
        Error::Image { path: path.to_owned(), found, expected }
    };
    let (stored, channels) = match colour {
        ColorType::Grayscale => (1, 1),
        ColorType::Rgb => (3, 3),
        ColorType::GrayscaleAlpha => (2, 1),
        ColorType::Rgba => (4, 3),
        ColorType::Indexed => return Err(refused("indexed after decoding".to_owned())),
    };
    let too_large = || png(png::DecodingError::LimitsExceeded);
    let len = reader.output_buffer_size().ok_or_else(too_large)?;
    if len as u64 > max_bytes {
        return Err(too_large());
    }
    let mut pixels = vec![0; len];
    let info = reader.next_frame(&mut pixels).map_err(png)?;
    if stored > channels {
        // An alpha channel that hides nothing, as many programs write it, means nothing.
        let is_opaque = || pixels.chunks_exact(stored).all(|pixel| pixel[channels] == u8::MAX);
        if transparency == Transparency::Refused && !is_opaque() {
            return Err(refused("partly transparent".to_owned()));
        }
        pixels =
            pixels.chunks_exact(stored).flat_map(|pixel| &pixel[..channels]).copied().collect();
    }
    Ok((Layout { channels, height: info.height, width: info.width }, pixels))
}
