//! Errors of this crate, and the checks of arguments of public functions.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use ddil_files::Invalid;
use ddil_libtorch::{ArgumentError, ensure_dense, ensure_kind, ensure_real, ensure_shape};
use tch::{Device, Kind, TchError, Tensor};

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the library that read or wrote a file.
pub type BoxedError = Box<dyn std::error::Error + Send + Sync>;

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](crate::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a shape, kind, layout or value that the function cannot take.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// Settings are invalid; every problem is listed.
    #[error("{what} is not valid:{}", Lines(problems))]
    InvalidConfig {
        /// The class the settings are for, or the file they came from.
        what: String,
        /// All problems.
        problems: Vec<Invalid>,
    },
    /// A network exceeds this crate's limits of size, independent of the available memory.
    #[error(
        "the settings describe a network of {parameters} parameters or more, with {} values or more up to `{at}`; at \
         most {max_parameters} parameters with {max_values} values are supported",
        values.map_or("2^63".to_owned(), |values| values.to_string())
    )]
    TooLarge {
        /// The first parameter beyond the limit.
        at: String,
        /// Number of parameters, up to the first one beyond the limit.
        parameters: usize,
        /// Number of their values; `None` if it overflows.
        values: Option<i64>,
        /// The limit of parameters.
        max_parameters: usize,
        /// The limit of values.
        max_values: i64,
    },
    /// A file is not JSON.
    #[error("{} is not valid JSON", path.display())]
    InvalidJson {
        /// The file.
        path: PathBuf,
        /// The position and reason of the failure.
        source: BoxedError,
    },
    /// A file or folder could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: BoxedError,
    },
    /// A file could not be written; an existing file is unchanged.
    #[error("could not write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: BoxedError,
    },
    /// A weights file is damaged or not a safetensors file.
    #[error("{} is not a complete safetensors file", path.display())]
    InvalidSafetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: BoxedError,
    },
    /// The tensors of a weights file differ from those of the network; nothing was loaded.
    #[error("{} does not fit the network:{problems}", path.display())]
    WeightsMismatch {
        /// The file.
        path: PathBuf,
        /// All differences.
        problems: Box<WeightProblems>,
    },
    /// A weights file is a pickle, which can run code when it is read.
    #[error(
        "{} is a pickle, and reading it can run code; convert it once with Python: \
         `safetensors.torch.save_file(torch.load(path, weights_only=True), \"model.safetensors\")`",
        path.display()
    )]
    Pickle {
        /// The file.
        path: PathBuf,
    },
    /// An index and its shards do not agree; nothing was loaded.
    #[error("{} does not fit its shards:{problems}", path.display())]
    InvalidIndex {
        /// The index.
        path: PathBuf,
        /// All disagreements.
        problems: Box<IndexProblems>,
    },
    /// A folder contains no weights under the expected names.
    #[error("{} contains none of {}{}", path.display(), expected.join(", "), Others(others))]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// The expected files.
        expected: Vec<String>,
        /// Existing weights of other variants, each with its variant.
        others: Vec<(String, Option<String>)>,
    },
    /// A tensor has a kind that a file cannot store.
    #[error("`{name}` has kind {kind:?}, which a safetensors file cannot store")]
    UnsupportedKind {
        /// The tensor.
        name: String,
        /// Its kind.
        kind: Kind,
    },
    /// A value is beyond the range of the kind that it was to be cast to; it would have become infinite.
    #[error(
        "`{name}` has a value of magnitude {value}, which {kind:?} cannot hold; choose a wider kind, such as float32 or bfloat16"
    )]
    OutOfRange {
        /// The tensor.
        name: String,
        /// The largest magnitude.
        value: f64,
        /// The kind.
        kind: Kind,
    },
    /// A part of the conditioning that the network requires is missing.
    #[error("{op}: the network requires `{part}`, which is missing")]
    MissingPart {
        /// The function that was called.
        op: &'static str,
        /// The part.
        part: &'static str,
    },
    /// A part of the conditioning that the network does not take is present.
    #[error("{op}: the network does not take `{part}`; leave it out")]
    UnexpectedPart {
        /// The function that was called.
        op: &'static str,
        /// The part.
        part: &'static str,
    },
    /// A class label is outside of the network's table.
    #[error("{op}: `class_labels` contains {found}; expected 0 to {max}")]
    ClassLabelOutOfRange {
        /// The function that was called.
        op: &'static str,
        /// The label.
        found: i64,
        /// The largest valid label.
        max: i64,
    },
    /// Features were requested from a network that returns only its output.
    #[error(
        "{network} returns no features for a discriminator; a UNet2DModel, a UNet2DConditionModel and an Mlp do"
    )]
    NoFeatures {
        /// The class of the network.
        network: &'static str,
    },
    /// Projected embeddings were requested from a text encoder without projection.
    #[error("{op}: the network has no projection; use one of class CLIP...WithProjection")]
    NoProjection {
        /// The function that was called.
        op: &'static str,
    },
    /// A folder does not contain all files of a tokenizer.
    #[error("{} contains no {}", path.display(), missing.join(", no "))]
    NoTokenizer {
        /// The folder.
        path: PathBuf,
        /// Every missing file.
        missing: Vec<&'static str>,
    },
    /// A tokenizer file is invalid.
    #[error("{} contains no tokenizer", path.display())]
    InvalidTokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: BoxedError,
    },
    /// A text could not be tokenized.
    #[error("{op}: {text:?} cannot be split into tokens")]
    Tokenize {
        /// The function that was called.
        op: &'static str,
        /// The text.
        text: String,
        /// Why.
        source: BoxedError,
    },
    /// Values were to be copied between two networks whose parameters differ.
    #[error("the networks have different parameters:{problems}")]
    ParametersDiffer {
        /// All differences; "file" means the source network.
        problems: Box<WeightProblems>,
    },
    /// A layer already has an adapter.
    #[error("{op}: `{layer}` already has an adapter; detach it first")]
    AdapterAttached {
        /// The function that was called.
        op: &'static str,
        /// The first such layer.
        layer: String,
    },
    /// An adapter is merged into the base weights, and cannot be switched off, scaled or merged again.
    #[error("{op}: the adapter is merged into the base weights; unmerge it first")]
    AdapterMerged {
        /// The function that was called.
        op: &'static str,
    },
    /// A file contains no adapter for the network.
    #[error(
        "{} contains no adapter for the network, only {} tensors for text encoders",
        path.display(), ignored.len()
    )]
    NoAdapter {
        /// The file.
        path: PathBuf,
        /// Its entries for text encoders.
        ignored: Vec<String>,
    },
    /// The observer of a network returned an error.
    #[error("the observer of the network returned an error")]
    Observer {
        /// The error of the observer.
        source: BoxedError,
    },
    /// The network does not take a part of the conditioning.
    #[error(transparent)]
    Core(#[from] ddil_core::Error),
    /// An error of a noise schedule.
    #[error(transparent)]
    Scheduler(#[from] ddil_schedulers::Error),
    /// An error of `ddil-libtorch`: a generator, a memory-mapped file.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// An operation of libtorch failed: no memory, no such device, or arguments of another kind or device.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// libtorch's reason, without the C++ stack trace that follows it.
        message: String,
    },
}

