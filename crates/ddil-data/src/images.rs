use ddil_files::{Invalid, listed};
use ddil_libtorch::ensure_dense;
use tch::{Kind, Tensor};

use crate::cropped::{Cover, ensure_size};
use crate::indices::random_order;
use crate::{Error, Result};

/// Limit of numbered class names, so that one invalid label does not create a billion names.
const MAX_NUMBERED_CLASSES: i64 = 1_000_000;

/// Values that are floats at the same time while a data set is scaled, unless one image has more: 16 MiB.
const SCALED_AT_ONCE: i64 = 1 << 22;

/// Images in memory, one byte per value, with or without labels.
///
/// # Example
///
/// ```
/// use ddil_data::ImageDataset;
/// use tch::{Kind, Tensor, kind};
///
/// // Three RGB images of 2x2 pixels, all white.
/// let pixels = Tensor::full([3, 3, 2, 2], 255, (Kind::Uint8, tch::Device::Cpu));
/// let dataset = ImageDataset::new(&pixels, Some(&Tensor::from_slice(&[0_i64, 1, 1])))?;
/// assert_eq!((dataset.len(), dataset.image_shape()), (3, [3, 2, 2]));
///
/// let batch = dataset.batch(&[2, 0])?;
/// assert_eq!(batch.x0, Tensor::ones([2, 3, 2, 2], kind::FLOAT_CPU));
/// assert_eq!(batch.labels, Some(Tensor::from_slice(&[1_i64, 0])));
/// # Ok::<(), ddil_data::Error>(())
/// ```
#[derive(Debug)]
pub struct ImageDataset {
    pixels: Tensor,
    labels: Option<Labels>,
}

#[derive(Debug)]
struct Labels {
    values: Tensor,
    class_names: Vec<String>,
}

/// A batch of an [`ImageDataset`].
#[derive(Debug)]
pub struct Batch {
    /// `[batch, channels, height, width]`, `Float`, values from -1 to 1.
    pub x0: Tensor,
    /// `[batch]`, `Int64`; `None` if the data set has no labels.
    pub labels: Option<Tensor>,
}

impl ImageDataset {
    /// A data set from pixels and labels. The class names are "0", "1", ... up to the largest label.
    ///
    /// # Shapes and units
    ///
    /// - `pixels`: `[n, channels, height, width]`, `Uint8`; 0 maps to -1, 255 to 1
    /// - `labels`: `[n]`, `Int64`, 0 or more
    ///
    /// # Errors
    ///
    /// [`Error::Tensor`] for another shape or kind or for an empty tensor, [`Error::LabelCount`] if the numbers of
    /// labels and images differ, [`Error::Label`] for a label that is negative or above 999 999.
    pub fn new(pixels: &Tensor, labels: Option<&Tensor>) -> Result<Self> {
        ensure_dense("ImageDataset::new", "pixels", pixels)?;
        if let Some(labels) = labels {
            ensure_dense("ImageDataset::new", "labels", labels)?;
        }
        let names = labels
            .filter(|labels| labels.defined() && labels.numel() > 0 && labels.kind() == Kind::Int64)
            .map_or(0, |labels| {
                labels.max().int64_value(&[]).clamp(-1, MAX_NUMBERED_CLASSES - 1) + 1
            });
        let class_names = (0..names).map(|class| class.to_string()).collect();
        Self::with_class_names(pixels, labels, class_names)
    }

    /// A data set from pixels and labels with a name for each class.
    ///
    /// Shapes are those of [`new`](Self::new).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`Error::Label`] for a label without a name.
    pub fn with_class_names(
        pixels: &Tensor,
        labels: Option<&Tensor>,
        class_names: Vec<String>,
    ) -> Result<Self> {
        ensure_dense("ImageDataset::with_class_names", "pixels", pixels)?;
        let shape = pixels.size();
        if shape.len() != 4 || shape.contains(&0) || pixels.kind() != Kind::Uint8 {
            return Err(Error::Tensor {
                name: "pixels",
                found: format!("{:?} {shape:?}", pixels.kind()),
                expected: "Uint8 [n, channels, height, width], each at least 1",
            });
        }
        let labels = match labels {
            Some(labels) => {
                ensure_labels(labels, shape[0], class_names.len() as i64)?;
                Some(Labels { values: labels.contiguous(), class_names })
            }
            None => None,
        };
        Ok(Self { pixels: pixels.contiguous(), labels })
    }

