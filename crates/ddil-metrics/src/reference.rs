//! Reference sets in files: statistics, and features for the metrics that require them.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use ddil_files::{open_regular_file, write_atomic};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tch::{Device, Kind, Tensor};
use zip::ZipArchive;

use crate::{
    FeatureExtractor, ImageInput, Statistics,
    error::{Error, Result, ensure_features, torch},
};

/// Real images, or others to compare with: the statistics of their features, and the features.
///
/// The Fréchet distance requires statistics alone; all other metrics require [`features`](Self::features).
///
/// # Files
///
/// [`write`](Self::write) makes a safetensors file: `mu` `[d]` and `sigma` `[d, d]` as `F64`, `features` `[n, d]` as
/// `F32` if there are any, and in the metadata `name`, `num_samples`, `extractor`, `input` (JSON) and `variant`, that of
/// the extractor; files of earlier versions do not contain the last.
/// [`from_file`](Self::from_file) also reads the `.npz` files of pytorch-fid and clean-fid, which contain `mu` and
/// `sigma` alone: neither the number of images, nor the network, nor the interpolation.
///
/// # Example
///
/// ```
/// use ddil_metrics::{RawPixels, Reference, FeatureExtractor};
///
/// let extractor = RawPixels::new([1, 2, 2]);
/// let images = tch::Tensor::rand([50, 1, 2, 2], tch::kind::FLOAT_CPU) * 2.0 - 1.0;
/// let reference = Reference::new("noise", &extractor.features(&images)?, &extractor)?;
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("noise.safetensors");
/// reference.write(&path)?;
/// let read = Reference::from_file(&path)?;
/// read.ensure_extractor(&extractor)?;
/// assert_eq!(read.statistics(), reference.statistics());
/// assert_eq!(read.features().map(|features| features.size()), Some(vec![50, 4]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Reference {
    name: String,
    extractor: Option<Extractor>,
    statistics: Statistics,
    features: Option<Tensor>,
}

/// The extractor of a reference.
#[derive(Clone, Debug, PartialEq)]
struct Extractor {
    id: String,
    input: ImageInput,
    /// None if a file does not contain it.
    variant: Option<String>,
}

impl Extractor {
    fn of(extractor: &dyn FeatureExtractor) -> Self {
        Self {
            id: extractor.id().to_owned(),
            input: extractor.input().clone(),
            variant: Some(extractor.variant().to_owned()),
        }
    }
}

impl Reference {
    /// A reference from all features of a set.
    ///
    /// `name` is the set's, for reports: its dataset and split.
    ///
    /// # Shapes and units
    ///
    /// - `features`: `[n, d]`, any floating kind; kept on the CPU as `Float`
    ///
    /// # Errors
    ///
    /// [`Error::TooFewSamples`] below two samples, and the errors of bad features.
    pub fn new(
        name: impl Into<String>,
        features: &Tensor,
        extractor: &dyn FeatureExtractor,
    ) -> Result<Self> {
        let statistics = Statistics::from_features(features)?;
        let kept = features
            .detach()
            .f_to_device(Device::Cpu)
            .and_then(|features| features.f_to_kind(Kind::Float)?.f_contiguous())
            .map_err(torch("Reference::new"))?;
        let extractor = Some(Extractor::of(extractor));
        Ok(Self { name: name.into(), extractor, statistics, features: Some(kept) })
    }

    /// A reference without features, for sets that are too large to keep them.
    pub fn from_statistics(
        name: impl Into<String>,
        statistics: Statistics,
        extractor: &dyn FeatureExtractor,
    ) -> Self {
        let extractor = Some(Extractor::of(extractor));
        Self { name: name.into(), extractor, statistics, features: None }
    }

    /// The name of the set: the file's name for an `.npz` file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Mean and covariance of the features.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// The features, `[n, d]`, `Float`, on the CPU; `None` if only statistics were kept.
    pub fn features(&self) -> Option<&Tensor> {
        self.features.as_ref()
    }

    /// The id of the extractor; `None` for an `.npz` file, which does not contain it.
    pub fn extractor(&self) -> Option<&str> {
        self.extractor.as_ref().map(|extractor| extractor.id.as_str())
    }

    /// Checks that features of `extractor` can be compared with this reference.
    ///
    /// The number of features alone is compared for an `.npz` file.
    ///
    /// # Errors
    ///
    /// [`Error::AnotherExtractor`] if the network, its input, its variant, or the number of features differs.
    pub fn ensure_extractor(&self, extractor: &dyn FeatureExtractor) -> Result<()> {
        let own = Extractor::of(extractor);
        let differs = |what, reference: String, extractor: String| Error::AnotherExtractor {
            reference: self.name.clone(),
            what,
            found: reference,
            expected: extractor,
        };
        if let Some(known) = &self.extractor {
            if known.id != own.id {
                return Err(differs("network", known.id.clone(), own.id));
            }
            if known.input != own.input {
                let [known, own] = [&known.input, &own.input].map(json);
                return Err(differs("input", known, own));
            }
            if let (Some(known), Some(own)) = (&known.variant, &own.variant)
                && known != own
            {
                let [known, own] = [known, own].map(|variant| shown(variant));
                return Err(differs("variant", known, own));
            }
        }
        if self.statistics.dim() as i64 != extractor.dim() {
            let dims = (self.statistics.dim().to_string(), extractor.dim().to_string());
            return Err(differs("number of features", dims.0, dims.1));
        }
        Ok(())
    }

