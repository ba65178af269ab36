use std::{
    fs,
    io::BufReader,
    path::{Path, PathBuf},
};

use ddil_files::open_regular_file;
use png::{ColorType, Decoder, Transformations};
use tch::{Kind, Tensor};

use crate::cropped::{ensure_size, read_cropped_levels};
use crate::image_files::in_order;
use crate::layout::Layout;
use crate::{Error, ImageDataset, Result, jpeg};

/// The maximum compression ratio of Deflate. An image whose header states more pixels cannot contain them.
const MAX_DEFLATE_RATIO: u64 = 1032;

/// Reads the PNG and JPEG files of a folder, sorted by name.
///
/// Images directly in the folder have no labels. Images in subfolders have one: the classes are the names of the
/// subfolders, sorted. All images must have the same size, and be all grey or all RGB. Palettes and 16-bit values are
/// converted to 8 bits; JPEG files are oriented by their Exif data. Other files and names that begin with a dot are
/// ignored.
///
/// # Errors
///
/// [`Error::Read`], [`Error::Png`], [`Error::Jpeg`] and [`Error::NoImages`]; [`Error::Differs`] for an image that differs
/// from the first, [`Error::Image`] for one with transparency; [`Error::MixedFolder`] if the folder contains images as well as subfolders of
/// images.
pub fn read_image_folder(folder: &Path) -> Result<ImageDataset> {
    read_folder(folder, &read_images)
}

/// As [`read_image_folder`], for images of any sizes: each is scaled to cover `[height, width]` and its centre is cropped, as
/// by [`read_cropped`](crate::read_cropped), in `threads` threads.
///
/// If there are grey images as well as RGB, the grey ones are repeated in three channels.
///
/// # Errors
///
/// As [`read_image_folder`], except that sizes and colours may differ; [`Error::Invalid`] for an invalid size;
/// [`Error::Image`] for an image of which less than a 64th would remain.
///
/// # Example
///
/// ```
/// use ddil_data::read_image_folder_scaled;
///
/// # let folder = tempfile::tempdir()?;
/// # for (name, side) in [("a.png", 4_u32), ("b.png", 6)] {
/// #     let mut png = png::Encoder::new(std::fs::File::create(folder.path().join(name))?, side, 2);
/// #     png.set_color(png::ColorType::Grayscale);
/// #     png.write_header()?.write_image_data(&vec![255; 2 * side as usize])?;
/// # }
/// let images = read_image_folder_scaled(folder.path(), [2, 2], 1)?;
/// assert_eq!((images.len(), images.image_shape()), (2, [1, 2, 2]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_image_folder_scaled(
    folder: &Path,
    size: [i64; 2],
    threads: usize,
) -> Result<ImageDataset> {
    ensure_size(size)?;
    read_folder(folder, &|paths| read_scaled(paths, size, threads))
}

/// The pixels of files, `[n, channels, height, width]`, `Uint8`.
type ReadImages<'a> = &'a dyn Fn(&[PathBuf]) -> Result<Tensor>;

fn read_folder(folder: &Path, read: ReadImages<'_>) -> Result<ImageDataset> {
    let entries = list(folder)?;
    let images: Vec<PathBuf> = entries.iter().filter(|path| is_image(path)).cloned().collect();
    let classes = read_classes(&entries)?;
    match (images.first(), classes.first()) {
        (None, None) => Err(Error::NoImages { path: folder.to_owned() }),
        (Some(image), Some((class, _))) => Err(Error::MixedFolder {
            path: folder.to_owned(),
            image: image.clone(),
            folder: class.clone(),
        }),
        (Some(_), None) => ImageDataset::new(&read(&images)?, None),
        (None, Some(_)) => labelled(&classes, read),
    }
}

