//! Folders of images as data sets.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use crate::cropped::{ensure_size, read_cropped_levels};
use crate::files::{is_colour, is_image, list, read_image};
use crate::image_files::in_order;
use crate::images::{ClassesLeft, ensure_indices};
use crate::layout::Layout;
use crate::{Error, ImageDataset, Result};

/// The PNG and JPEG files of a folder, with the classes of its subfolders, before any of them is read.
///
/// Images directly in the folder have no labels. Images in subfolders have one: the classes are the names of the
/// subfolders, sorted. Files are sorted by name within their class. Other files and names that begin with a dot are
/// ignored. A file that is left out, by its class or its index, is not decoded.
///
/// # Example
///
/// ```
/// use ddil_data::ImageFolder;
///
/// # let folder = tempfile::tempdir()?;
/// # for class in ["bag", "coat"] {
/// #     std::fs::create_dir(folder.path().join(class))?;
/// #     let file = std::fs::File::create(folder.path().join(class).join("a.png"))?;
/// #     let mut png = png::Encoder::new(file, 2, 2);
/// #     png.set_color(png::ColorType::Grayscale);
/// #     png.write_header()?.write_image_data(&[255; 4])?;
/// # }
/// std::fs::write(folder.path().join("bag/damaged.png"), "not an image")?;
/// let files = ImageFolder::open(folder.path())?;
/// assert_eq!((files.len(), files.class_names()), (3, &["bag".to_owned(), "coat".to_owned()][..]));
/// assert!(files.read().is_err());
///
/// let coats = files.without_classes(&["bag".to_owned()])?.read()?;
/// assert_eq!((coats.len(), coats.class_names()), (1, &["coat".to_owned()][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ImageFolder {
    /// The files that are used; never empty.
    images: Vec<PathBuf>,
    /// A label per file.
    labels: Option<Vec<i64>>,
    class_names: Vec<String>,
    /// The files that were left out.
    unused: Vec<PathBuf>,
}

impl ImageFolder {
    /// Lists a folder.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] if it cannot be read, [`Error::NoImages`]; [`Error::MixedFolder`] if it contains images as well as
    /// subfolders of images.
    pub fn open(folder: &Path) -> Result<Self> {
        let entries = list(folder)?;
        let images: Vec<PathBuf> = entries.iter().filter(|path| is_image(path)).cloned().collect();
        let classes = read_classes(&entries)?;
        let (labels, class_names) = (None, Vec::new());
        match (images.first(), classes.first()) {
            (None, None) => Err(Error::NoImages { path: folder.to_owned() }),
            (Some(image), Some((class, _))) => Err(Error::MixedFolder {
                path: folder.to_owned(),
                image: image.clone(),
                folder: class.clone(),
            }),
            (Some(_), None) => Ok(Self { images, labels, class_names, unused: Vec::new() }),
            (None, Some(_)) => Ok(Self::of_classes(classes)),
        }
    }

    fn of_classes(classes: Vec<(PathBuf, Vec<PathBuf>)>) -> Self {
        let name = |(folder, _): &(PathBuf, Vec<PathBuf>)| {
            folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
        };
        let class_names = classes.iter().map(name).collect();
        let labels = (0..)
            .zip(&classes)
            .flat_map(|(label, (_, images))| std::iter::repeat_n(label, images.len()))
            .collect();
        let images = classes.into_iter().flat_map(|(_, images)| images).collect();
        Self { images, labels: Some(labels), class_names, unused: Vec::new() }
    }

