//! Folders of images as data sets.

use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use crate::cropped::{ensure_size, read_cropped_levels};
use crate::files::{is_image, list, read_image};
use crate::image_files::in_order;
use crate::layout::Layout;
use crate::{Error, ImageDataset, Result};

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