/// The folders among the entries that contain images, with their images.
fn read_classes(entries: &[PathBuf]) -> Result<Vec<(PathBuf, Vec<PathBuf>)>> {
    let mut classes = Vec::new();
    for folder in entries.iter().filter(|path| path.is_dir()) {
        let images: Vec<PathBuf> =
            list(folder)?.into_iter().filter(|path| is_image(path)).collect();
        if !images.is_empty() {
            classes.push((folder.clone(), images));
        }
    }
    Ok(classes)
}

/// A data set with a class per folder.
fn labelled(classes: &[(PathBuf, Vec<PathBuf>)], read: ReadImages<'_>) -> Result<ImageDataset> {
    let name = |(folder, _): &(PathBuf, Vec<PathBuf>)| {
        folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    };
    let images: Vec<PathBuf> = classes.iter().flat_map(|(_, images)| images).cloned().collect();
    let labels: Vec<i64> = (0..)
        .zip(classes)
        .flat_map(|(label, (_, images))| std::iter::repeat_n(label, images.len()))
        .collect();
    ImageDataset::with_class_names(
        &read(&images)?,
        Some(&Tensor::from_slice(&labels)),
        classes.iter().map(name).collect(),
    )
}

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

/// The pixels of all images, scaled and cropped; grey ones in three channels if any is RGB.
fn read_scaled(paths: &[PathBuf], size: [i64; 2], threads: usize) -> Result<Tensor> {
    let mut images = Vec::with_capacity(paths.len());
    let read = |path: &Path| read_cropped_levels(path, size);
    in_order(paths, threads, read, |_, image| {
        images.push(image);
        Ok::<(), Error>(())
    })?;
    let channels = images.iter().map(|image| image.size()[0]).max().unwrap_or(1);
    let mut stack = || {
        let [height, width] = size;
        for image in &mut images {
            *image = image.f_expand([channels, height, width], false)?;
        }
        Tensor::f_stack(&images, 0)
    };
    stack().map_err(Error::torch("read_image_folder_scaled"))
}

/// The pixels of all images of one size, `[n, channels, height, width]`, `Uint8`.
fn read_images(paths: &[PathBuf]) -> Result<Tensor> {
    let mut first = None;
    let mut bytes = Vec::new();
    for path in paths {
        let (layout, pixels) = read_image(path)?;
        let expected = *first.get_or_insert(layout);
        if layout != expected {
            let (found, expected) = (layout.to_string(), expected.to_string());
            return Err(Error::Differs { path: path.clone(), found, expected });
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

pub(crate) fn read_image(path: &Path) -> Result<(Layout, Vec<u8>)> {
    if is_jpeg(path) { jpeg::read(path) } else { read_png(path, Transparency::Refused) }
}

/// As [`read_image`], without the transparency that a file may have.
pub(crate) fn read_opaque(path: &Path) -> Result<(Layout, Vec<u8>)> {
    if is_jpeg(path) { jpeg::read(path) } else { read_png(path, Transparency::Dropped) }
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
    let drops = transparency == Transparency::Dropped;
    let (stored, channels) = match colour {
        ColorType::Grayscale => (1, 1),
        ColorType::Rgb => (3, 3),
        ColorType::GrayscaleAlpha if drops => (2, 1),
        ColorType::Rgba if drops => (4, 3),
        ColorType::GrayscaleAlpha | ColorType::Rgba | ColorType::Indexed => {
            let found = format!("{colour:?} after decoding");
            let expected = "grey or RGB, without transparency".to_owned();
            return Err(Error::Image { path: path.to_owned(), found, expected });
        }
    };
    let too_large = || png(png::DecodingError::LimitsExceeded);
    let len = reader.output_buffer_size().ok_or_else(too_large)?;
    if len as u64 > max_bytes {
        return Err(too_large());
    }
    let mut pixels = vec![0; len];
    let info = reader.next_frame(&mut pixels).map_err(png)?;
    if stored > channels {
        pixels =
            pixels.chunks_exact(stored).flat_map(|pixel| &pixel[..channels]).copied().collect();
    }
    Ok((Layout { channels, height: info.height, width: info.width }, pixels))
}
