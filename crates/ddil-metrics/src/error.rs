use std::path::PathBuf;

use ddil_files::Invalid;
use ddil_libtorch::ArgumentError;
use tch::{Kind, Tensor};

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](ddil_files::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// An argument has a shape, kind, layout or value that the function cannot take.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// Two sets of features do not have the same number of columns.
    #[error("{op}: `{}` has {} features per sample, but `{}` has {}", left.0, left.1, right.0, right.1)]
    FeatureMismatch {
        /// The function that was called.
        op: &'static str,
        /// Name and number of columns of the first argument.
        left: (&'static str, i64),
        /// Name and number of columns of the second argument.
        right: (&'static str, i64),
    },
    /// Two sets that must have the same number of samples differ.
    #[error("{op}: `{}` has {} samples, but `{}` has {}; this metric requires equal numbers", left.0, left.1, right.0, right.1)]
    CountMismatch {
        /// The function that was called.
        op: &'static str,
        /// Name and number of rows of the first argument.
        left: (&'static str, i64),
        /// Name and number of rows of the second argument.
        right: (&'static str, i64),
    },
    /// A set has too few samples for the metric to be defined.
    #[error("{op}: `{name}` has {found} samples; expected at least {needed}")]
    TooFewSamples {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// Its number of samples.
        found: i64,
        /// The minimum number of samples.
        needed: i64,
    },
    /// A feature is NaN or infinite.
    #[error("{op}: `{name}` has {found} NaN or infinite values")]
    NonFinite {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// Number of values that are NaN or infinite.
        found: i64,
    },
    /// The tensors of the weights differ from those of the network.
    #[error(
        "the weights do not fit: missing {missing:?}, unexpected {unexpected:?}, misshapen {misshapen:?}"
    )]
    WeightsMismatch {
        /// Names missing from the weights.
        missing: Vec<String>,
        /// Names in the weights that the network does not have.
        unexpected: Vec<String>,
        /// Names whose shape or element type differs, with both.
        misshapen: Vec<String>,
    },
    /// Bytes are not a valid safetensors file.
    #[error("could not read weights as safetensors")]
    ReadWeights {
        /// The error of the parser.
        source: safetensors::SafeTensorError,
    },
    /// A file could not be read.
    #[error("could not read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// A file of statistics is not as required, or could not be written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was found, and what is expected.
        reason: String,
    },
    /// A reference was made with another extractor than the features to compare with it.
    #[error(
        "the reference `{reference}` was made with another extractor: its {what} is {found}, that of the extractor is \
         {expected}; make the reference again with this extractor"
    )]
    AnotherExtractor {
        /// The name of the reference.
        reference: String,
        /// What differs.
        what: &'static str,
        /// The reference's.
        found: String,
        /// The extractor's.
        expected: String,
    },
    /// libtorch could not load a network from a file.
    #[error("could not load a TorchScript network from {}: {message}", path.display())]
    LoadNetwork {
        /// The file.
        path: PathBuf,
        /// The message of libtorch, without its backtrace.
        message: String,
    },
    /// A `TorchScript` network did not return one tensor of features.
    #[error("the TorchScript network {id} returned {found}; expected a tensor [n, {dim}]")]
    NotATensor {
        /// The extractor.
        id: String,
        /// The output of the network.
        found: String,
        /// Number of features per sample.
        dim: String,
    },
    /// An extractor's network failed.
    #[error("the network {id} of features failed")]
    Network {
        /// The extractor.
        id: String,
        /// Its error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A `TorchScript` network that compares images did not return one distance per pair.
    #[error(
        "the TorchScript network {id} returned a tensor {found:?} for {n} pairs of images; expected one distance per pair: \
         [{n}], [{n}, 1] or [{n}, 1, 1, 1]"
    )]
    NotADistance {
        /// The network.
        id: String,
        /// The shape of its output.
        found: Vec<i64>,
        /// Number of pairs.
        n: i64,
    },
    /// An operation of libtorch failed.
    #[error("{op}: libtorch failed: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// The message of libtorch, without its backtrace.
        message: String,
    },
}