    /// The number of files; at least 1.
    #[expect(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> i64 {
        self.images.len() as i64
    }

    /// The label of each file; `None` without labels.
    pub fn labels(&self) -> Option<&[i64]> {
        self.labels.as_deref()
    }

    /// The name of each class, by label; empty without labels.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// The files at the given indices, in that order, with the same classes; as [`ImageDataset::select`].
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for an index outside of `0..len`, [`Error::Invalid`] for no indices.
    pub fn select(&self, indices: &[i64]) -> Result<Self> {
        ensure_indices(indices, self.len())?;
        let at = |index: &i64| self.images[*index as usize].clone();
        let labels = self.labels.as_ref();
        let label_at = |labels: &Vec<i64>| indices.iter().map(|i| labels[*i as usize]).collect();
        let chosen: HashSet<i64> = indices.iter().copied().collect();
        let left_out = (0..).zip(&self.images).filter(|(index, _)| !chosen.contains(index));
        let unused = left_out.map(|(_, path)| path).chain(&self.unused).cloned().collect();
        Ok(Self {
            images: indices.iter().map(at).collect(),
            labels: labels.map(label_at),
            class_names: self.class_names.clone(),
            unused,
        })
    }

    /// The files of all classes except those with the given names; as [`ImageDataset::without_classes`].
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a name that no class has, for a folder without classes, and if nothing is left.
    pub fn without_classes(&self, names: &[String]) -> Result<Self> {
        let left = ClassesLeft::new(self.labels.as_deref(), &self.class_names, names)?;
        let mut files = self.select(&left.indices)?;
        for label in files.labels.iter_mut().flatten() {
            *label = left.labels[*label as usize];
        }
        Ok(Self { class_names: left.names, ..files })
    }

    /// Decodes the files, which must all have the same size, and be all grey or all RGB. Palettes and 16-bit values are
    /// converted to 8 bits; JPEG files are oriented by their Exif data.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::Png`] and [`Error::Jpeg`]; [`Error::Differs`] for an image that differs from the first,
    /// [`Error::Image`] for one with transparency.
    pub fn read(&self) -> Result<ImageDataset> {
        self.dataset(&read_images(&self.images)?)
    }

    /// As [`read`](Self::read), for images of any sizes: each is scaled to cover `[height, width]` and its centre is
    /// cropped, as by [`read_cropped`](crate::read_cropped), in `threads` threads.
    ///
    /// If the folder contains grey images as well as RGB, the grey ones are repeated in three channels. Files that were
    /// left out count here, by their header, so that a part of a folder has the channels of the whole.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), except that sizes and colours may differ; [`Error::Invalid`] for an invalid size;
    /// [`Error::Image`] for an image of which less than a 64th would remain.
    pub fn read_scaled(&self, size: [i64; 2], threads: usize) -> Result<ImageDataset> {
        ensure_size(size)?;
        self.dataset(&read_scaled(&self.images, &self.unused, size, threads)?)
    }

    fn dataset(&self, pixels: &Tensor) -> Result<ImageDataset> {
        let labels = self.labels.as_deref().map(Tensor::from_slice);
        ImageDataset::with_class_names(pixels, labels.as_ref(), self.class_names.clone())
    }
}

/// Reads the images of a folder: [`ImageFolder::read`] of all its files.
///
/// # Errors
///
/// As [`ImageFolder::open`] and [`ImageFolder::read`].
pub fn read_image_folder(folder: &Path) -> Result<ImageDataset> {
    ImageFolder::open(folder)?.read()
}

/// Reads images of any sizes: [`ImageFolder::read_scaled`] of all files of a folder.
///
/// # Errors
///
/// As [`ImageFolder::open`] and [`ImageFolder::read_scaled`].
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
    ImageFolder::open(folder)?.read_scaled(size, threads)
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

/// The pixels of all images, scaled and cropped; grey ones in three channels if any is RGB, or any of `others`.
fn read_scaled(
    paths: &[PathBuf],
    others: &[PathBuf],
    size: [i64; 2],
    threads: usize,
) -> Result<Tensor> {
    let mut images = Vec::with_capacity(paths.len());
    let read = |path: &Path| read_cropped_levels(path, size);
    in_order(paths, threads, read, |_, image| {
        images.push(image);
        Ok::<(), Error>(())
    })?;
    let channels = match images.iter().map(|image| image.size()[0]).max() {
        Some(1) if others.iter().any(|path| is_colour(path)) => 3,
        channels => channels.unwrap_or(1),
    };
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
