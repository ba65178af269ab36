use std::path::PathBuf;

use tch::{Kind, Tensor};

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another shape than the function takes.
    #[error("{op}: `{name}` has shape {found:?}; expected {expected}")]
    Shape {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// The shapes that may stand there.
        expected: String,
    },
    /// A tensor holds nothing, is not dense, or holds no real numbers.
    #[error("{op}: `{name}` is {found}; expected a dense tensor of real numbers")]
    NotNumbers {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// What it is.
        found: String,
    },
    /// Two sets of features do not have the same number of columns.
    #[error("{op}: `{}` has {} features a sample, but `{}` has {}", left.0, left.1, right.0, right.1)]
    FeatureMismatch {
        /// The function that was called.
        op: &'static str,
        /// Name and number of columns of the first argument.
        left: (&'static str, i64),
        /// Name and number of columns of the second argument.
        right: (&'static str, i64),
    },
    /// Two sets that must have the same number of samples do not.
    #[error("{op}: `{}` has {} samples, but `{}` has {}; this metric needs as many of each", left.0, left.1, right.0, right.1)]
    CountMismatch {
        /// The function that was called.
        op: &'static str,
        /// Name and number of rows of the first argument.
        left: (&'static str, i64),
        /// Name and number of rows of the second argument.
        right: (&'static str, i64),
    },
    /// A set holds too few samples for the metric to be defined.
    #[error("{op}: `{name}` has {found} samples; at least {needed} are needed")]
    TooFewSamples {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// Its number of samples.
        found: i64,
        /// The least number that would do.
        needed: i64,
    },
    /// A feature is infinite or not a number.
    #[error("{op}: `{name}` holds {found} values that are infinite or not a number")]
    NonFinite {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// How many values are not finite.
        found: i64,
    },
    /// A setting has a value that it cannot have.
    #[error("`{name}` is {value}; it must be {expected}")]
    InvalidSetting {
        /// The setting.
        name: &'static str,
        /// What was found.
        value: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// Weights hold other tensors than the network they are for.
    #[error(
        "the weights do not fit: missing {missing:?}, unexpected {unexpected:?}, misshapen {misshapen:?}"
    )]
    WeightsMismatch {
        /// Names of the network that the weights lack.
        missing: Vec<String>,
        /// Names in the weights that the network lacks.
        unexpected: Vec<String>,
        /// Names whose shape or element type differs, with both.
        misshapen: Vec<String>,
    },
    /// Bytes that should be a safetensors file are not.
    #[error("could not read weights as safetensors")]
    ReadWeights {
        /// What the reader found.
        source: safetensors::SafeTensorError,
    },
    /// A file could not be read.
    #[error("could not read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// libtorch could not load a network from a file.
    #[error("could not load a TorchScript network from {}: {message}", path.display())]
    LoadNetwork {
        /// The file.
        path: PathBuf,
        /// What libtorch said, without its backtrace.
        message: String,
    },
    /// A `TorchScript` network answered with something other than one tensor.
    #[error("the TorchScript network {id} answered with {found}; a tensor [n, {dim}] is needed")]
    NotATensor {
        /// The extractor.
        id: String,
        /// What the network answered with.
        found: String,
        /// Number of features a sample.
        dim: i64,
    },
    /// libtorch refused an operation.
    #[error("{op}: libtorch refused: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// What libtorch said, without its backtrace.
        message: String,
    },
}

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

/// libtorch appends a backtrace to its messages; the first line has the reason.
pub(crate) fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Says which function libtorch refused, for `map_err`.
pub(crate) fn torch(op: &'static str) -> impl Fn(tch::TchError) -> Error {
    move |source| Error::Torch { op, message: first_line(&source) }
}

/// Refuses what cannot be reckoned with: a tensor that holds nothing, is sparse, or of complex numbers.
pub(crate) fn ensure_dense(op: &'static str, name: &'static str, tensor: &Tensor) -> Result<()> {
    let found = if !tensor.defined() {
        "an undefined tensor".to_owned()
    } else if tensor.is_sparse() || tensor.is_mkldnn() {
        "a sparse tensor".to_owned()
    } else if matches!(tensor.kind(), Kind::ComplexHalf | Kind::ComplexFloat | Kind::ComplexDouble)
    {
        format!("{:?}", tensor.kind())
    } else {
        return Ok(());
    };
    Err(Error::NotNumbers { op, name, found })
}

/// The features as a contiguous `f64` tensor, once they are known to be finite and `[n >= least, d >= 1]`.
pub(crate) fn ensure_features(
    op: &'static str,
    name: &'static str,
    features: &Tensor,
    least: i64,
) -> Result<Tensor> {
    ensure_dense(op, name, features)?;
    let shape = features.size();
    let &[n, dim] = shape.as_slice() else {
        return Err(Error::Shape { op, name, found: shape, expected: "[n, features]".to_owned() });
    };
    if dim < 1 {
        return Err(Error::Shape { op, name, found: shape, expected: "[n, 1 or more]".to_owned() });
    }
    if n < least {
        return Err(Error::TooFewSamples { op, name, found: n, needed: least });
    }
    let features = features.detach().to_kind(Kind::Double).contiguous();
    let found =
        features.isfinite().logical_not().sum(Kind::Int64).f_int64_value(&[]).map_err(torch(op))?;
    if found > 0 {
        return Err(Error::NonFinite { op, name, found });
    }
    Ok(features)
}

/// Both sets as [`ensure_features`] gives them, with equally many columns and on one device.
pub(crate) fn ensure_pair(
    op: &'static str,
    (left_name, left): (&'static str, &Tensor),
    (right_name, right): (&'static str, &Tensor),
    least: i64,
) -> Result<(Tensor, Tensor)> {
    let left = ensure_features(op, left_name, left, least)?;
    let right = ensure_features(op, right_name, right, least)?.to_device(left.device());
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