    /// The number of samples; at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a data set is never empty")]
    pub fn len(&self) -> i64 {
        self.pixels.size()[0]
    }

    /// Channels, height and width.
    pub fn image_shape(&self) -> [i64; 3] {
        let shape = self.pixels.size();
        [shape[1], shape[2], shape[3]]
    }

    /// All images, `[n, channels, height, width]`, `Uint8`.
    pub fn pixels(&self) -> &Tensor {
        &self.pixels
    }

    /// All labels, `[n]`, `Int64`; `None` for a data set without labels.
    pub fn labels(&self) -> Option<&Tensor> {
        self.labels.as_ref().map(|labels| &labels.values)
    }

    /// The name of each class, by label; empty without labels.
    pub fn class_names(&self) -> &[String] {
        self.labels.as_ref().map_or(&[], |labels| &labels.class_names)
    }

    /// A data set of the samples at the given indices, in that order, with the same classes.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for an index outside of `0..len`, [`Error::Invalid`] for no indices, [`Error::Torch`] if memory
    /// runs out.
    pub fn select(&self, indices: &[i64]) -> Result<Self> {
        ensure_indices(indices, self.len())?;
        let chosen = Tensor::from_slice(indices).to_device(self.pixels.device());
        let select =
            |from: &Tensor| from.f_index_select(0, &chosen).map_err(Error::torch("select"));
        let labels = self.labels.as_ref().map(|Labels { values, class_names }| {
            Ok::<_, Error>(Labels { values: select(values)?, class_names: class_names.clone() })
        });
        Ok(Self { pixels: select(&self.pixels)?, labels: labels.transpose()? })
    }

    /// The same samples in an order that depends on `seed` alone, so that the first few are a random part. Those of a folder
    /// of classes are sorted by class.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out.
    pub fn shuffled(&self, seed: u64) -> Result<Self> {
        self.select(&random_order(self.len(), seed))
    }

    /// The same samples at another size, `[height, width]`: each image is scaled to cover it and its centre is cropped, by the
    /// antialiased bilinear interpolation of [`read_cropped`](crate::read_cropped), rounded to 8 bits.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an invalid size, and if less than a 64th of the images would remain; [`Error::Torch`] if
    /// memory runs out.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_data::ImageDataset;
    /// use tch::{Kind, Tensor};
    ///
    /// // One image of two columns, black and white.
    /// let pixels = Tensor::from_slice(&[0_u8, 255, 0, 255]).view([1, 1, 2, 2]);
    /// let grey = ImageDataset::new(&pixels, None)?.scaled([1, 1])?;
    /// assert_eq!(grey.pixels(), &Tensor::from_slice(&[128_u8]).view([1, 1, 1, 1]));
    /// # Ok::<(), ddil_data::Error>(())
    /// ```
    pub fn scaled(&self, size: [i64; 2]) -> Result<Self> {
        ensure_size(size)?;
        let [channels, height, width] = self.image_shape();
        if [height, width] == size {
            return Ok(self.shallow_clone());
        }
        let Some(cover) = Cover::new([height, width], size) else {
            let found = format!("{width}x{height} images");
            return Err(Invalid::new("size", found, Cover::expected(size)).into());
        };
        let images_at_once = (SCALED_AT_ONCE / channels / cover.num_pixels()).max(1);
        let parts = self.pixels.split(images_at_once, 0);
        let parts: Result<Vec<Tensor>> = parts.iter().map(|part| cover.rounded(part)).collect();
        let pixels = Tensor::f_cat(&parts?, 0).map_err(Error::torch("scaled"))?;
        Ok(Self { pixels, ..self.shallow_clone() })
    }

