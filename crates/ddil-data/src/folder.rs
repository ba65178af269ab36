use std::{
    fs,
    io::BufReader,
    path::{Path, PathBuf},
};

use ddil_files::open_regular_file;
use png::{ColorType, Decoder, Transformations};
use tch::{Kind, Tensor};

use crate::layout::Layout;
use crate::{Error, ImageDataset, Result, jpeg};

/// Deflate packs no more than that into a byte: a picture that claims more pixels has not got them.
const MOST_PACKED: u64 = 1032;

/// A data set of the PNG and JPEG files in a folder, in the order of their names.
///
/// Pictures in the folder itself have no labels. Pictures in folders of it have: classes are those folders' names,
/// sorted. All must be of one size, and all grey or all RGB; palettes and 16 bits a value are brought to 8 bits, and a JPEG
/// is turned as its Exif data say. Other files are left alone, and so are names that begin with a dot.
///
/// # Errors
///
/// [`Error::Read`], [`Error::Png`], [`Error::Jpeg`] and [`Error::NoPictures`]; [`Error::Picture`] for a picture that differs from the
/// first or has transparency; [`Error::MixedFolder`] for pictures with labels beside pictures without.
pub fn read_image_folder(folder: &Path) -> Result<ImageDataset> {
    let entries = list(folder)?;
    let pictures: Vec<PathBuf> = entries.iter().filter(|path| is_picture(path)).cloned().collect();
    let classes = read_classes(&entries)?;
    match (pictures.first(), classes.first()) {
        (None, None) => Err(Error::NoPictures { path: folder.to_owned() }),
        (Some(picture), Some((class, _))) => Err(Error::MixedFolder {
            path: folder.to_owned(),
            picture: picture.clone(),
            folder: class.clone(),
        }),
        (Some(_), None) => ImageDataset::new(&read_pictures(&pictures)?, None),
        (None, Some(_)) => labelled(&classes),
    }
}

/// Folders among the entries that have pictures, with these.
fn read_classes(entries: &[PathBuf]) -> Result<Vec<(PathBuf, Vec<PathBuf>)>> {
    let mut classes = Vec::new();
    for folder in entries.iter().filter(|path| path.is_dir()) {
        let pictures: Vec<PathBuf> =
            list(folder)?.into_iter().filter(|path| is_picture(path)).collect();
        if !pictures.is_empty() {
            classes.push((folder.clone(), pictures));
        }
    }
    Ok(classes)
}

fn labelled(classes: &[(PathBuf, Vec<PathBuf>)]) -> Result<ImageDataset> {
    let name = |(folder, _): &(PathBuf, Vec<PathBuf>)| {
        folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    };
    let pictures: Vec<PathBuf> =
        classes.iter().flat_map(|(_, pictures)| pictures).cloned().collect();
    let labels: Vec<i64> = (0..)
        .zip(classes)
        .flat_map(|(label, (_, pictures))| std::iter::repeat_n(label, pictures.len()))
        .collect();
    ImageDataset::with_class_names(
        &read_pictures(&pictures)?,
        Some(&Tensor::from_slice(&labels)),
        classes.iter().map(name).collect(),
    )
}

/// Entries of a folder that are not hidden, by name.
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

pub(crate) fn is_picture(path: &Path) -> bool {
    (has_extension(path, "png") || is_jpeg(path)) && path.is_file()
}

fn is_jpeg(path: &Path) -> bool {
    has_extension(path, "jpg") || has_extension(path, "jpeg")
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|own| own.eq_ignore_ascii_case(extension))
}

/// All pictures, `[n, channels, height, width]`, `Uint8`.
fn read_pictures(paths: &[PathBuf]) -> Result<Tensor> {
    let mut first = None;
    let mut bytes = Vec::new();
    for path in paths {
        let (layout, pixels) = read_picture(path)?;
        let expected = *first.get_or_insert(layout);
        if layout != expected {
            let (found, expected) = (layout.to_string(), format!("{expected} like the first"));
            return Err(Error::Picture { path: path.clone(), found, expected });
        }
        bytes.extend(pixels);
    }
    let Layout { channels, height, width } =
        first.unwrap_or(Layout { channels: 1, height: 0, width: 0 });
    let size = [paths.len() as i64, height.into(), width.into(), channels as i64];
    let pixels = Tensor::f_from_data_size(&bytes, &size, Kind::Uint8)
        .map_err(Error::torch("read_image_folder"))?;
    Ok(pixels.permute([0, 3, 1, 2]).contiguous())
}

pub(crate) fn read_picture(path: &Path) -> Result<(Layout, Vec<u8>)> {
    if is_jpeg(path) { jpeg::read(path) } else { read_png(path) }
}

fn read_png(path: &Path) -> Result<(Layout, Vec<u8>)> {
    let png = |source| Error::Png { path: path.to_owned(), source };
    let file =
        open_regular_file(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let length =
        file.metadata().map_err(|source| Error::Read { path: path.to_owned(), source })?.len();
    // Sixteen greys of one bit become sixteen bytes.
    let most_bytes = length.saturating_mul(8 * MOST_PACKED);
    let mut decoder = Decoder::new(BufReader::new(file));
    decoder.set_transformations(Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(png)?;

    let (colour, _) = reader.output_color_type();
    let channels = match colour {
        ColorType::Grayscale => 1,
        ColorType::Rgb => 3,
        ColorType::GrayscaleAlpha | ColorType::Rgba | ColorType::Indexed => {
            let found = format!("{colour:?} once unpacked");
            let expected = "grey or RGB, without transparency".to_owned();
            return Err(Error::Picture { path: path.to_owned(), found, expected });
        }
    };
    let too_large = || png(png::DecodingError::LimitsExceeded);
    let len = reader.output_buffer_size().ok_or_else(too_large)?;
    if len as u64 > most_bytes {
        return Err(too_large());
    }
    let mut pixels = vec![0; len];
    let info = reader.next_frame(&mut pixels).map_err(png)?;
    Ok((Layout { channels, height: info.height, width: info.width }, pixels))
}
