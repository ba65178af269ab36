//! The manifest of a checkpoint.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::MANIFEST;
use crate::Result;

/// Version of the layout described here; a reader refuses any other.
pub(super) const FORMAT_VERSION: u32 = 1;

/// The manifest of a checkpoint, `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the folder's layout.
    pub(crate) format_version: u32,
    /// The kind of run that wrote it, such as `distill`.
    pub kind: String,
    /// The number of optimizer updates done.
    pub step: u64,
    /// Number of libtorch's threads; another number gives other bits after a resume.
    pub(crate) num_threads: usize,
    /// The version of the program that wrote it.
    pub ddil: String,
    /// The version of libtorch that computed it.
    pub libtorch: String,
    /// The other files of the folder.
    pub members: BTreeMap<String, Member>,
    /// The members to which the run continues to append.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub linked: BTreeMap<String, Linked>,
}

/// The part of a shared file that belongs to a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linked {
    /// The length of that part in bytes, from the start.
    pub bytes: u64,
    /// Its CRC-32: a buffer is too large for a slower checksum.
    pub(crate) crc32: u32,
}

/// Size and checksum of a file in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub(crate) sha256: String,
}

/// The content of the manifest file: the manifest and its own checksum.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sealed {
    pub(super) manifest: Manifest,
    sha256: String,
}

/// The format fields of a manifest, whatever its other fields.
#[derive(Deserialize)]
pub(super) struct ManifestHeader {
    pub(super) manifest: FormatVersion,
}

#[derive(Deserialize)]
pub(super) struct FormatVersion {
    pub(super) format_version: u32,
}

impl Manifest {
    pub(super) fn new(step: u64, kind: &str, members: BTreeMap<String, Member>) -> Result<Self> {
        Ok(Self {
            format_version: FORMAT_VERSION,
            kind: kind.to_owned(),
            step,
            num_threads: ddil_libtorch::num_threads()?,
            ddil: env!("CARGO_PKG_VERSION").to_owned(),
            libtorch: ddil_libtorch::version().to_owned(),
            members,
            linked: BTreeMap::new(),
        })
    }

    pub(super) fn seal(self) -> serde_json::Result<Sealed> {
        Ok(Sealed { sha256: checksum(&self)?, manifest: self })
    }
}

impl Sealed {
    pub(super) fn is_intact(&self) -> bool {
        checksum(&self.manifest).is_ok_and(|sha256| sha256 == self.sha256)
    }
}

/// The checksum of the compact form, so that white space in the file does not count.
fn checksum(manifest: &Manifest) -> serde_json::Result<String> {
    Ok(ddil_files::hex(&Sha256::digest(serde_json::to_vec(manifest)?)))
}

/// The reason why a name cannot be a member's, if there is one: a member must be a plain file in the folder.
pub(super) fn reason_not_a_member(name: &str) -> Option<&'static str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 200 {
        Some("its length is not from 1 to 200")
    } else if name.starts_with('.') {
        Some("it starts with a dot")
    } else if !name.chars().all(plain) {
        Some("only letters, digits, dots, underscores and hyphens are allowed")
    } else if name == MANIFEST {
        Some("it is the name of the manifest")
    } else {
        None
    }
}
