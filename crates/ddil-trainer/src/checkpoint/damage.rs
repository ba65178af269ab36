//! Reasons why a checkpoint cannot be used.

use std::io;

/// A defect of a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// The manifest is missing, truncated or not JSON.
    #[error("its manifest.json cannot be read: {reason}")]
    Manifest {
        /// The message of the system or the parser.
        reason: String,
    },
    /// The manifest differs from the one that was written.
    #[error("its manifest.json does not match its own checksum")]
    ManifestChecksum,
    /// This version does not support the layout.
    #[error("its format version is {found}, which this version of ddil cannot read")]
    Format {
        /// The layout version in the manifest.
        found: u32,
    },
    /// The folder's name and the manifest name different steps.
    #[error("its manifest.json belongs to step {found}")]
    OtherStep {
        /// The step in the manifest.
        found: u64,
    },
    /// The manifest lists a file name that a checkpoint cannot contain.
    #[error("its manifest.json lists a file `{name}`: {reason}")]
    MemberName {
        /// The name.
        name: String,
        /// Why it is not allowed.
        reason: &'static str,
    },
    /// A file is missing or cannot be read.
    #[error("its file {name} cannot be read: {reason}")]
    Member {
        /// The file.
        name: String,
        /// The message of the system.
        reason: io::Error,
    },
    /// A file is shorter or longer than it was when written.
    #[error("its file {name} has {found} bytes, not {expected}")]
    Size {
        /// The file.
        name: String,
        /// Its length.
        found: u64,
        /// Its length when it was written.
        expected: u64,
    },
    /// A file shared with the run is truncated or changed.
    #[error("its file {name} was changed: {reason}")]
    Linked {
        /// The file.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file has the right length and the wrong content.
    #[error("its file {name} does not match the SHA-256 in manifest.json")]
    Checksum {
        /// The file.
        name: String,
    },
}