    /// A data set of the samples of all classes except those with the given names. The other classes keep their order
    /// and are numbered anew, from 0.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a name that no class has, for a data set without labels, and if nothing is left;
    /// [`Error::Torch`] if memory runs out.
    ///
    /// # Example
    ///
    /// ```
    /// use ddil_data::ImageDataset;
    /// use tch::{Kind, Tensor};
    ///
    /// let pixels = Tensor::zeros([4, 1, 2, 2], (Kind::Uint8, tch::Device::Cpu));
    /// let names = ["bag", "coat", "shoe"].map(str::to_owned).to_vec();
    /// let labels = Tensor::from_slice(&[2_i64, 0, 1, 2]);
    /// let dataset = ImageDataset::with_class_names(&pixels, Some(&labels), names)?;
    ///
    /// let without = dataset.without_classes(&["bag".to_owned()])?;
    /// assert_eq!(without.class_names(), ["coat", "shoe"]);
    /// assert_eq!(without.labels(), Some(&Tensor::from_slice(&[1_i64, 0, 1])));
    /// # Ok::<(), ddil_data::Error>(())
    /// ```
    pub fn without_classes(&self, names: &[String]) -> Result<Self> {
        let labels = self.labels().map(Vec::<i64>::try_from).transpose();
        let labels = labels.map_err(Error::torch("without_classes"))?;
        let left = ClassesLeft::new(labels.as_deref(), self.class_names(), names)?;
        self.select(&left.indices)?.relabelled(&left.labels, left.names)
    }

    /// The same images, shared, with other classes: label `i` becomes `labels[i]`, whose name is
    /// `class_names[labels[i]]`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless there is one new label per class, [`Error::Label`] for a new label without a name.
    pub fn relabelled(&self, labels: &[i64], class_names: Vec<String>) -> Result<Self> {
        let found = self.class_names().len();
        if labels.len() != found {
            let expected = format!("{found}, the number of classes");
            return Err(Invalid::new("labels", format!("{} labels", labels.len()), expected).into());
        }
        let num_classes = class_names.len() as i64;
        if let Some(&found) = labels.iter().find(|label| !(0..num_classes).contains(*label)) {
            return Err(Error::Label { found, num_classes });
        }
        let labels = self.labels().map(|own| {
            let table = Tensor::from_slice(labels).to_device(own.device());
            let values = table.f_index_select(0, own).map_err(Error::torch("relabelled"))?;
            Ok::<_, Error>(Labels { values, class_names })
        });
        Ok(Self { pixels: self.pixels.shallow_clone(), labels: labels.transpose()? })
    }

    /// The same images and labels, shared.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let labels = self.labels.as_ref().map(|Labels { values, class_names }| Labels {
            values: values.shallow_clone(),
            class_names: class_names.clone(),
        });
        Self { pixels: self.pixels.shallow_clone(), labels }
    }

    /// The samples at the given indices, in that order; indices may repeat.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] for an index outside of `0..len`, [`Error::Torch`] if memory runs out.
    pub fn batch(&self, indices: &[i64]) -> Result<Batch> {
        ensure_in_range(indices, self.len())?;
        let chosen = Tensor::from_slice(indices).to_device(self.pixels.device());
        let select = |from: &Tensor| from.f_index_select(0, &chosen).map_err(Error::torch("batch"));
        let x0 = to_signed_unit(&select(&self.pixels)?);
        let labels = self.labels().map(select).transpose()?;
        Ok(Batch { x0, labels })
    }

    /// `len` samples from `start` on, fewer at the end of the data set; for test sets, which are not shuffled.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if `start` is not the index of a sample, [`Error::Torch`] if memory runs out.
    pub fn range(&self, start: i64, len: i64) -> Result<Batch> {
        let end = start.saturating_add(len).min(self.len());
        if !(0..self.len()).contains(&start) {
            return Err(Error::Index { index: start, len: self.len() });
        }
        self.batch(&(start..end).collect::<Vec<_>>())
    }
}

/// Checks that indices are those of some of `len` samples.
pub(crate) fn ensure_indices(indices: &[i64], len: i64) -> Result<()> {
    ensure_in_range(indices, len)?;
    if indices.is_empty() {
        return Err(Invalid::new("indices", "empty", "at least one").into());
    }
    Ok(())
}

fn ensure_in_range(indices: &[i64], len: i64) -> Result<()> {
    match indices.iter().find(|index| !(0..len).contains(*index)) {
        Some(&index) => Err(Error::Index { index, len }),
        None => Ok(()),
    }
}