impl Error {
    /// The invalid setting, if that is the cause.
    pub fn invalid(&self) -> Option<&Invalid> {
        match self {
            Self::Invalid(invalid) => Some(invalid),
            _ => None,
        }
    }
}

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The first line of libtorch's message, which has the reason; the rest is a backtrace.
pub(crate) fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Wraps an error of libtorch with the name of the function, for `map_err`.
pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Error {
    move |source| Error::Torch { op, message: first_line(&source) }
}

/// Checks that a named argument is a dense tensor of real numbers, floating point or not.
pub(crate) fn ensure_numbers(op: &'static str, name: &'static str, tensor: &Tensor) -> Result<()> {
    ddil_libtorch::ensure_dense(op, name, tensor)?;
    let kind = tensor.kind();
    if matches!(kind, Kind::ComplexHalf | Kind::ComplexFloat | Kind::ComplexDouble) {
        return Err(ArgumentError::Kind { op, name, kind, expected: "real numbers" }.into());
    }
    Ok(())
}

/// The features as a contiguous `f64` tensor, checked to be finite and `[n >= least, d >= 1]`.
pub(crate) fn ensure_features(
    op: &'static str,
    name: &'static str,
    features: &Tensor,
    least: i64,
) -> Result<Tensor> {
    Ok(ensure_rows(op, name, features, least)?.to_kind(Kind::Double).contiguous())
}

/// Rows whose finiteness is checked at once.
const CHECKED_ROWS: i64 = 4096;

/// The features as they are, checked to be finite and `[n >= least, d >= 1]`; only a part of them is copied at a time, so
/// that rows in a mapped file need no memory.
pub(crate) fn ensure_rows(
    op: &'static str,
    name: &'static str,
    features: &Tensor,
    least: i64,
) -> Result<Tensor> {
    ensure_numbers(op, name, features)?;
    let shape = features.size();
    let &[n, dim] = shape.as_slice() else {
        return Err(Error::Argument(ArgumentError::Shape {
            op,
            name,
            shape,
            expected: "[n, features]".to_owned(),
        }));
    };
    if dim < 1 {
        return Err(Error::Argument(ArgumentError::Shape {
            op,
            name,
            shape,
            expected: "[n, 1 or more]".to_owned(),
        }));
    }
    if n < least {
        return Err(Error::TooFewSamples { op, name, found: n, needed: least });
    }
    let features = features.detach();
    let mut found = 0;
    for rows in features.split(CHECKED_ROWS, 0) {
        let bad = rows.isfinite().logical_not().sum(Kind::Int64);
        found += bad.f_int64_value(&[]).map_err(torch(op))?;
    }
    if found > 0 {
        return Err(Error::NonFinite { op, name, found });
    }
    Ok(features)
}

/// Some rows of features as a contiguous `f64` tensor.
pub(crate) fn rows_of(features: &Tensor, start: i64, len: i64) -> Tensor {
    features.narrow(0, start, len).to_kind(Kind::Double).contiguous()
}

/// Both sets checked by [`ensure_features`], with the same number of columns and on one device.
pub(crate) fn ensure_pair(
    op: &'static str,
    (left_name, left): (&'static str, &Tensor),
    (right_name, right): (&'static str, &Tensor),
    least: i64,
) -> Result<(Tensor, Tensor)> {
    let (left, right) = ensure_pair_of_rows(op, (left_name, left), (right_name, right), least)?;
    let [left, right] = [left, right].map(|features| features.to_kind(Kind::Double).contiguous());
    Ok((left, right))
}

/// The same by [`ensure_rows`], without a copy of sets on the CPU.
pub(crate) fn ensure_pair_of_rows(
    op: &'static str,
    (left_name, left): (&'static str, &Tensor),
    (right_name, right): (&'static str, &Tensor),
    least: i64,
) -> Result<(Tensor, Tensor)> {
    let left = ensure_rows(op, left_name, left, least)?;
    let right = ensure_rows(op, right_name, right, least)?.to_device(left.device());
    let dims = [&left, &right].map(|features| features.size()[1]);
    if dims[0] != dims[1] {
        return Err(Error::FeatureMismatch {
            op,
            left: (left_name, dims[0]),
            right: (right_name, dims[1]),
        });
    }
    Ok((left, right))
}
