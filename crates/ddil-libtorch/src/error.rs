use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::argument::ArgumentError;

/// The errors of this crate.
///
/// `Display` prints an error without its causes; a [`Report`](crate::Report) prints both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation failed in libtorch.
    #[error("{op}: {message}")]
    Torch {
        /// The function that was called.
        op: &'static str,
        /// libtorch's message, without its backtrace.
        message: String,
    },
    /// An argument has a shape, kind or value that the function cannot take.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// A tensor that should have received a gradient has none.
    #[error(
        "the tensor at index {index} has no gradient: was `backward` called, and does the loss depend on it?"
    )]
    MissingGradient {
        /// Its index in the list.
        index: usize,
    },
    /// The operation is not available on the device.
    #[error("{op}: {device:?} is not supported; expected the CPU or CUDA")]
    UnsupportedDevice {
        /// The function that was called.
        op: &'static str,
        /// The requested device.
        device: Device,
    },
    /// The operation is not available for the kind.
    #[error("{op}: kind {kind:?} is not supported; expected {expected}")]
    UnsupportedKind {
        /// The function that was called.
        op: &'static str,
        /// The requested kind.
        kind: Kind,
        /// The supported kinds.
        expected: &'static str,
    },
    /// A file could not be opened or mapped into memory.
    #[error("could not open {}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// A file could not be created, written or read.
    #[error("could not {action} {}", path.display())]
    File {
        /// The operation that failed.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// A file does not have the length with which it was created.
    #[error("{} has {found} bytes, not {expected}", path.display())]
    FileLength {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The expected length.
        expected: u64,
    },
    /// An archive is invalid, or declares more data than it contains.
    #[error("{} is not a complete TorchScript archive: {problem}", path.display())]
    ScriptArchive {
        /// The file.
        path: PathBuf,
        /// The record, if it concerns one, and the problem.
        problem: String,
    },
    /// A tensor would reach beyond the end of its file.
    #[error("{}: {kind:?} of shape {shape:?} at byte {offset} does not fit into {len} bytes", path.display())]
    OutOfBounds {
        /// The file.
        path: PathBuf,
        /// First byte of the tensor.
        offset: usize,
        /// Its shape.
        shape: Vec<i64>,
        /// Its kind.
        kind: Kind,
        /// Length of the file.
        len: usize,
    },
    /// A tensor would start at an address that is not aligned for its kind.
    #[error("{}: {kind:?} at byte {offset}, which is not a multiple of {alignment}", path.display())]
    Misaligned {
        /// The file.
        path: PathBuf,
        /// First byte of the tensor.
        offset: usize,
        /// Its kind.
        kind: Kind,
        /// The required alignment of the address.
        alignment: usize,
    },
    /// A byte of a `Bool` tensor is neither 0 nor 1.
    #[error("{}: byte {offset} belongs to a Bool tensor, but is {value}", path.display())]
    NotBool {
        /// The file.
        path: PathBuf,
        /// Offset of the byte.
        offset: usize,
        /// Its value.
        value: u8,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An argument with a value that is out of range.
    pub(crate) fn value(
        op: &'static str,
        name: &'static str,
        value: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        let (value, expected) = (value.to_string(), expected.into());
        Self::Argument(ArgumentError::Value { op, name, value, expected })
    }

    /// Wraps an error of the system about a file.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { action, path: path.to_owned(), source }
    }
}
