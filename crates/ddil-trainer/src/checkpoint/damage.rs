//! Why a checkpoint cannot be used.

use std::io;

/// What can be wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// The manifest is missing, cut short or not JSON.
    #[error("its manifest.json cannot be read: {reason}")]
    Manifest {
        /// What the system or the parser said.
        reason: String,
    },
    /// The manifest is not the one that was written.
    #[error("its manifest.json has another checksum than it says")]
    ManifestChecksum,
    /// The layout is not one that this version knows.
    #[error("its format version is {found}, which this version does not know")]
    Format {
        /// What the manifest says.
        found: u32,
    },
    /// The folder's name and the manifest disagree.
    #[error("its manifest.json is that of step {found}")]
    OtherStep {
        /// What the manifest says.
        found: u64,
    },
    /// The manifest names a file that a checkpoint cannot have.
    #[error("its manifest.json lists a file `{name}`: {reason}")]
    MemberName {
        /// The name.
        name: String,
        /// Why it cannot be.
        reason: &'static str,
    },
    /// A file is missing or cannot be read.
    #[error("its file {name} cannot be read: {reason}")]
    Member {
        /// The file.
        name: String,
        /// What the system said.
        reason: io::Error,
    },
    /// A file has been cut short or has grown.
    #[error("its file {name} has {found} bytes, not {expected}")]
    Size {
        /// The file.
        name: String,
        /// Its length.
        found: u64,
        /// Its length when it was written.
        expected: u64,
    },
    /// A file that the run shares has been cut short or changed.
    #[error("its file {name} is not what it was: {reason}")]
    Linked {
        /// The file.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file has the right length and the wrong content.
    #[error("its file {name} has another SHA-256 than when it was written")]
    Checksum {
        /// The file.
        name: String,
    },
}
