//! Arguments that do not fit: the error, and the checks that the crates of the workspace share.

use std::fmt::Display;

use tch::{Device, Kind, Tensor};

/// An argument that a function cannot take: its shape, kind, layout, device or value.
///
/// The crates of the workspace check tensors in their public functions with [`ensure_real`], [`ensure_dense`],
/// [`ensure_shape`], [`ensure_kind`], [`ensure_same_shape`] and [`ensure_timesteps`], and all return this error.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ArgumentError {
    /// Two arguments that must have the same shape do not.
    #[error("{op}: `{}` has shape {:?}, but `{}` has shape {:?}", left.0, left.1, right.0, right.1)]
    ShapeMismatch {
        /// The function that was called.
        op: &'static str,
        /// Name and shape of the first argument.
        left: (&'static str, Box<[i64]>),
        /// Name and shape of the second argument.
        right: (&'static str, Box<[i64]>),
    },
    /// An argument has a shape that the function cannot take.
    #[error("{op}: `{name}` has shape {shape:?}; expected {expected}")]
    Shape {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// Its shape.
        shape: Vec<i64>,
        /// The shapes that are allowed.
        expected: String,
    },
    /// An argument has a kind that the function cannot take.
    #[error("{op}: `{name}` has kind {kind:?}; expected {expected}")]
    Kind {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// Its kind.
        kind: Kind,
        /// The kinds that are allowed.
        expected: &'static str,
    },
    /// An argument is an undefined tensor, or is not stored densely.
    #[error("{op}: `{name}` is {found}; expected a dense tensor")]
    NotDense {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// What was found.
        found: &'static str,
    },
    /// Two arguments that must be on the same device are not.
    #[error("{op}: `{}` is on {:?}, but `{}` is on {:?}", left.0, left.1, right.0, right.1)]
    DeviceMismatch {
        /// The function that was called.
        op: &'static str,
        /// Name and device of the first argument.
        left: (&'static str, Device),
        /// Name and device of the second argument.
        right: (&'static str, Device),
    },
    /// An argument has a value out of range.
    #[error("{op}: `{name}` is {value}; expected {expected}")]
    Value {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// The value that was found.
        value: String,
        /// The values that are allowed.
        expected: String,
    },
}

impl ArgumentError {
    /// The error for the value `value` of the argument `name`; `expected` describes the allowed values.
    pub fn value(
        op: &'static str,
        name: &'static str,
        value: impl Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Value { op, name, value: value.to_string(), expected: expected.into() }
    }
}

/// A result with [`ArgumentError`].
type Result<T> = std::result::Result<T, ArgumentError>;

/// Checks that a named argument is a dense tensor of floating-point numbers.
///
/// # Errors
///
/// [`ArgumentError::NotDense`] for an undefined or sparse tensor, [`ArgumentError::Kind`] for integers, booleans and
/// complex numbers.
pub fn ensure_real(op: &'static str, name: &'static str, tensor: &Tensor) -> Result<()> {
    ensure_dense(op, name, tensor)?;
    let kind = tensor.kind();
    if matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
        return Ok(());
    }
    Err(ArgumentError::Kind { op, name, kind, expected: "Float, Double, Half or BFloat16" })
}

/// Checks that a named argument is defined and stored densely.
///
/// # Errors
///
/// [`ArgumentError::NotDense`] otherwise.
pub fn ensure_dense(op: &'static str, name: &'static str, tensor: &Tensor) -> Result<()> {
    if !tensor.defined() {
        return Err(ArgumentError::NotDense { op, name, found: "an undefined tensor" });
    }
    if tensor.is_sparse() || tensor.is_mkldnn() {
        return Err(ArgumentError::NotDense { op, name, found: "a sparse tensor" });
    }
    Ok(())
}

/// Checks that `fits`, a comparison of the shape of a named argument, is true.
///
/// # Errors
///
/// [`ArgumentError::Shape`] otherwise; `expected` describes the allowed shapes.
pub fn ensure_shape(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
    fits: bool,
    expected: impl FnOnce() -> String,
) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(ArgumentError::Shape { op, name, shape: tensor.size(), expected: expected() })
}

/// Checks that `fits`, a comparison of the kind of a named argument, is true.
///
/// # Errors
///
/// [`ArgumentError::Kind`] otherwise; `expected` describes the allowed kinds.
pub fn ensure_kind(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
    fits: bool,
    expected: &'static str,
) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(ArgumentError::Kind { op, name, kind: tensor.kind(), expected })
}

/// Checks that two named arguments can be added: both [`ensure_real`], of the same shape, on the same device.
///
/// # Errors
///
/// As [`ensure_real`]; [`ArgumentError::ShapeMismatch`] with both names and shapes, [`ArgumentError::DeviceMismatch`].
pub fn ensure_same_shape(
    op: &'static str,
    left: (&'static str, &Tensor),
    right: (&'static str, &Tensor),
) -> Result<()> {
    ensure_real(op, left.0, left.1)?;
    ensure_real(op, right.0, right.1)?;
    if left.1.device() != right.1.device() {
        let (left, right) = ((left.0, left.1.device()), (right.0, right.1.device()));
        return Err(ArgumentError::DeviceMismatch { op, left, right });
    }
    let (left_size, right_size) = (left.1.size(), right.1.size());
    if left_size == right_size {
        return Ok(());
    }
    let (left, right) = ((left.0, left_size.into()), (right.0, right_size.into()));
    Err(ArgumentError::ShapeMismatch { op, left, right })
}

/// Checks that `timesteps` is `Int64` of shape `[batch]` for the batch of `sample`.
///
/// # Errors
///
/// As [`ensure_dense`] for `timesteps` and [`ensure_real`] for `sample`; [`ArgumentError::Shape`] and
/// [`ArgumentError::Kind`] for `timesteps`.
pub fn ensure_timesteps(
    op: &'static str,
    name: &'static str,
    timesteps: &Tensor,
    sample: &Tensor,
) -> Result<()> {
    ensure_dense(op, name, timesteps)?;
    ensure_real(op, "sample", sample)?;
    let batch = sample.size().first().copied();
    if Some(timesteps.size().as_slice()) != batch.as_ref().map(std::slice::from_ref) {
        let expected = match batch {
            Some(batch) => format!("[{batch}], one timestep per sample of the batch"),
            None => "one timestep per sample, for a sample with a batch dimension".to_owned(),
        };
        return Err(ArgumentError::Shape { op, name, shape: timesteps.size(), expected });
    }
    if timesteps.kind() != Kind::Int64 {
        let kind = timesteps.kind();
        return Err(ArgumentError::Kind { op, name, kind, expected: "Int64" });
    }
    Ok(())
}