/// What is left of labelled samples without some of their classes.
pub(crate) struct ClassesLeft {
    /// The indices of the samples.
    pub(crate) indices: Vec<i64>,
    /// The new label of each class that is left, by its label; 0 for the others.
    pub(crate) labels: Vec<i64>,
    /// The names of the classes, by their new label.
    pub(crate) names: Vec<String>,
}

impl ClassesLeft {
    /// Leaves out the classes with the names `excluded`.
    pub(crate) fn new(
        labels: Option<&[i64]>,
        class_names: &[String],
        excluded: &[String],
    ) -> Result<Self> {
        let refuse = |value: String, expected: String| {
            Err(Error::Invalid(Invalid::new("exclude_classes", value, expected)))
        };
        let Some(labels) = labels else {
            return refuse("set".to_owned(), "no value: the data have no classes".to_owned());
        };
        if let Some(unknown) = excluded.iter().find(|name| !class_names.contains(name)) {
            let expected = format!("names of the data's classes: {}", listed(class_names));
            return refuse(format!("{unknown:?}"), expected);
        }
        let is_left = |label: i64| !excluded.contains(&class_names[label as usize]);
        let indices: Vec<i64> =
            (0..).zip(labels).filter(|(_, l)| is_left(**l)).map(|(i, _)| i).collect();
        if indices.is_empty() {
            return refuse(
                listed(excluded),
                format!("to leave samples: the data have the classes {}", listed(class_names)),
            );
        }
        let left: Vec<i64> =
            (0..class_names.len() as i64).filter(|label| is_left(*label)).collect();
        let names = left.iter().map(|label| class_names[*label as usize].clone()).collect();
        let mut labels = vec![0; class_names.len()];
        for (new, old) in (0..).zip(left) {
            labels[old as usize] = new;
        }
        Ok(Self { indices, labels, names })
    }
}

/// Mirrors the selected images left to right.
///
/// # Shapes and units
///
/// - `images`: `[batch, channels, height, width]`, any kind
/// - `flips`: one value per image, as returned by [`BatchIndices::flips_at`](crate::BatchIndices::flips_at)
///
/// # Errors
///
/// [`Error::Tensor`] unless `images` has four dimensions and `batch` equals the length of `flips`.
///
/// # Example
///
/// ```
/// use ddil_data::flip_horizontally;
/// use tch::Tensor;
///
/// let images = Tensor::from_slice(&[1, 2, 3, 4]).view([2, 1, 1, 2]);
/// let flipped = flip_horizontally(&images, &[true, false])?;
/// assert_eq!(flipped.view(-1), Tensor::from_slice(&[2, 1, 3, 4]));
/// # Ok::<(), ddil_data::Error>(())
/// ```
pub fn flip_horizontally(images: &Tensor, flips: &[bool]) -> Result<Tensor> {
    ensure_dense("flip_horizontally", "images", images)?;
    let shape = images.size();
    if shape.len() != 4 || shape[0] != flips.len() as i64 {
        return Err(Error::Tensor {
            name: "images",
            found: format!("{:?} {shape:?} with {} flips", images.kind(), flips.len()),
            expected: "[batch, channels, height, width] with `batch` flips",
        });
    }
    let mask = Tensor::from_slice(flips).to_device(images.device()).view([-1, 1, 1, 1]);
    Ok(images.flip([3]).where_self(&mask, images))
}

/// Bytes 0 to 255 to floats -1 to 1.
fn to_signed_unit(pixels: &Tensor) -> Tensor {
    pixels.to_kind(Kind::Float) / 127.5 - 1.0
}

fn ensure_labels(labels: &Tensor, num_images: i64, num_classes: i64) -> Result<()> {
    ensure_dense("ImageDataset::with_class_names", "labels", labels)?;
    let shape = labels.size();
    if shape.len() != 1 || labels.kind() != Kind::Int64 {
        return Err(Error::Tensor {
            name: "labels",
            found: format!("{:?} {shape:?}", labels.kind()),
            expected: "Int64 [n]",
        });
    }
    if shape[0] != num_images {
        return Err(Error::LabelCount { images: num_images, labels: shape[0] });
    }
    let ends = [labels.min(), labels.max()].map(|end| end.int64_value(&[]));
    match ends.into_iter().find(|end| !(0..num_classes).contains(end)) {
        Some(found) => Err(Error::Label { found, num_classes }),
        None => Ok(()),
    }
}