impl Error {
    /// The invalid setting, if that is the cause; the first of several.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::InvalidConfig { problems, .. } => problems.first(),
            Self::Scheduler(error) => error.invalid(),
            Self::Core(error) => error.invalid(),
            _ => None,
        }
    }

    /// Wraps a libtorch error, for `map_err`.
    pub(crate) fn torch(op: &'static str) -> impl Fn(TchError) -> Self {
        move |source| {
            let text = source.to_string();
            let message = text.lines().next().unwrap_or_default().to_owned();
            Self::Torch { op, message }
        }
    }
}

struct Lines<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for Lines<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

struct Others<'a>(&'a [(String, Option<String>)]);

impl fmt::Display for Others<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().enumerate().try_for_each(|(i, (file, variant))| {
            let separator = if i == 0 { "; there is " } else { ", " };
            match variant {
                Some(variant) => write!(f, "{separator}{file} (variant `{variant}`)"),
                None => write!(f, "{separator}{file} (no variant)"),
            }
        })
    }
}

/// The differences between an index and its shards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexProblems {
    /// Shards that are not a `.safetensors` file in the folder of the index.
    pub outside: Vec<String>,
    /// Shards that are missing or damaged, each with the reason.
    pub unreadable: Vec<(String, String)>,
    /// Tensors missing from the shard that the index names, with this shard.
    pub absent: Vec<(String, String)>,
    /// Tensors in a shard that the index does not name for them, with this shard and the one named by the index, if
    /// any.
    pub surplus: Vec<(String, String, Option<String>)>,
}

