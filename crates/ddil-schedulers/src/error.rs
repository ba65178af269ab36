//! What can go wrong when a sample is stepped.

use std::path::PathBuf;

use tch::{Kind, Tensor};

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two arguments that must have the same shape do not.
    #[error("{op}: `{}` has shape {:?}, but `{}` has shape {:?}", left.0, left.1, right.0, right.1)]
    ShapeMismatch {
        /// The function that was called.
        op: &'static str,
        /// Name and shape of the first argument.
        left: (&'static str, Vec<i64>),
        /// Name and shape of the second argument.
        right: (&'static str, Vec<i64>),
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
        /// What it may be.
        expected: String,
    },
    /// An argument has a kind that the function cannot take.
    #[error("{op}: `{name}` is {kind:?}; expected {expected}")]
    Kind {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// Its kind.
        kind: tch::Kind,
        /// What it may be.
        expected: &'static str,
    },
    /// An argument is a tensor that holds nothing, or not in the plain order of dense tensors.
    #[error("{op}: `{name}` is {found}; expected a dense tensor")]
    NotDense {
        /// The function that was called.
        op: &'static str,
        /// The argument.
        name: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// Two arguments that must be on the same device are not.
    #[error("{op}: `{}` is on {:?}, but `{}` is on {:?}", left.0, left.1, right.0, right.1)]
    DeviceMismatch {
        /// The function that was called.
        op: &'static str,
        /// Name and device of the first argument.
        left: (&'static str, tch::Device),
        /// Name and device of the second argument.
        right: (&'static str, tch::Device),
    },
    /// A setting is outside of what it may be.
    #[error("`{field}` is {value}; expected {expected}")]
    InvalidConfig {
        /// The setting, as it is spelt in a config file.
        field: &'static str,
        /// What was found.
        value: String,
        /// What may stand there.
        expected: String,
    },
    /// A timestep is not on the training grid.
    #[error("{op}: timestep {timestep} is not in {lowest}..={highest} (-1 is clean data)")]
    TimestepOutOfRange {
        /// The function that was called.
        op: &'static str,
        /// What was found.
        timestep: i64,
        /// The smallest that may stand there.
        lowest: i64,
        /// The largest that may stand there.
        highest: i64,
    },
    /// A stochastic sampler was called without noise.
    #[error("{op}: this sampler is stochastic and needs `noise` in its step")]
    NoiseMissing {
        /// The function that was called.
        op: &'static str,
    },
    /// A prediction type has no meaning on this schedule.
    #[error("`{prediction_type}` is not defined on this schedule: {reason}")]
    PredictionType {
        /// What was asked for.
        prediction_type: &'static str,
        /// Why it cannot be had.
        reason: String,
    },
    /// A scheduler config has keys that its class does not have.
    #[error("{class} has no key {}; its keys are {}", list(unknown), list(known))]
    UnknownKeys {
        /// The class that the file names.
        class: &'static str,
        /// All of the keys that it does not have.
        unknown: Vec<String>,
        /// The keys that it has.
        known: Vec<String>,
    },
    /// A text is not JSON, or not an object.
    #[error("a scheduler config must be a JSON object")]
    Parse {
        /// Where and why.
        source: serde_json::Error,
    },
    /// A file holds something else than a scheduler config that can be.
    #[error("{} is no scheduler config that can be used", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// A file could not be read or written.
    #[error("could not {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// Settings that a scheduler config of diffusers has no words for.
    #[error("`{field}` cannot be said in a {class} config: {reason}")]
    NotRepresentable {
        /// The class to be written.
        class: &'static str,
        /// The setting.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// The step of a plan that does not have so many.
    #[error("{op}: there is no step {index} in a plan of {len} steps, counted from 0")]
    NoSuchStep {
        /// The function that was called.
        op: &'static str,
        /// The step that was asked for.
        index: usize,
        /// How many there are.
        len: usize,
    },
    /// The arithmetic of a step was refused.
    #[error(transparent)]
    Libtorch(#[from] ddil_libtorch::Error),
    /// libtorch refused an operation.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// libtorch's own words, without its backtrace.
        message: String,
    },
}

fn list(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// This crate's results.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps what libtorch said in the name of the operation, first line only.
    pub(crate) fn torch(op: &'static str) -> impl FnOnce(tch::TchError) -> Self {
        move |source| {
            let message = source.to_string();
            let message = message.lines().next().unwrap_or("libtorch gave no reason").to_owned();
            Self::Torch { op, message }
        }
    }
}

/// Checks that a named argument is a tensor that arithmetic can be done with: dense and floating point.
///
/// # Errors
///
/// [`Error::NotDense`] for an undefined or sparse tensor, [`Error::Kind`] for whole numbers, truth values and complex
/// numbers.
pub fn ensure_real(op: &'static str, name: &'static str, tensor: &Tensor) -> Result<()> {
    ensure_dense(op, name, tensor)?;
    let kind = tensor.kind();
    if matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
        return Ok(());
    }
    Err(Error::Kind { op, name, kind, expected: "Float, Double, Half or BFloat16" })
}

/// Checks that a named argument holds something, in the plain order of dense tensors.
///
/// # Errors
///
/// [`Error::NotDense`] otherwise.
pub fn ensure_dense(op: &'static str, name: &'static str, tensor: &Tensor) -> Result<()> {
    if !tensor.defined() {
        return Err(Error::NotDense { op, name, found: "an undefined tensor" });
    }
    if tensor.is_sparse() || tensor.is_mkldnn() {
        return Err(Error::NotDense { op, name, found: "a sparse tensor" });
    }
    Ok(())
}

/// Checks that two named arguments can be added: [`ensure_real`], of the same shape and on the same device.
///
/// # Errors
///
/// Those of [`ensure_real`]; [`Error::ShapeMismatch`] with both names and shapes, [`Error::DeviceMismatch`].
pub fn ensure_same_shape(
    op: &'static str,
    left: (&'static str, &Tensor),
    right: (&'static str, &Tensor),
) -> Result<()> {
    ensure_real(op, left.0, left.1)?;
    ensure_real(op, right.0, right.1)?;
    if left.1.device() != right.1.device() {
        let (left, right) = ((left.0, left.1.device()), (right.0, right.1.device()));
        return Err(Error::DeviceMismatch { op, left, right });
    }
    let (left_size, right_size) = (left.1.size(), right.1.size());
    if left_size == right_size {
        return Ok(());
    }
    Err(Error::ShapeMismatch { op, left: (left.0, left_size), right: (right.0, right_size) })
}

/// Checks that `timesteps` is `Int64` of shape `[batch]` for the batch of `sample`.
pub(crate) fn ensure_timesteps(
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
            Some(batch) => format!("[{batch}], one timestep a sample of the batch"),
            None => "a sample with a batch dimension to go with it".to_owned(),
        };
        return Err(Error::Shape { op, name, shape: timesteps.size(), expected });
    }
    if timesteps.kind() != Kind::Int64 {
        return Err(Error::Kind { op, name, kind: timesteps.kind(), expected: "Int64" });
    }
    Ok(())
}