    /// Writes the reference to a safetensors file, which is complete or absent.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let file = |reason: String| Error::File { path: path.to_owned(), reason };
        let d = self.statistics.dim();
        let bytes = |values: &[f64]| -> Vec<u8> {
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        let (mu, sigma) = (bytes(self.statistics.mean()), bytes(self.statistics.covariance()));
        let mut tensors =
            vec![("mu", Dtype::F64, vec![d], mu), ("sigma", Dtype::F64, vec![d, d], sigma)];
        if let Some(features) = &self.features {
            let values =
                Vec::<f32>::try_from(features.view(-1)).map_err(torch("Reference::write"))?;
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let shape = features.size().iter().map(|&side| side as usize).collect();
            tensors.push(("features", Dtype::F32, shape, bytes));
        }
        let views: std::result::Result<Vec<_>, _> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                Ok((*name, TensorView::new(*dtype, shape.clone(), bytes)?))
            })
            .collect();
        let content = views
            .and_then(|views| safetensors::serialize(views, Some(self.metadata())))
            .map_err(|error| file(error.to_string()))?;
        write_atomic(path, &content).map_err(|error| file(ddil_files::with_causes(&error)))
    }

    fn metadata(&self) -> HashMap<String, String> {
        let mut metadata: HashMap<String, String> = HashMap::new();
        metadata.insert("name".to_owned(), self.name.clone());
        if let Some(n) = self.statistics.num_samples() {
            metadata.insert("num_samples".to_owned(), n.to_string());
        }
        if let Some(Extractor { id, input, variant }) = &self.extractor {
            metadata.insert("extractor".to_owned(), id.clone());
            metadata.insert("input".to_owned(), json(input));
            let variant = variant.iter().map(|variant| ("variant".to_owned(), variant.clone()));
            metadata.extend(variant);
        }
        metadata
    }

    /// Reads a file of [`write`](Self::write), or an `.npz` file with `mu` and `sigma`.
    ///
    /// # Errors
    ///
    /// [`Error::ReadFile`]; [`Error::File`] if the file is of another kind, incomplete, or too large;
    /// [`Error::NonFinite`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = open_regular_file(path)
            .map_err(|source| Error::ReadFile { path: path.to_owned(), source })?;
        let is_npz = path.extension().is_some_and(|own| own.eq_ignore_ascii_case("npz"));
        let read = if is_npz { read_npz(path, file) } else { read_safetensors(path, file) };
        read.map_err(|problem| match problem {
            Problem::Reason(reason) => Error::File { path: path.to_owned(), reason },
            Problem::Error(error) => error,
        })
    }
}