impl fmt::Display for IndexProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for shard in &self.outside {
            write!(f, "\n  shard {shard:?} is not a .safetensors file in the same folder")?;
        }
        for (shard, reason) in &self.unreadable {
            write!(f, "\n  shard {shard:?}: {reason}")?;
        }
        for (tensor, shard) in &self.absent {
            write!(f, "\n  {tensor}: not in {shard:?}")?;
        }
        for (tensor, shard, place) in &self.surplus {
            match place {
                Some(place) => write!(f, "\n  {tensor}: in {shard:?} as well as in {place:?}")?,
                None => write!(f, "\n  {tensor}: in {shard:?}, but not in the index")?,
            }
        }
        Ok(())
    }
}

/// The differences between the tensors of a file and the parameters to fill.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightProblems {
    /// Parameters missing from the file.
    pub missing: Vec<String>,
    /// Tensors in the file that the network does not have.
    pub unexpected: Vec<String>,
    /// Name, shape in the file, shape in the network.
    pub misshapen: Vec<(String, Vec<i64>, Vec<i64>)>,
    /// Name, kind in the file and kind in the network, if only one of them is floating point.
    pub wrong_kind: Vec<(String, String, Kind)>,
}

impl WeightProblems {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for WeightProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for name in &self.missing {
            write!(f, "\n  missing: {name}")?;
        }
        for name in &self.unexpected {
            write!(f, "\n  unexpected: {name}")?;
        }
        for (name, file, network) in &self.misshapen {
            write!(f, "\n  {name}: shape {file:?} in the file, {network:?} in the network")?;
        }
        for (name, file, network) in &self.wrong_kind {
            write!(f, "\n  {name}: {file} in the file, {network:?} in the network")?;
        }
        Ok(())
    }
}

/// Checks `timesteps`: one number or one per sample, integer or floating point.
pub(crate) fn ensure_timesteps(op: &'static str, timesteps: &Tensor, batch: i64) -> Result<()> {
    let name = "timesteps";
    ensure_dense(op, name, timesteps)?;
    let size = timesteps.size();
    let fits = size.is_empty() || size == [batch] || size == [1];
    ensure_shape(op, name, timesteps, fits, || format!("[{batch}], one per sample, or []"))?;
    let kind = timesteps.kind();
    let fits = is_float(kind) || matches!(kind, Kind::Int64 | Kind::Int);
    Ok(ensure_kind(op, name, timesteps, fits, "Int64, Int or floating point")?)
}

/// Checks `class_labels` that index a table: `[batch]`, `Int64`, and in range (only on the CPU).
pub(crate) fn ensure_labels(op: &'static str, labels: &Tensor, batch: i64, max: i64) -> Result<()> {
    let name = "class_labels";
    ensure_dense(op, name, labels)?;
    ensure_one_per_sample(op, name, labels, batch)?;
    ensure_kind(op, name, labels, labels.kind() == Kind::Int64, "Int64")?;
    match outside(labels, 0..max + 1) {
        Some(found) => Err(Error::ClassLabelOutOfRange { op, found, max }),
        None => Ok(()),
    }
}

/// The smallest or largest of these integers, if it is outside of `range`.
///
/// On an accelerator this would synchronise with the device in every call: there it is not checked.
pub(crate) fn outside(values: &Tensor, range: Range<i64>) -> Option<i64> {
    if values.device() != Device::Cpu || values.numel() == 0 {
        return None;
    }
    let ends = [values.min().int64_value(&[]), values.max().int64_value(&[])];
    ends.into_iter().find(|value| !range.contains(value))
}

fn ensure_one_per_sample(
    op: &'static str,
    name: &'static str,
    values: &Tensor,
    batch: i64,
) -> Result<()> {
    let expected = || format!("[{batch}], one per sample");
    Ok(ensure_shape(op, name, values, values.size() == [batch], expected)?)
}

/// Checks that a part of the conditioning is present if and only if the network takes it.
pub(crate) fn ensure_part(
    op: &'static str,
    part: &'static str,
    tensor: Option<&Tensor>,
    expected: bool,
) -> Result<()> {
    match (expected, tensor) {
        (true, None) => Err(Error::MissingPart { op, part }),
        (false, Some(_)) => Err(Error::UnexpectedPart { op, part }),
        _ => Ok(()),
    }
}

/// Checks `guidance_weight`: `[batch]` and floating point for a network that takes one, absent for any other.
pub(crate) fn ensure_guidance_weight(
    op: &'static str,
    weight: Option<&Tensor>,
    batch: i64,
    expected: bool,
) -> Result<()> {
    let name = "guidance_weight";
    ensure_part(op, name, weight, expected)?;
    let Some(weight) = weight else { return Ok(()) };
    ensure_real(op, name, weight)?;
    ensure_one_per_sample(op, name, weight, batch)
}

/// Whether `kind` is a floating-point kind that parameters can have.
pub(crate) fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}