/// A problem of a file: text without the path, or an error that is complete.
enum Problem {
    Reason(String),
    Error(Error),
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

fn reason(text: impl std::fmt::Display) -> Problem {
    Problem::Reason(text.to_string())
}

type Outcome<T> = std::result::Result<T, Problem>;

/// The maximum side of an array.
const MAX_DIM: u64 = Statistics::MAX_DIM as u64;

fn read_safetensors(path: &Path, mut file: File) -> Outcome<Reference> {
    let mut content = Vec::new();
    file.read_to_end(&mut content)
        .map_err(|source| Error::ReadFile { path: path.to_owned(), source })?;
    let tensors = SafeTensors::deserialize(&content).map_err(|error| {
        let error = ddil_files::with_causes(&error);
        reason(format!(
            "not a statistics file (.safetensors or .npz with `mu` and `sigma`): {error}"
        ))
    })?;
    let (_, metadata) = SafeTensors::read_metadata(&content)
        .map_err(|error| reason(ddil_files::with_causes(&error)))?;
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let (_, mean) = floats(&tensors, "mu", Dtype::F64)?;
    let (_, covariance) = floats(&tensors, "sigma", Dtype::F64)?;
    let num_samples = match metadata.get("num_samples") {
        Some(text) => Some(text.parse().map_err(|_| reason(format!("`num_samples` is `{text}`")))?),
        None => None,
    };
    let statistics = Statistics::from_parts(num_samples, mean, covariance)?;
    let extractor = metadata.get("extractor").zip(metadata.get("input"));
    let extractor = extractor.map(|(id, input)| {
        let parsed = ddil_files::parse_json(input.as_bytes());
        let input = parsed.map_err(|error| reason(format!("`input` is `{input}`: {error}")))?;
        let variant = metadata.get("variant").cloned();
        Ok::<_, Problem>(Extractor { id: id.clone(), input, variant })
    });
    let extractor = extractor.transpose()?;
    let features = match tensors.tensor("features") {
        Ok(view) => Some(read_features(&view, &statistics)?),
        Err(_) => None,
    };
    let name = metadata.get("name").cloned().unwrap_or_else(|| file_name(path));
    Ok(Reference { name, extractor, statistics, features })
}

fn read_features(view: &TensorView<'_>, statistics: &Statistics) -> Outcome<Tensor> {
    let shape: Vec<i64> = view.shape().iter().map(|&side| side as i64).collect();
    if view.dtype() != Dtype::F32 || shape.len() != 2 || shape[1] != statistics.dim() as i64 {
        let d = statistics.dim();
        return Err(reason(format!(
            "`features` is {:?} {shape:?}; expected F32 [n, {d}]",
            view.dtype()
        )));
    }
    let features = Tensor::f_from_data_size(view.data(), &shape, Kind::Float)
        .map_err(torch("Reference::from_file"))?;
    let _ = ensure_features("Reference::from_file", "features", &features, 2)?;
    Ok(features)
}

/// The shape and values of a tensor of `f64`.
fn floats(tensors: &SafeTensors<'_>, name: &str, dtype: Dtype) -> Outcome<(Vec<usize>, Vec<f64>)> {
    let Ok(view) = tensors.tensor(name) else {
        return Err(reason(format!("it has no tensor `{name}`")));
    };
    if view.dtype() != dtype {
        return Err(reason(format!("`{name}` is {:?}; expected {dtype:?}", view.dtype())));
    }
    let (values, _) = view.data().as_chunks::<8>();
    Ok((view.shape().to_vec(), values.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()))
}

fn read_npz(path: &Path, file: File) -> Outcome<Reference> {
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(reason)?;
    let (shape, mean) = read_array(&mut archive, "mu")?;
    let [dim] = shape[..] else {
        return Err(reason(format!("`mu` has the shape {shape:?}; expected [d]")));
    };
    let (shape, covariance) = read_array(&mut archive, "sigma")?;
    if shape != [dim, dim] {
        return Err(reason(format!("`sigma` has the shape {shape:?}; expected [{dim}, {dim}]")));
    }
    let statistics = Statistics::from_parts(None, mean, covariance)?;
    Ok(Reference { name: file_name(path), extractor: None, statistics, features: None })
}

/// The shape and values of an array of floats. A matrix in Fortran's order is read as its transpose, which is equal for a
/// covariance.
fn read_array(
    archive: &mut ZipArchive<BufReader<File>>,
    name: &str,
) -> Outcome<(Vec<u64>, Vec<f64>)> {
    let names: Vec<String> = archive.file_names().map(str::to_owned).collect();
    let entry = archive.by_name(&npyz::npz::file_name_from_array_name(name)).map_err(|error| {
        reason(format!("could not read the array `{name}`: {error}; the file has {names:?}"))
    })?;
    let bad = |error: std::io::Error| reason(format!("the array `{name}`: {error}"));
    // To its end: only there is the checksum compared.
    let mut content = Vec::new();
    let len = entry.take(MAX_ARRAY_BYTES).read_to_end(&mut content).map_err(bad)?;
    if len as u64 == MAX_ARRAY_BYTES {
        return Err(reason(format!("`{name}` has more than {MAX_ARRAY_BYTES} bytes")));
    }
    let array = npyz::NpyFile::new(content.as_slice()).map_err(bad)?;
    let shape = array.shape().to_vec();
    if shape.len() > 2 || shape.iter().any(|side| !(1..=MAX_DIM).contains(side)) {
        return Err(reason(format!(
            "`{name}` has the shape {shape:?}; expected sides of 1 to {MAX_DIM}"
        )));
    }
    let values: std::io::Result<Vec<f64>> = match array.try_data::<f64>() {
        Ok(values) => values.collect(),
        Err(array) => match array.try_data::<f32>() {
            Ok(values) => values.map(|value| value.map(f64::from)).collect(),
            Err(array) => {
                let found = array.dtype().descr();
                return Err(reason(format!(
                    "`{name}` has elements {found}; expected floats, f4 or f8"
                )));
            }
        },
    };
    Ok((shape, values.map_err(bad)?))
}

/// Above that, an entry of the archive is not read to its end.
const MAX_ARRAY_BYTES: u64 = MAX_DIM * MAX_DIM * 8 + (1 << 16);

/// A variant, for messages: of a network with several outputs, which of them.
fn shown(variant: &str) -> String {
    if variant.is_empty() { "none".to_owned() } else { format!("`{variant}`") }
}

/// The text form of an input, for files and messages.
fn json(input: &ImageInput) -> String {
    // Strings, numbers and lists always have a JSON form.
    serde_json::to_string(input).unwrap_or_default()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
